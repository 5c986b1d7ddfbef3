from __future__ import annotations

import random

import pytest

from gateway.fleet.fleet import Fleet
from gateway.fleet.worker_view import USUAL_S, WorkerView
from gateway.routing.expected_ttft import ExpectedTTFT
from gateway.routing.policy import Choice, ChoiceReason, RoutingRequest
from gateway.routing.rebalance import CLOSED_S, MAX_SETTLING, SETTLE_S, Rebalancer
from shared.adapters.identity import AdapterRef
from shared.link.messages import AdapterState, Heartbeat, Tier, WorkerState

SLOTS = 16


def ref(name: str) -> AdapterRef:
    return AdapterRef("tiny", name, "d")


class Room:
    """A fleet whose workers run what other gateways have sent there, and the policy."""

    def __init__(self) -> None:
        self.fleet, self.policy, self.rng, self.now, self.sid, self.seq = (
            Fleet(1e9),
            ExpectedTTFT(),
            random.Random(1),
            0.0,
            0,
            0,
        )

    def beat(self, worker: str, **in_flight: int) -> WorkerView:
        """The worker has these adapters in slots, with so many requests each."""
        self.seq += 1
        states = tuple(
            AdapterState(name, "d", Tier.GPU, in_flight=n) for name, n in in_flight.items()
        )
        running = sum(in_flight.values())
        beat = Heartbeat(
            worker,
            1,
            self.seq,
            "tiny",
            WorkerState.SERVING,
            256,
            SLOTS,
            running,
            adapters=states,
            yours=0,
        )
        self.fleet.beat(beat, self.now)
        self.fleet.attach(worker, 1)
        found = self.fleet.get(worker)
        assert found is not None
        return found

    def usual(self, **workers: dict[str, int]) -> None:
        """It is so for long enough to be the usual load."""
        for _ in range(2):
            for worker, in_flight in workers.items():
                self.beat(worker, **in_flight)
            self.now += 2 * USUAL_S

    def to(self, name: str) -> tuple[str, ChoiceReason]:
        request = RoutingRequest("tiny", ref(name), 26 << 20, prompt_tokens=128, arrived=self.now)
        self.policy.arrived(request, self.now)
        choice = self.policy.choose(request, self.fleet, self.now, self.rng)
        assert isinstance(choice, Choice), choice
        self.sid += 1
        self.fleet.reserve(choice.worker, self.sid, ref(name), 128)
        self.policy.sent(request, choice, self.now)
        return choice.worker.id, choice.reason


HEAVY = {"law": 24, "tax": 24, "art": 24, "war": 24, "sea": 24}
"""None of them is so hot that it is worth a second copy."""


@pytest.fixture
def room() -> Room:
    return Room()


def test_an_adapter_leaves_a_worker_that_stays_far_busier_and_does_not_come_back_at_once(
    room: Room,
) -> None:
    room.usual(heavy=HEAVY, light={"poem": 20})
    assert room.to("law") == ("light", ChoiceReason.SPILL)
    for _ in range(5):
        assert room.to("law") == ("light", ChoiceReason.RESIDENT)
    room.now += CLOSED_S - 0.1
    room.beat("heavy", **HEAVY)
    room.beat("light", poem=20, law=20)
    assert room.to("law") == ("light", ChoiceReason.RESIDENT)


def test_one_at_a_time_so_that_the_second_move_knows_of_the_first(room: Room) -> None:
    room.usual(heavy=HEAVY, light={"poem": 20})
    assert room.to("law")[0] == "light" and room.to("tax")[0] == "heavy"


def test_a_busy_moment_is_not_a_bad_distribution(room: Room) -> None:
    room.usual(heavy={"law": 20, "tax": 20}, light={"poem": 40})
    room.now += 0.1
    room.beat("heavy", **HEAVY)
    assert room.to("law") == ("heavy", ChoiceReason.RESIDENT)


def test_an_adapter_that_would_only_turn_the_difference_round_stays(room: Room) -> None:
    room.usual(heavy={"law": 19, "tax": 17, "art": 16}, light={"poem": 28})
    assert room.to("law")[0] == "heavy"


def test_an_adapter_of_a_few_requests_is_not_worth_a_load(room: Room) -> None:
    room.usual(heavy={"law": 100, "tax": 2}, light={"poem": 20})
    assert room.to("tax")[0] == "heavy"


def test_workers_with_few_requests_are_let_alone_however_uneven_they_are(room: Room) -> None:
    room.usual(heavy={"law": 10, "tax": 10, "art": 8}, light={"poem": 1})
    assert room.to("law")[0] == "heavy"


def test_nobody_moves_to_the_last_slot_of_a_worker(room: Room) -> None:
    full = {f"a{n}": 1 for n in range(SLOTS - 1)}
    room.usual(heavy=HEAVY, light=full)
    assert room.to("law")[0] == "heavy"
    room.usual(heavy=HEAVY, light=dict.fromkeys(list(full)[1:], 1))
    assert room.to("law")[0] == "light"


def test_while_slots_are_scarce_nobody_moves(room: Room) -> None:
    """A move takes two slots until the old requests have ended."""
    room.usual(heavy=HEAVY, light={"poem": 20})
    for n in range(3):  # misses: each keeps a slot for a service time
        room.to(f"new{n}")
    base = room.policy._base("tiny")
    assert base.abundant(room.fleet.pool("tiny"), room.now)
    for _ in range(2000):
        base.misses.note(("", ""), room.now)
    assert not base.abundant(room.fleet.pool("tiny"), room.now)
    assert room.to("law")[0] == "heavy"


def test_an_adapter_whose_home_set_grows_is_spread_by_copies_and_not_moved(room: Room) -> None:
    room.usual(heavy=HEAVY, light={"poem": 20})
    room.policy._base("tiny").rebalancer.settle(("law", "d"), room.now)
    assert room.to("law")[0] == "heavy"
    room.now += SETTLE_S
    room.usual(heavy=HEAVY, light={"poem": 20})
    assert room.to("law")[0] == "light"


def test_when_the_worker_that_took_it_is_lost_the_old_one_serves_the_adapter_again(
    room: Room,
) -> None:
    room.usual(heavy=HEAVY, light={"poem": 20}, third={"ode": 30})
    (taker, reason) = room.to("law")
    assert reason is ChoiceReason.SPILL
    room.fleet.unreachable(taker, 1)
    assert room.to("law") == ("heavy", ChoiceReason.RESIDENT)


def test_explain_says_that_the_adapter_has_moved(room: Room) -> None:
    room.usual(heavy=HEAVY, light={"poem": 20})
    room.to("law")
    request = RoutingRequest("tiny", ref("law"), 26 << 20, prompt_tokens=128, arrived=room.now)
    assert {c.worker.id: c.note for c in room.policy.explain(request, room.fleet, room.now)} == {
        "heavy": "moved to a lighter worker",
        "light": "",
    }


def test_what_is_remembered_is_bounded() -> None:
    rebalancer = Rebalancer()
    for n in range(2 * MAX_SETTLING):
        rebalancer.settle((f"a{n}", "d"), 0.0)
    assert len(rebalancer._settling) == MAX_SETTLING
