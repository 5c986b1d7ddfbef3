"""Fair shares: whose request is next."""

from __future__ import annotations

from gateway.dispatch.queue.admission import MAX_NOT_YET, MAX_WITHOUT_SLOT, Admission, Flow
from gateway.dispatch.queue.fairness import ServiceCounters
from gateway.routing.policy import Blocked

QUANTUM = 4096.0
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
    queue.admit_waiting("tiny", lambda item: (asked.append(item), Blocked.TURN)[1])
    assert len(asked) == MAX_NOT_YET


def test_with_the_first_of_an_adapter_go_all_that_wait_for_it() -> None:
    queue: Admission[str] = Admission(1000, 60.0)
    for n in range(30):  # a0, a1, ... a9, a0, ...
        queue.offer("tiny", f"n{n % 10}", float(n), (0, "noisy", (f"a{n % 10}", "d")))
    queue.offer("tiny", "q", 40.0, QUIET)
    in_slot: set[str] = set()
    taken: list[str] = []

    def dispatch(item: str) -> Blocked | None:
        if item not in in_slot and len(in_slot) == 3:
            return Blocked.SLOT
        in_slot.add(item)
        taken.append(item)
        queue.charge("tiny", QUIET if item == "q" else (0, "noisy", ("", "d")), 100.0)
        return None

    queue.admit_waiting("tiny", dispatch)
    assert taken.index("q") <= 1, "the other tenant has been served less"
    assert [item for item in taken if item != "q"] == ["n0"] * 3 + ["n1"] * 3


def test_what_is_expected_of_a_flow_counts_for_its_turn_and_lifts_nobody() -> None:
    """Else one that asks for much and gets nothing would lift others beyond its reach."""
    counters = ServiceCounters()
    counters.enter("greedy")
    for _ in range(8):
        counters.expect("greedy", 100 * QUANTUM)
    counters.enter("honest")
    assert counters["honest"] == 0.0 and counters["greedy"] == 800 * QUANTUM
    for _ in range(8):
        counters.expect("greedy", -100 * QUANTUM)
        counters.charge("greedy", 10.0)
    assert counters["greedy"] == 80.0
    counters.leave("honest")
    counters.enter("honest")
    assert counters["honest"] <= counters["greedy"]
    counters.leave("greedy")
    counters.leave("honest")
