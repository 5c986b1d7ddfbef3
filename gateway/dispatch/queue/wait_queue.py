"""Pure. The requests that wait for one base model, in the order of their turns. The cost of a
change depends on the change, not on the length of the queue.

Between tenants, the order is: the lower priority number, then the least served (weighted tokens),
then the one that began to wait first. So neither many adapters nor many requests get a tenant more
than its share. Within one tenant's requests of one priority the oldest goes first, adapter by
adapter. No order has a shorter longest wait.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeAlias, TypeVar

from gateway.dispatch.queue.fairness import ServiceCounters
from shared.adapters.identity import AdapterKey

T = TypeVar("T")

Flow: TypeAlias = tuple[int, str, AdapterKey | None]
"""(priority, tenant, adapter)."""
GroupTurn: TypeAlias = tuple[int, float, int]
"""(priority, served, number of the group): the turn of one tenant's requests of one priority."""
FlowTurn: TypeAlias = tuple[int, Flow]
"""(number of the flow's oldest, flow); numbers differ, so flows are never compared."""
Turn: TypeAlias = tuple[GroupTurn, FlowTurn]
ANYBODY: Flow = (0, "", None)


@dataclass(slots=True, eq=False)
class Ticket(Generic[T]):
    """An item's place in the queue. `kept`: it is never given to another tenant."""

    base: str
    item: T
    deadline: float
    flow: Flow = ANYBODY
    number: int = 0
    kept: bool = False


@dataclass(slots=True)
class _Waiting(Generic[T]):
    """The places of one flow, the oldest first."""

    turn: FlowTurn
    # keeps order and lets any place leave at once
    tickets: dict[Ticket[T], None] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Group:
    """One tenant's flows of one priority. `waiting` counts their places."""

    priority: int
    tenant: str
    turn: GroupTurn
    waiting: int = 0
    turns: list[FlowTurn] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Tenant:
    """`waiting` counts the tenant's places. `weight` is its share beside others."""

    waiting: int = 0
    weight: float = 1.0
    groups: dict[int, _Group] = field(default_factory=dict)  # by priority


class WaitQueue(Generic[T]):
    """The places of one base model by flow, and the turns of tenants and of their flows."""

    def __init__(self) -> None:
        self.size = 0
        self._served = ServiceCounters()
        self._tenants: dict[str, _Tenant] = {}
        self._flows: dict[Flow, _Waiting[T]] = {}
        self._groups: list[tuple[GroupTurn, _Group]] = []
        self._groups_made = 0
        self._of_adapter: dict[AdapterKey | None, dict[Flow, None]] = {}

    def waiting(self, tenant: str) -> int:
        """How many places the tenant has."""
        found = self._tenants.get(tenant)
        return found.waiting if found is not None else 0

    def waiting_per_weight(self) -> Iterator[tuple[float, str]]:
        """(places per weight, tenant) for each waiting tenant."""
        return ((t.waiting / t.weight, name) for name, t in self._tenants.items() if t.waiting)

    def ahead(self, tenant: str, weight: float, priority: int = 0) -> float:
        """How many places are served before the tenant's next one, if all of them are alike. Those
        with a larger priority number are not.
        """
        before = own = same = 0
        shares = weight
        for _, group in self._groups:
            if group.priority > priority:
                break
            if group.priority < priority:
                before += group.waiting
                continue
            same += group.waiting
            if group.tenant == tenant:
                own = group.waiting
            else:
                shares += self._tenants[group.tenant].weight
        return before + min(float(same), own * shares / weight)

    def add(self, ticket: Ticket[T], weight: float = 1.0) -> None:
        """Adds the youngest place, for a tenant with this weight."""
        flow = ticket.flow
        tenant = self._tenants.setdefault(flow[1], _Tenant())
        if not tenant.waiting:
            self._served.enter(flow[1])
        tenant.waiting += 1
        tenant.weight = weight
        waiting = self._flows.get(flow)
        if waiting is None:
            waiting = self._flows[flow] = _Waiting((ticket.number, flow))
            self._of_adapter.setdefault(flow[2], {})[flow] = None
            insort(self._group(tenant, flow).turns, waiting.turn)
        waiting.tickets[ticket] = None
        tenant.groups[flow[0]].waiting += 1
        self.size += 1

    def remove(self, ticket: Ticket[T]) -> None:
        flow = ticket.flow
        tenant, waiting = self._tenants[flow[1]], self._flows[flow]
        del waiting.tickets[ticket]
        self.size -= 1
        tenant.waiting -= 1
        tenant.groups[flow[0]].waiting -= 1
        if waiting.tickets:
            if ticket.number == waiting.turn[0]:
                self._settle(tenant, waiting)
            return
        self._drop_flow(tenant, flow, waiting)
        if not tenant.waiting:
            self._served.leave(flow[1])

    def expect(self, flow: Flow, tokens: float) -> None:
        """A request was sent that will likely take so many weighted tokens. The number is negative
        once it has ended.
        """
        tenant = self._tenants.setdefault(flow[1], _Tenant())
        self._served.expect(flow[1], tokens / tenant.weight)
        self._settle_groups(tenant)

    def charge(self, flow: Flow, tokens: float) -> None:
        """The tenant was served so many weighted tokens."""
        tenant = self._tenants.setdefault(flow[1], _Tenant())
        self._served.charge(flow[1], tokens / tenant.weight)
        self._settle_groups(tenant)

    def next(self, after: Turn | None, adapter: AdapterKey | None = None) -> Turn | None:
        """The first turn after this one. With `adapter`, the first one that waits for it."""
        if adapter is not None:
            return self._next_of_adapter(after, adapter)
        groups, at = self._groups, 0
        if after is not None:
            at = bisect_left(groups, after[0], key=_turn_of)
            if at < len(groups) and groups[at][0] == after[0]:
                turns = groups[at][1].turns
                within = bisect_right(turns, after[1])
                if within < len(turns):
                    return after[0], turns[within]
                at += 1
        return (groups[at][0], groups[at][1].turns[0]) if at < len(groups) else None

    def turn_of(self, flow: Flow) -> Turn | None:
        """None if nothing of the flow waits."""
        waiting = self._flows.get(flow)
        if waiting is None:
            return None
        return self._tenants[flow[1]].groups[flow[0]].turn, waiting.turn

    def next_tenant(self, after: Turn) -> Turn | None:
        """The first turn of the next group, which is another tenant, or the same one at another
        priority.
        """
        at = bisect_right(self._groups, after[0], key=_turn_of)
        if at == len(self._groups):
            return None
        turn, group = self._groups[at]
        return turn, group.turns[0]

    def oldest(self, turn: Turn) -> Ticket[T]:
        return next(iter(self._flows[turn[1][1]].tickets))

    def newest(self, turn: Turn) -> Ticket[T]:
        return next(reversed(self._flows[turn[1][1]].tickets))

    def last_of(self, tenant: str, *, newest_first: bool) -> Ticket[T] | None:
        """The waiting place that the tenant will miss least: of its largest priority number, the
        one with the last turn. None: it has none that can be given away.
        """
        if not self.waiting(tenant):
            return None
        groups = self._tenants[tenant].groups
        flows = [self._flows[turn[1]].tickets for turn in groups[max(groups)].turns]
        ends = [next(iter(f)) if newest_first else next(reversed(f)) for f in flows]
        found = [ticket for ticket in ends if not ticket.kept]
        return (min if newest_first else max)(found, key=_number, default=None)

    # ---- inside ----------------------------------------------------------------------------------

    def _next_of_adapter(self, after: Turn | None, adapter: AdapterKey) -> Turn | None:
        turns = [
            (self._tenants[flow[1]].groups[flow[0]].turn, self._flows[flow].turn)
            for flow in self._of_adapter.get(adapter, ())
        ]
        return min((t for t in turns if after is None or t > after), default=None)

    def _group(self, tenant: _Tenant, flow: Flow) -> _Group:
        group = tenant.groups.get(flow[0])
        if group is None:
            self._groups_made += 1
            turn = (flow[0], self._served[flow[1]], self._groups_made)
            group = tenant.groups[flow[0]] = _Group(flow[0], flow[1], turn)
            insort(self._groups, (turn, group), key=_turn_of)
        return group

    def _drop_flow(self, tenant: _Tenant, flow: Flow, waiting: _Waiting[T]) -> None:
        group = tenant.groups[flow[0]]
        del group.turns[bisect_left(group.turns, waiting.turn)]
        if not group.turns:
            del tenant.groups[flow[0]]
            self._strike(group)
        del self._flows[flow]
        of_adapter = self._of_adapter[flow[2]]
        del of_adapter[flow]
        if not of_adapter:
            del self._of_adapter[flow[2]]

    def _settle(self, tenant: _Tenant, waiting: _Waiting[T]) -> None:
        """Its oldest is another one."""
        flow = waiting.turn[1]
        turns = tenant.groups[flow[0]].turns
        del turns[bisect_left(turns, waiting.turn)]
        waiting.turn = (next(iter(waiting.tickets)).number, flow)
        insort(turns, waiting.turn)

    def _settle_groups(self, tenant: _Tenant) -> None:
        """Called when the tokens that a tenant was served have changed."""
        for group in tenant.groups.values():
            self._strike(group)
            group.turn = (group.priority, self._served[group.tenant], group.turn[2])
            insort(self._groups, (group.turn, group), key=_turn_of)

    def _strike(self, group: _Group) -> None:
        del self._groups[bisect_left(self._groups, group.turn, key=_turn_of)]


def _turn_of(entry: tuple[GroupTurn, _Group]) -> GroupTurn:
    return entry[0]


def _number(ticket: Ticket[T]) -> int:
    return ticket.number
