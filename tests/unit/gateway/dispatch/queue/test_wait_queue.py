"""The queue of waiting requests: turns of tenants, and of each tenant's adapters."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway.dispatch.queue.wait_queue import Flow, Ticket, Turn, WaitQueue

TOKENS = 4096.0
PRIORITIES, TENANTS, ADAPTERS = (0, 1), ("x", "y"), (None, ("a", "d"), ("b", "d"), ("c", "d"))


def order(line: WaitQueue[int], adapter: tuple[str, str] | None = None) -> list[Turn]:
    found: list[Turn] = []
    while (turn := line.next(found[-1] if found else None, adapter)) is not None:
        found.append(turn)
    return found


class LineMachine(RuleBasedStateMachine):
    """Compares the queue with turns that are made anew and sorted each time."""

    @initialize()
    def start(self) -> None:
        self.line: WaitQueue[int] = WaitQueue()
        self.places: list[Ticket[int]] = []
        self.served: defaultdict[str, float] = defaultdict(float)  # of tenants
        self.level = 0.0
        self.groups: dict[tuple[int, str], int] = {}
        self.count = self.groups_made = 0

    def waiting(self) -> set[str]:
        """The tenants that wait."""
        return {other.flow[1] for other in self.places}

    def enter(self, tenant: str) -> None:
        waiting = self.waiting()
        if tenant not in waiting:
            least = min((self.served[w] for w in waiting), default=0.0)
            self.served[tenant] = max(self.served[tenant], self.level, least)

    @rule(
        priority=st.sampled_from(PRIORITIES),
        tenant=st.sampled_from(TENANTS),
        adapter=st.sampled_from(ADAPTERS),
    )
    def add(self, priority: int, tenant: str, adapter: tuple[str, str] | None) -> None:
        self.count += 1
        ticket = Ticket("tiny", self.count, 0.0, (priority, tenant, adapter), self.count)
        self.enter(tenant)
        if (priority, tenant) not in self.groups:
            self.groups_made += 1
            self.groups[priority, tenant] = self.groups_made
        self.line.add(ticket)
        self.places.append(ticket)

    @precondition(lambda self: self.places)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.places))
        self.line.remove(ticket)
        self.places.remove(ticket)
        if all(other.flow[:2] != ticket.flow[:2] for other in self.places):
            del self.groups[ticket.flow[:2]]

    @rule(
        tenant=st.sampled_from(TENANTS),
        adapter=st.sampled_from(ADAPTERS),
        quanta=st.sampled_from([-3.0, 0.4, 0.7, 5.0]),
    )
    def charge(self, tenant: str, adapter: tuple[str, str] | None, quanta: float) -> None:
        waiting = self.waiting()
        if tenant in waiting:
            self.level += max(0.0, quanta * TOKENS) / len(waiting)
        self.served[tenant] = max(0.0, self.served[tenant] + quanta * TOKENS)
        self.line.charge((0, tenant, adapter), quanta * TOKENS)

    @invariant()
    def turns_are_those_of_a_fresh_sort(self) -> None:
        oldest: dict[Flow, Ticket[int]] = {}
        for ticket in self.places:
            oldest.setdefault(ticket.flow, ticket)
        fresh = sorted(
            (
                (f[0], self.served[f[1]], self.groups[f[:2]]),
                (p.number, f),
            )
            for f, p in oldest.items()
        )
        assert order(self.line) == fresh
        assert self.line.size == len(self.places)
        for adapter in ADAPTERS[1:]:
            assert order(self.line, adapter) == [turn for turn in fresh if turn[1][1][2] == adapter]
        assert [self.line.oldest(turn) for turn in fresh] == [oldest[turn[1][1]] for turn in fresh]
        for turn in fresh:
            after = self.line.next_tenant(turn)
            assert after == next((t for t in fresh if t[0] > turn[0]), None)
        for tenant in TENANTS:
            of_tenant = [p for p in self.places if p.flow[1] == tenant]
            assert self.line.waiting(tenant) == len(of_tenant)


TestLineMachine = LineMachine.TestCase
