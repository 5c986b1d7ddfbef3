"""Admission: which requests are sent, wait, or are refused."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway.dispatch.queue.admission import Admission, QueueBound, Ticket
from gateway.routing.policy import Blocked
from shared.errors import Overloaded, RateLimited

TIMEOUT_S = 5.0


def test_items_leave_first_in_first_out() -> None:
    queue: Admission[str] = Admission(10, TIMEOUT_S)
    for item in "abc":
        queue.offer("tiny", item, 0.0)
    taken: list[str] = []
    queue.admit_waiting("tiny", taken.append)
    assert taken == ["a", "b", "c"] and len(queue) == 0 and queue.bases() == []


def test_the_pump_stops_at_the_first_item_that_is_declined_and_keeps_it_at_the_head() -> None:
    queue: Admission[str] = Admission(10, TIMEOUT_S)
    for item in "abc":
        queue.offer("tiny", item, 0.0)
    asked: list[str] = []

    def only_a(item: str) -> Blocked | None:
        asked.append(item)
        return None if item == "a" else Blocked.ROOM

    queue.admit_waiting("tiny", only_a)
    assert asked == ["a", "b"] and queue.depth("tiny") == 2
    queue.admit_waiting("tiny", only_a)
    assert asked == ["a", "b", "b"]


def test_base_models_queue_apart_but_share_the_bound() -> None:
    queue: Admission[str] = Admission(2, TIMEOUT_S)
    assert queue.offer("tiny", "a", 0.0) and queue.offer("big", "b", 0.0)
    assert queue.offer("tiny", "c", 0.0) is None
    taken: list[str] = []
    queue.admit_waiting("big", taken.append)
    assert taken == ["b"] and queue.depth("tiny") == 1 and queue.depth("big") == 0
    assert queue.offer("tiny", "c", 0.0) is not None


def test_a_queue_of_no_places_takes_nothing() -> None:
    queue: Admission[str] = Admission(0, TIMEOUT_S)
    assert queue.offer("tiny", "a", 0.0) is None and len(queue) == 0


def test_leaving_frees_the_place_once_and_no_more() -> None:
    queue: Admission[str] = Admission(1, TIMEOUT_S)
    ticket = queue.offer("tiny", "a", 0.0)
    assert ticket is not None
    queue.leave(ticket)
    queue.leave(ticket)
    assert len(queue) == 0
    other = queue.offer("tiny", "b", 0.0)
    assert other is not None
    queue.leave(ticket)
    assert queue.depth("tiny") == 1


def test_equal_items_have_places_of_their_own() -> None:
    queue: Admission[str] = Admission(3, TIMEOUT_S)
    first, second = queue.offer("tiny", "a", 0.0), queue.offer("tiny", "a", 0.0)
    assert first is not None and second is not None
    queue.leave(first)
    assert queue.depth("tiny") == 1


def test_an_item_is_late_exactly_when_its_time_is_over() -> None:
    queue: Admission[str] = Admission(10, TIMEOUT_S)
    queue.offer("tiny", "a", 0.0)
    queue.offer("tiny", "b", 1.0)
    queue.offer("big", "c", 0.5)
    assert queue.expire(TIMEOUT_S - 0.001) == []
    assert queue.expire(TIMEOUT_S) == ["a"]
    assert sorted(queue.expire(TIMEOUT_S + 1.0)) == ["b", "c"]
    assert queue.expire(100.0) == [] and len(queue) == 0 and queue.bases() == []


def test_an_item_that_leaves_while_the_queue_is_pumped_is_not_offered() -> None:
    queue: Admission[str] = Admission(10, TIMEOUT_S)
    places = [queue.offer("tiny", item, 0.0) for item in "abc"]
    offered: list[str] = []

    def dispatch(item: str) -> None:
        offered.append(item)
        if item == "a" and places[1] is not None:
            queue.leave(places[1])  # its client left while the link was busy with "a"

    queue.admit_waiting("tiny", dispatch)
    assert offered == ["a", "c"]


def test_a_pump_inside_a_pump_offers_no_item_twice() -> None:
    queue: Admission[str] = Admission(10, TIMEOUT_S)
    places = [ticket for item in "abc" if (ticket := queue.offer("tiny", item, 0.0))]
    taken: list[str] = []

    def dispatch(item: str) -> None:
        if item == "a" and "a" not in taken:
            taken.append("a")
            queue.leave(places[0])
            # giving "a" away freed a place, and whoever freed it pumps
            queue.admit_waiting("tiny", dispatch)
        elif item != "a":
            taken.append(item)

    queue.admit_waiting("tiny", dispatch)
    assert sorted(taken) == ["a", "b", "c"]
    assert len(queue) == 0


class AdmissionMachine(RuleBasedStateMachine):
    """Compares admission with two plain lists."""

    @initialize(size=st.integers(0, 5))
    def start(self, size: int) -> None:
        self.size = size
        self.queue: Admission[int] = Admission(size, TIMEOUT_S)
        self.model: dict[str, list[Ticket[int]]] = {"tiny": [], "big": []}
        self.gone: list[Ticket[int]] = []
        self.now = 0.0
        self.count = 0

    @rule(base=st.sampled_from(["tiny", "big"]))
    def offer(self, base: str) -> None:
        self.count += 1
        ticket = self.queue.offer(base, self.count, self.now)
        assert (ticket is not None) == (sum(map(len, self.model.values())) < self.size)
        if ticket is not None:
            self.model[base].append(ticket)

    @precondition(lambda self: any(self.model.values()))
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from([p for places in self.model.values() for p in places]))
        self.queue.leave(ticket)
        self.model[ticket.base].remove(ticket)
        self.gone.append(ticket)

    @precondition(lambda self: self.gone)
    @rule()
    def leave_again(self) -> None:
        self.queue.leave(self.gone[-1])

    @rule(base=st.sampled_from(["tiny", "big"]), room=st.integers(0, 3))
    def admit_waiting(self, base: str, room: int) -> None:
        taken: list[int] = []

        def dispatch(item: int) -> Blocked | None:
            if len(taken) == room:
                return Blocked.ROOM
            taken.append(item)
            return None

        self.queue.admit_waiting(base, dispatch)
        assert taken == [p.item for p in self.model[base][:room]]
        del self.model[base][:room]

    @rule(seconds=st.sampled_from([0.0, 1.0, 3.0]))
    def expire(self, seconds: float) -> None:
        self.now += seconds
        late = [p.item for places in self.model.values() for p in places if p.deadline <= self.now]
        assert sorted(self.queue.expire(self.now)) == sorted(late)
        for base, places in self.model.items():
            self.model[base] = [p for p in places if p.item not in late]

    @invariant()
    def counts_agree(self) -> None:
        if hasattr(self, "queue"):
            assert len(self.queue) == sum(map(len, self.model.values())) <= self.size
            assert {b: self.queue.depth(b) for b in self.model} == {
                b: len(p) for b, p in self.model.items()
            }
            assert set(self.queue.bases()) == {b for b, p in self.model.items() if p}


TestAdmissionMachine = AdmissionMachine.TestCase


# ---- the bound of one base model -----------------------------------------------------------------


def test_a_base_model_with_a_bound_of_its_own_is_full_before_the_gateway_is() -> None:
    queue: Admission[str] = Admission(
        3, 10.0, {"a": QueueBound(1), "b": QueueBound(-1), "c": QueueBound(0)}
    )
    assert queue.offer("a", "1", 0.0) and not queue.offer("a", "2", 0.0)
    assert queue.offer("b", "3", 0.0) and queue.offer("b", "4", 0.0)
    assert not queue.offer("b", "5", 0.0), "-1 leaves the gateway's own bound"
    assert not queue.offer("c", "6", 0.0), "0: nobody waits"


def test_a_place_that_is_left_is_free_for_the_next_of_its_base_model() -> None:
    queue: Admission[str] = Admission(3, 10.0, {"a": QueueBound(1)})
    ticket = queue.offer("a", "1", 0.0)
    assert ticket is not None
    queue.leave(ticket)
    assert queue.offer("a", "2", 0.0)


def test_the_refusal_is_what_the_config_says() -> None:
    guessed, told, at_once = (
        QueueBound().refusal(7.0),
        QueueBound(rate_limited=True, retry_after_s=3.0).refusal(7.0),
        QueueBound(retry_after_s=0.0).refusal(7.0),
    )
    assert (type(guessed), guessed.retry_after_s) == (Overloaded, 7.0)
    assert (type(told), told.retry_after_s) == (RateLimited, 3.0)
    assert at_once.retry_after_s == 0.0


def test_positions_count_by_priority_and_arrival_within_each_base_model() -> None:
    queue: Admission[str] = Admission(10, 10.0)
    for base, item, priority in (
        ("a", "late", 5),
        ("a", "first", 0),
        ("b", "other", 0),
        ("a", "second", 0),
    ):
        queue.offer(base, item, 0.0, (priority, "", None))
    assert queue.positions() == {"first": 1, "second": 2, "late": 3, "other": 1}


def test_who_waits_for_a_worker_that_starts_is_not_given_up() -> None:
    admission: Admission[str] = Admission(8, 1.0)
    admission.offer("asleep", "a", 0.0)
    admission.offer("busy", "b", 0.0)
    assert admission.expire(5.0, {"asleep"}) == ["b"]
    admission.offer("busy", "c", 5.5)
    # the worker serves: who could not be sent to it yet waits as long as anybody
    assert admission.expire(5.9) == [] and admission.items() == ["a", "c"]
    assert admission.expire(6.0) == ["a"] and admission.expire(6.5) == ["c"]
