"""What is given up when more requests wait than can be served in time."""

from __future__ import annotations

import pytest

from gateway.dispatch.queue.admission import Admission
from gateway.dispatch.queue.overload import LEAST_SERVED, AbandonmentRate, DrainRate
from gateway.routing.policy import Blocked


def taken(queue: Admission[str], count: int) -> list[str]:
    found: list[str] = []

    def dispatch(item: str) -> Blocked | None:
        if len(found) == count:
            return Blocked.ROOM
        found.append(item)
        return None

    queue.admit_waiting("tiny", dispatch)
    return found


def test_nothing_is_said_of_a_rate_that_has_not_been_measured() -> None:
    drain = DrainRate()
    for _ in range(LEAST_SERVED - 1):
        drain.served(100.0, 10)
    assert drain.wait_s(1000, 1) == 0.0 and drain.service_s(0) == 0.0
    drain.served(100.0, 10)
    assert drain.service_s(0) == pytest.approx(100.0)


def test_the_wait_is_that_of_those_before_over_the_places_that_serve_them() -> None:
    drain = DrainRate()
    for _ in range(LEAST_SERVED):
        drain.served(2.0, 100)
    assert drain.wait_s(64, 32) == pytest.approx(4.0)
    assert drain.wait_s(64, 0) == 0.0


def test_a_request_for_few_tokens_takes_less_time_and_one_without_a_limit_the_usual() -> None:
    drain = DrainRate()
    for _ in range(LEAST_SERVED):
        drain.served(2.0, 100)
    assert drain.service_s(10) == pytest.approx(0.2)
    assert drain.service_s(0) == drain.service_s(4000) == pytest.approx(2.0)


def test_a_tenant_is_impatient_once_a_tenth_of_its_requests_end_in_vain_and_only_it() -> None:
    abandonment = AbandonmentRate()
    for n in range(200):
        abandonment.ended("rare", in_vain=n % 40 == 0)
        abandonment.ended("often", in_vain=n % 4 == 0)
    assert abandonment.newest_first("often") and not abandonment.newest_first("rare")
    for _ in range(200):
        abandonment.ended("often", in_vain=False)
    assert not abandonment.newest_first("often")


def test_the_newest_go_first_where_clients_leave_and_the_oldest_where_they_wait() -> None:
    queue: Admission[str] = Admission(10, 60.0)
    for _ in range(30):
        queue.abandonment.ended("leaving", in_vain=True)
    for tenant in ("leaving", "patient"):
        for n in range(3):
            queue.offer("tiny", f"{tenant}{n}", 0.0, (0, tenant, None))
    found = taken(queue, 6)
    assert [t for t in found if t[0] == "l"] == ["leaving2", "leaving1", "leaving0"]
    assert [t for t in found if t[0] == "p"] == ["patient0", "patient1", "patient2"]


def test_in_a_full_queue_whoever_has_most_places_gives_way_to_whoever_has_fewer() -> None:
    queue: Admission[str] = Admission(4, 60.0)
    for n in range(4):
        queue.offer("tiny", f"a{n}", 0.0, (0, "a", None))
    assert queue.offer("tiny", "b0", 1.0, (0, "b", None)) is None
    assert queue.give_way("tiny", "b", 1.0) == "a3"  # its turn would have been the last
    assert queue.offer("tiny", "b0", 1.0, (0, "b", None)) is not None
    assert queue.give_way("tiny", "b", 1.0) == "a2"
    queue.offer("tiny", "b1", 1.0, (0, "b", None))
    assert queue.give_way("tiny", "b", 1.0) is None and queue.give_way("tiny", "a", 1.0) is None


def test_in_a_full_queue_a_tenants_batch_gives_way_to_its_other_requests() -> None:
    queue: Admission[str] = Admission(5, 60.0)
    for n in range(2):
        queue.offer("tiny", f"a{n}", 0.0, (9, "a", None))
    for n in range(3):
        queue.offer("tiny", f"b{n}", 0.0, (9, "b", None))
    assert queue.give_way("tiny", "a", 1.0, 9) is None
    assert queue.give_way("tiny", "a", 1.0, 0) == "a1"  # b has as many places as a would have
    queue.offer("tiny", "a first", 1.0, (0, "a", None))
    assert queue.give_way("tiny", "b", 1.0, 9) is None
    assert queue.give_way("tiny", "b", 1.0, 0) == "b2"
    assert queue.give_way("tiny", "a", 1.0, 0) == "a0"
    assert queue.give_way("tiny", "a", 1.0, 0) is None


def test_in_a_full_queue_no_batch_takes_the_place_of_a_request_that_is_served_before_it() -> None:
    queue: Admission[str] = Admission(4, 60.0)
    for n in range(4):
        queue.offer("tiny", f"b{n}", 0.0, (0, "b", None))
    assert queue.give_way("tiny", "a", 1.0, 9) is None
    assert queue.give_way("tiny", "a", 1.0, 0) == "b3"
    queue.offer("tiny", "b batch", 0.0, (9, "b", None))
    assert queue.give_way("tiny", "a", 1.0, 9) == "b batch"
    for _ in range(30):
        queue.abandonment.ended("b", in_vain=True)
    assert queue.give_way("tiny", "b", 1.0, 9) is None
    assert queue.give_way("tiny", "b", 1.0, 0) == "b0"


def test_where_clients_leave_a_full_queue_takes_the_newest_in_place_of_the_oldest() -> None:
    queue: Admission[str] = Admission(2, 60.0)
    for _ in range(30):
        queue.abandonment.ended("a", in_vain=True)
    queue.offer("tiny", "old", 0.0, (0, "a", None))
    queue.offer("tiny", "new", 1.0, (0, "a", None))
    assert queue.give_way("tiny", "a", 1.0) == "old"


def test_a_tenant_waits_for_its_own_queue_and_for_the_shares_of_others() -> None:
    queue: Admission[str] = Admission(1000, 60.0)
    for _ in range(100):
        queue.offer("tiny", "a", 0.0, (0, "a", None))
    for _ in range(5):
        queue.offer("tiny", "b", 0.0, (0, "b", None))
    assert queue.ahead("tiny", "new", 1.0) == 0.0
    assert queue.ahead("tiny", "b", 1.0) == 10.0
    assert queue.ahead("tiny", "a", 1.0) == 105.0


def test_a_request_does_not_wait_for_what_goes_behind_it() -> None:
    """As the lines of batches do. What goes before all of the tenant's is waited for as it is."""
    queue: Admission[str] = Admission(1000, 60.0)
    for priority, tenant, number in ((9, "a", 100), (9, "b", 10), (5, "a", 3), (0, "b", 2)):
        for _ in range(number):
            queue.offer("tiny", tenant, 0.0, (priority, tenant, None))
    assert queue.ahead("tiny", "a", 1.0, 0) == 0.0
    assert queue.ahead("tiny", "b", 1.0, 0) == 2.0
    assert queue.ahead("tiny", "a", 1.0, 5) == 5.0
    assert queue.ahead("tiny", "a", 1.0, 9) == 115.0
    assert queue.ahead("tiny", "b", 1.0, 9) == 5.0 + 20.0
    assert len(taken(queue, 5)) == 5
    assert queue.ahead("tiny", "a", 1.0, 9) == 110.0
