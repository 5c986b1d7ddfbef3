from __future__ import annotations

from collections import defaultdict

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway.dispatch.queue.fairness import QUANTUM
from gateway.dispatch.queue.wait_queue import Flow, Ticket, Turn, WaitQueue

PRIORITIES, TENANTS, ADAPTERS = (0, 1), ("x", "y"), (None, ("a", "d"), ("b", "d"), ("c", "d"))


def order(line: WaitQueue[int], adapter: tuple[str, str] | None = None) -> list[Turn]:
    found: list[Turn] = []
    while (turn := line.next(found[-1] if found else None, adapter)) is not None:
        found.append(turn)
    return found


class LineMachine(RuleBasedStateMachine):
    """Against turns that are made anew and sorted each time."""

    @initialize()
    def start(self) -> None:
        self.line: WaitQueue[int] = WaitQueue()
        self.places: list[Ticket[int]] = []
        self.served: defaultdict[tuple[object, ...], float] = defaultdict(float)
        self.count, self.level = 0, 0.0

    @rule(
        priority=st.sampled_from(PRIORITIES),
        tenant=st.sampled_from(TENANTS),
        adapter=st.sampled_from(ADAPTERS),
    )
    def add(self, priority: int, tenant: str, adapter: tuple[str, str] | None) -> None:
        self.count += 1
        ticket = Ticket("tiny", self.count, 0.0, (priority, tenant, adapter), self.count)
        waiting = {other.flow[1:] for other in self.places}
        if ticket.flow[1:] not in waiting:
            least = min((self.served[w] for w in waiting), default=0.0)
            self.served[ticket.flow[1:]] = max(self.served[ticket.flow[1:]], self.level, least)
        self.line.add(ticket)
        self.places.append(ticket)

    @precondition(lambda self: self.places)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.places))
        self.line.remove(ticket)
        self.places.remove(ticket)

    @rule(
        tenant=st.sampled_from(TENANTS),
        adapter=st.sampled_from(ADAPTERS),
        quanta=st.sampled_from([-3.0, 0.4, 0.7, 5.0]),
    )
    def charge(self, tenant: str, adapter: tuple[str, str] | None, quanta: float) -> None:
        flow: Flow = (0, tenant, adapter)
        waiting = {other.flow[1:] for other in self.places}
        if flow[1:] in waiting:
            self.level += max(0.0, quanta * QUANTUM) / len(waiting)
        self.line.charge(flow, quanta * QUANTUM)
        self.served[flow[1:]] = max(0.0, self.served[flow[1:]] + quanta * QUANTUM)

    @invariant()
    def turns_are_those_of_a_fresh_sort(self) -> None:
        oldest: dict[Flow, Ticket[int]] = {}
        for ticket in self.places:
            oldest.setdefault(ticket.flow, ticket)
        fresh = sorted(
            ((f[0], int(self.served[f[1:]] // QUANTUM), p.number, f) for f, p in oldest.items()),
            key=lambda turn: turn[:3],
        )
        assert order(self.line) == fresh
        assert self.line.size == len(self.places)
        for adapter in ADAPTERS[1:]:
            assert order(self.line, adapter) == [turn for turn in fresh if turn[-1][2] == adapter]
        assert [self.line.oldest(turn) for turn in fresh] == [oldest[turn[-1]] for turn in fresh]


TestLineMachine = LineMachine.TestCase
