from __future__ import annotations

from gateway.dispatch.queue.admission import MAX_NOT_YET, MAX_WITHOUT_SLOT, Admission, Flow
from gateway.dispatch.queue.fairness import QUANTUM, ServiceCounters
from gateway.routing.policy import Blocked

NOISY: Flow = (0, "noisy", ("a", "d"))
QUIET: Flow = (0, "quiet", ("b", "d"))


def served(queue: Admission[str], count: int, cost: float) -> list[str]:
    """What the next `count` places go to, each charged `cost` to the flow that the item's first
    letter names.
    """
    taken: list[str] = []

    def dispatch(item: str) -> Blocked | None:
        if len(taken) == count:
            return Blocked.ROOM
        taken.append(item)
        queue.charge("tiny", NOISY if item[0] == "n" else QUIET, cost)
        return None

    queue.admit_waiting("tiny", dispatch)
    return taken


def test_a_noisy_tenant_that_came_first_does_not_keep_a_quiet_one_waiting() -> None:
    queue: Admission[str] = Admission(1000, 60.0)
    for n in range(200):
        queue.offer("tiny", f"n{n}", 0.0, NOISY)
    for n in range(5):
        queue.offer("tiny", f"q{n}", 1.0, QUIET)
    taken = served(queue, 20, 1.0)
    assert taken[:4] == ["n0", "q0", "n1", "q1"]
    assert [t for t in taken if t[0] == "q"] == [f"q{n}" for n in range(5)]


def test_neither_requests_nor_adapters_nor_priorities_of_its_own_get_a_tenant_more() -> None:
    queue: Admission[str] = Admission(1000, 60.0)
    for n in range(300):
        queue.offer("tiny", "n", 0.0, (0, "noisy", (f"a{n % 50}", "d")))
    for _ in range(100):
        queue.offer("tiny", "q", 1.0, QUIET)
    taken = served(queue, 100, 1.0)
    assert taken.count("q") == 50


def test_service_is_divided_by_weight() -> None:
    queue: Admission[str] = Admission(1000, 60.0)
    for _ in range(200):
        queue.offer("tiny", "n", 0.0, NOISY)
        queue.offer("tiny", "q", 0.0, QUIET, 3.0)
    taken = served(queue, 100, 1.0)
    assert abs(taken.count("q") - 75) <= 1


def test_a_tenant_whose_flows_wait_for_slots_does_not_hold_up_the_next_one() -> None:
    queue: Admission[str] = Admission(1000, 60.0)
    for n in range(100):
        queue.offer("tiny", "n", 0.0, (0, "noisy", (f"a{n}", "d")))
    queue.offer("tiny", "q", 1.0, QUIET)
    asked: list[str] = []

    def dispatch(item: str) -> Blocked | None:
        asked.append(item)
        return Blocked.SLOT if item == "n" else None

    queue.admit_waiting("tiny", dispatch)
    assert asked.count("n") <= 2 * MAX_WITHOUT_SLOT and asked.count("q") == 1


def test_backlogged_flows_get_equal_service_within_a_quantum() -> None:
    queue: Admission[str] = Admission(1000, 60.0)
    for n in range(100):
        queue.offer("tiny", f"n{n}", 0.0, NOISY)
        queue.offer("tiny", f"q{n}", 0.0, QUIET)
    taken = served(queue, 100, QUANTUM / 3)
    assert abs([t[0] for t in taken].count("n") - 50) <= 3


def test_a_flow_that_comes_back_has_no_credit_from_its_absence() -> None:
    counters = ServiceCounters()
    counters.enter("a")
    counters.charge("a", 10 * QUANTUM)
    counters.enter("b")
    assert counters["b"] == 10 * QUANTUM
    counters.charge("b", QUANTUM)
    counters.leave("a")
    counters.enter("a")
    assert counters["a"] == 11 * QUANTUM


def test_flows_that_come_once_do_not_pass_for_ever_by_one_that_has_had_its_fair_share() -> None:
    queue: Admission[str] = Admission(1000, 60.0)
    mid: Flow = (0, "", ("mid", "d"))
    queue.offer("tiny", "mid", 0.0, mid)
    for n in range(10):
        queue.offer("tiny", f"old{n}", 0.0, (0, "", (f"old{n}", "d")))
    queue.charge("tiny", mid, 3 * QUANTUM)
    taken: list[str] = []

    def dispatch(item: str) -> Blocked | None:
        if taken and taken[-1] == f"round {turn}":
            return Blocked.ROOM
        taken.extend((item, f"round {turn}"))
        queue.charge("tiny", (0, "", (item, "d")), QUANTUM)
        return None

    for turn in range(60):  # each time one more comes and one is served
        queue.offer("tiny", f"new{turn}", 1.0, (0, "", (f"new{turn}", "d")))
        queue.admit_waiting("tiny", dispatch)
    # after those who had had nothing, before the newest
    assert "mid" in taken and taken.index("mid") > 2 * 10


def test_a_correction_never_makes_a_counter_negative() -> None:
    counters = ServiceCounters()
    counters.charge("a", 5.0)
    counters.charge("a", -50.0)
    assert counters["a"] == 0.0


def test_a_lower_priority_number_goes_first_whatever_was_served() -> None:
    queue: Admission[str] = Admission(10, 60.0)
    urgent: Flow = (-1, "noisy", ("a", "d"))
    queue.offer("tiny", "q", 0.0, QUIET)
    queue.offer("tiny", "n", 1.0, urgent)
    queue.charge("tiny", urgent, 100 * QUANTUM)
    assert served(queue, 2, 0.0) == ["n", "q"]


def test_counters_are_forgotten_with_the_queue() -> None:
    queue: Admission[str] = Admission(10, 60.0)
    queue.offer("tiny", "n", 0.0, NOISY)
    queue.charge("tiny", NOISY, 100 * QUANTUM)
    assert served(queue, 1, 0.0) == ["n"]
    queue.offer("tiny", "n", 1.0, NOISY)
    queue.offer("tiny", "q", 2.0, QUIET)
    assert served(queue, 2, 0.0) == ["n", "q"]


def test_a_flow_without_a_slot_holds_up_nobody_who_needs_none() -> None:
    queue: Admission[str] = Admission(10, 60.0)
    queue.offer("tiny", "n", 0.0, NOISY)
    queue.offer("tiny", "q", 1.0, QUIET)
    taken: list[str] = []

    def dispatch(item: str) -> Blocked | None:
        if item == "n":
            return Blocked.SLOT
        taken.append(item)
        return None

    queue.admit_waiting("tiny", dispatch)
    assert taken == ["q"] and queue.depth("tiny") == 1


def test_a_pump_gives_up_after_some_flows_but_tries_those_of_the_adapter_that_was_freed() -> None:
    queue: Admission[str] = Admission(1000, 60.0)
    for n in range(100):
        queue.offer("tiny", f"a{n}", 0.0, (0, "", (f"a{n}", "d")))
    asked: list[str] = []

    def dispatch(item: str) -> Blocked | None:
        asked.append(item)
        return None if item == "a90" else Blocked.SLOT

    queue.admit_waiting("tiny", dispatch, ("a90", "d"))
    assert len(asked) == MAX_WITHOUT_SLOT + 1 and queue.depth("tiny") == 99
    asked.clear()
    queue.admit_waiting("tiny", lambda item: asked.append(item) or Blocked.TURN)  # type: ignore[func-returns-value]
    assert len(asked) == MAX_NOT_YET


def test_those_for_whom_something_is_kept_are_asked_before_the_first_in_turn() -> None:
    queue: Admission[str] = Admission(1000, 60.0)
    for n in range(100):
        queue.offer("tiny", f"a{n}", 0.0, (0, "", (f"a{n % 50}", "d")))
    asked: list[str] = []

    def dispatch(item: str) -> Blocked | None:
        asked.append(item)
        return None if item in ("a40", "a90") else Blocked.SLOT

    queue.admit_waiting("tiny", dispatch, reserved_for=[("a40", "d"), ("gone", "d")])
    assert (
        asked[:2] == ["a40", "a90"]
        and len(asked) == 2 + MAX_WITHOUT_SLOT
        and queue.depth("tiny") == 98
    )
