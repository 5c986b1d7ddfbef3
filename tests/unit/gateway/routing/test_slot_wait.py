from __future__ import annotations

import pytest

from gateway.fleet.worker_view import WorkerView
from gateway.routing.occupancy import RECENT, Occupancy
from gateway.routing.policy import RoutingRequest
from gateway.routing.slot_wait import (
    FULL_SPREADS,
    JUDGE_AGAIN_S,
    LONGEST_WAIT_S,
    NO_WAIT_SPREADS,
    SCARCE_SPREADS,
    SCARCE_WAIT_S,
    SOON_S,
    SlotWait,
)
from shared.link.messages import Heartbeat, WorkerState

FULL = WorkerView(Heartbeat("full", 1, 1, "tiny", WorkerState.SERVING, 256, 4), 1e9)
STAY_S = 2.0
DEAR_S = 10.0
"""A load elsewhere that costs more than any wait."""


class WaitingRequests:
    """Requests that wait for `FULL`, on which each adapter has one request that stays for
    STAY_S.
    """

    def __init__(self, *ends: float) -> None:
        self.occupancy = Occupancy()
        self.slot_wait = SlotWait(self.occupancy)
        for _ in range(RECENT):
            self.occupancy.end(RoutingRequest("tiny"), STAY_S)
        for n, at in enumerate(ends):
            self.occupancy.begin(RoutingRequest("tiny"), "full", (f"a{n}", "d"), at - STAY_S)

    def waits(
        self,
        request: RoutingRequest,
        now: float = 0.0,
        slack: float = FULL_SPREADS,
        elsewhere_s: float = DEAR_S,
    ) -> bool:
        return self.slot_wait.until(request, [FULL], slack, elsewhere_s, now) > now


def request(arrived: float = 0.0) -> RoutingRequest:
    return RoutingRequest("tiny", arrived=arrived)


def test_it_waits_if_a_slot_comes_free_soon_and_not_if_none_does() -> None:
    assert WaitingRequests(SOON_S / 2, 1.0).waits(request())
    assert not WaitingRequests(1.0, 1.5).waits(request())


def test_slots_go_to_those_who_came_first() -> None:
    line = WaitingRequests(SOON_S / 2)
    first, second, earlier = request(0.01), request(0.02), request(0.0)
    assert line.waits(first, 0.02) and not line.waits(second, 0.02)
    assert line.waits(earlier, 0.02)
    two = WaitingRequests(SOON_S / 2, SOON_S / 3)
    assert two.waits(first, 0.02) and two.waits(second, 0.02)


def test_a_request_that_leaves_lets_the_next_one_count_on_its_slot() -> None:
    line = WaitingRequests(SOON_S / 2)
    first, second = request(0.01), request(0.02)
    assert line.waits(first, 0.02) and not line.waits(second, 0.02)
    line.slot_wait.forget(first)
    assert line.waits(second, 0.02)
    line.slot_wait.forget(second)
    line.slot_wait.forget(second)
    assert len(line.slot_wait) == 0 and not line.slot_wait._at


def test_a_request_stops_waiting_when_the_slot_went_to_another() -> None:
    line = WaitingRequests(0.1)
    asked = request()
    assert line.waits(asked)
    # the adapter got a new request and will not leave
    line.occupancy.begin(RoutingRequest("tiny"), "full", ("a0", "d"), 0.0)
    assert line.waits(asked, JUDGE_AGAIN_S / 2)
    assert not line.waits(asked, JUDGE_AGAIN_S)


def test_who_has_given_up_is_ahead_of_nobody() -> None:
    line = WaitingRequests(*[SOON_S / 2] * 2)
    gone, asked = request(0.0), request(0.02)
    assert line.waits(gone)
    assert not line.waits(gone, LONGEST_WAIT_S)
    assert len(line.slot_wait) == 0
    assert line.waits(asked, 0.02)


def test_a_wait_ends_however_likely_a_slot_is() -> None:
    line = WaitingRequests(*[at / 10 for at in range(10)])
    asked = request()
    assert line.slot_wait.until(asked, [FULL], FULL_SPREADS, DEAR_S, 0.0) == pytest.approx(SOON_S)
    assert line.slot_wait.until(asked, [FULL], FULL_SPREADS, DEAR_S, 0.2) == pytest.approx(
        LONGEST_WAIT_S
    )
    assert not line.waits(asked, LONGEST_WAIT_S)


def test_the_more_slots_are_open_elsewhere_the_shorter_it_is() -> None:
    line = WaitingRequests(0.05)
    half = line.slot_wait.until(
        request(), [FULL], (FULL_SPREADS + NO_WAIT_SPREADS) / 2, DEAR_S, 0.0
    )
    assert half == pytest.approx(LONGEST_WAIT_S / 2)
    assert not line.waits(request(), slack=NO_WAIT_SPREADS)


def test_while_slots_are_scarce_it_waits_whatever_is_likely() -> None:
    line, asked = WaitingRequests(1.0), request(1.0)
    assert (
        line.slot_wait.until(asked, [FULL], SCARCE_SPREADS / 2, DEAR_S, 1.0) == 1.0 + SCARCE_WAIT_S
    )
    assert not line.waits(asked, 1.0 + SCARCE_WAIT_S, SCARCE_SPREADS / 2)


def test_where_nothing_is_known_of_stays_it_waits() -> None:
    assert SlotWait(Occupancy()).until(
        request(), [FULL], FULL_SPREADS, DEAR_S, 0.0
    ) == pytest.approx(SOON_S)


@pytest.mark.parametrize("slack", [FULL_SPREADS, SCARCE_SPREADS / 2])
def test_nobody_waits_longer_than_a_load_elsewhere_costs(slack: float) -> None:
    line, asked = WaitingRequests(1.005), request(1.0)
    assert line.slot_wait.until(asked, [FULL], slack, 0.02, 1.0) == pytest.approx(1.02)
    assert not line.waits(asked, 1.02, slack, elsewhere_s=0.02)
    assert len(line.slot_wait) == 0


def test_a_slot_that_comes_free_later_than_a_load_elsewhere_would_take_is_not_waited_for() -> None:
    assert WaitingRequests(0.05).waits(request())
    assert not WaitingRequests(0.05).waits(request(), elsewhere_s=0.02)
