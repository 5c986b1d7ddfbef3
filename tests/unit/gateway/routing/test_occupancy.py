from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.fleet.worker_view import WorkerView
from gateway.routing.occupancy import LEAST, RECENT, Occupancy
from gateway.routing.policy import RoutingRequest
from shared.adapters.identity import AdapterKey
from shared.link.messages import AdapterState, Heartbeat, Tier, WorkerState

A: AdapterKey = ("a", "d")
B: AdapterKey = ("b", "d")


def worker(name: str = "w0", **others: int) -> WorkerView:
    """With so many requests of other gateways for each of these adapters."""
    states = tuple(AdapterState(n, "d", Tier.GPU, in_flight=k) for n, k in others.items())
    running = sum(others.values())
    return WorkerView(
        Heartbeat(
            name, 1, 1, "tiny", WorkerState.SERVING, 256, 4, running, adapters=states, yours=0
        ),
        1e9,
    )


def seen(*lasted_s: float) -> Occupancy:
    occupancy = Occupancy()
    for each in lasted_s:
        occupancy.end(RoutingRequest("tiny"), each)
    return occupancy


def freed(occupancy: Occupancy, w: WorkerView, within_s: float, now: float) -> float:
    found = occupancy.freed(w, within_s, now)
    assert found is not None
    return found


def test_of_too_few_stays_nothing_is_told() -> None:
    assert seen(*[1.0] * (LEAST - 1)).freed(worker(), 1.0, 0.0) is None
    assert seen(*[1.0] * LEAST).freed(worker(), 1.0, 0.0) == 0.0


def test_where_all_stay_equally_long_it_is_known_who_ends_next() -> None:
    occupancy, w = seen(*[2.0] * RECENT), worker()
    occupancy.begin(RoutingRequest("tiny"), "w0", A, 0.0)
    assert freed(occupancy, w, 0.1, now=1.0) < 0.01
    assert freed(occupancy, w, 0.1, now=1.95) > 0.99


def test_where_the_past_tells_nothing_of_the_future_age_does_not_matter() -> None:
    """Exponential stays have no memory."""
    occupancy, w = seen(*[-2.0 * math.log(1 - (n + 0.5) / RECENT) for n in range(RECENT)]), worker()
    occupancy.begin(RoutingRequest("tiny"), "w0", A, 0.0)
    chances = [freed(occupancy, w, 0.5, now=age) for age in (0.1, 1.0, 2.0, 3.0)]
    assert chances == pytest.approx([1 - math.exp(-0.25)] * 4, rel=0.25)


def test_a_slot_is_free_once_all_requests_of_its_adapter_have_ended() -> None:
    occupancy, w = seen(*[n / 100 for n in range(1, 201)]), worker()
    occupancy.begin(RoutingRequest("tiny"), "w0", A, 0.0)
    one = freed(occupancy, w, 0.5, now=0.0)
    occupancy.begin(RoutingRequest("tiny"), "w0", A, 0.0)
    assert freed(occupancy, w, 0.5, now=0.0) == pytest.approx(one**2)
    occupancy.begin(RoutingRequest("tiny"), "w0", B, 0.0)
    assert freed(occupancy, w, 0.5, now=0.0) == pytest.approx(one**2 + one)


def test_adapters_of_other_gateways_count_at_the_mean_rate() -> None:
    occupancy = seen(*[2.0] * RECENT)
    assert freed(occupancy, worker(a=1, b=3), 0.5, now=0.0) == pytest.approx(2 * 0.25)
    occupancy.begin(RoutingRequest("tiny"), "w0", A, 0.0)
    # ours ends, theirs must as well
    assert freed(occupancy, worker(a=2), 0.5, now=1.75) == pytest.approx(0.25, rel=0.01)


def test_what_is_sent_again_elsewhere_is_no_longer_where_it_was() -> None:
    occupancy = seen(*[1.0] * RECENT)
    request = RoutingRequest("tiny")
    occupancy.begin(request, "w0", A, 0.0)
    occupancy.begin(request, "w1", A, 0.0)
    assert (
        freed(occupancy, worker("w0"), 1.0, 0.5) == 0.0
        and freed(occupancy, worker("w1"), 1.0, 0.5) > 0.9
    )


def test_only_the_newest_stays_count() -> None:
    occupancy = seen(*[9.0] * RECENT, *[1.0] * RECENT)
    occupancy.begin(RoutingRequest("tiny"), "w0", A, 0.0)
    assert freed(occupancy, worker(), 0.2, now=0.9) > 0.99


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["begin", "end", "lose"]), st.integers(0, 5), st.floats(0.0, 5.0)
        ),
        max_size=60,
    )
)
def test_nothing_stays_behind_and_no_more_is_freed_than_is_there(
    events: list[tuple[str, int, float]],
) -> None:
    occupancy, requests, now = seen(*[1.0] * LEAST), [RoutingRequest("tiny") for _ in range(6)], 0.0
    for what, n, gap in events:
        now += gap
        if what == "begin":
            occupancy.begin(requests[n], f"w{n % 2}", (f"a{n % 3}", "d"), now)
        else:
            occupancy.end(requests[n], gap if what == "end" else None)
        there = {w: freed(occupancy, worker(w), 0.3, now) for w in ("w0", "w1")}
        assert all(0.0 <= number <= 3.0 for number in there.values())
    for request in requests:
        occupancy.end(request)
    assert (
        len(occupancy) == 0
        and freed(occupancy, worker("w0"), 9.0, now)
        == freed(occupancy, worker("w1"), 9.0, now)
        == 0.0
    )
    assert not occupancy._on


def test_the_newest_request_of_an_adapter_is_the_one_that_was_sent_last_and_is_still_there() -> (
    None
):
    occupancy, first, second = Occupancy(), RoutingRequest("tiny"), RoutingRequest("tiny")
    assert occupancy.newest("w0", ("a", "d")) == -math.inf
    occupancy.begin(first, "w0", ("a", "d"), 1.0)
    occupancy.begin(second, "w0", ("a", "d"), 2.0)
    assert occupancy.newest("w0", ("a", "d")) == 2.0
    occupancy.end(second)
    assert occupancy.newest("w0", ("a", "d")) == 1.0
    occupancy.end(first)
    assert occupancy.newest("w0", ("a", "d")) == -math.inf
