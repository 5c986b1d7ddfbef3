"""Pure. Who waits for one base model, kept in the order of their turns, so that a change costs what
it changes and not what waits.

A turn is (priority, rank, number of the flow's oldest, flow): the lower priority number, then the
least served, then the oldest. Lists of turns are sorted; the numbers differ, so two turns are never
compared beyond them.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass, field
from typing import Generic, TypeAlias, TypeVar

from gateway.dispatch.queue.fairness import ServiceCounters
from gateway.fleet.worker_view import Key

T = TypeVar("T")

Flow: TypeAlias = tuple[int, str, Key | None]
"""(priority, tenant, adapter)."""
Turn: TypeAlias = tuple[int, int, int, Flow]
ANYBODY: Flow = (0, "", None)


@dataclass(slots=True, eq=False)
class Ticket(Generic[T]):
    """An item's place in the queue."""

    base: str
    item: T
    deadline: float
    flow: Flow = ANYBODY
    number: int = 0


@dataclass(slots=True)
class _Waiting(Generic[T]):
    """The places of one flow, oldest first."""

    turn: Turn
    # keeps order and lets any place leave at once
    tickets: dict[Ticket[T], None] = field(default_factory=dict)


class WaitQueue(Generic[T]):
    """The places of one base model, by flow, and the flows' turns."""

    def __init__(self) -> None:
        self.size = 0
        self._counters = ServiceCounters()
        self._flows: dict[Flow, _Waiting[T]] = {}
        self._turns: list[Turn] = []
        self._of_adapter: dict[Key | None, list[Turn]] = {}
        # one tenant's of one adapter, whatever the priority
        self._of_account: dict[tuple[str, Key | None], dict[Flow, None]] = {}

    def add(self, ticket: Ticket[T]) -> None:
        """The youngest."""
        flow = ticket.flow
        waiting = self._flows.get(flow)
        if waiting is None:
            account = flow[1:]
            flows = self._of_account.setdefault(account, {})
            if not flows:
                self._counters.enter(account)
            flows[flow] = None
            waiting = self._flows[flow] = _Waiting(
                (flow[0], self._counters.rank(account), ticket.number, flow)
            )
            self._enlist(waiting.turn)
        waiting.tickets[ticket] = None
        self.size += 1

    def remove(self, ticket: Ticket[T]) -> None:
        flow = ticket.flow
        waiting = self._flows[flow]
        del waiting.tickets[ticket]
        self.size -= 1
        if waiting.tickets:
            if ticket.number == waiting.turn[2]:
                self._settle(waiting)
            return
        self._strike(waiting.turn)
        del self._flows[flow]
        flows = self._of_account[flow[1:]]
        del flows[flow]
        if not flows:
            del self._of_account[flow[1:]]
            self._counters.leave(flow[1:])

    def charge(self, flow: Flow, tokens: float) -> None:
        """Its tenant was served so many weighted tokens of its adapter."""
        self._counters.charge(flow[1:], tokens)
        for other in self._of_account.get(flow[1:], ()):
            self._settle(self._flows[other])

    def next(self, after: Turn | None, adapter: Key | None = None) -> Turn | None:
        """The first turn after that one; with `adapter` the first of those who wait for it."""
        turns = self._turns if adapter is None else self._of_adapter.get(adapter, [])
        at = 0 if after is None else bisect_right(turns, after)
        return turns[at] if at < len(turns) else None

    def oldest(self, turn: Turn) -> Ticket[T]:
        return next(iter(self._flows[turn[-1]].tickets))

    def _settle(self, waiting: _Waiting[T]) -> None:
        """Its oldest or its rank is another one."""
        flow = waiting.turn[-1]
        turn = (flow[0], self._counters.rank(flow[1:]), next(iter(waiting.tickets)).number, flow)
        if turn != waiting.turn:
            self._strike(waiting.turn)
            waiting.turn = turn
            self._enlist(turn)

    def _enlist(self, turn: Turn) -> None:
        insort(self._turns, turn)
        insort(self._of_adapter.setdefault(turn[-1][2], []), turn)

    def _strike(self, turn: Turn) -> None:
        adapter = turn[-1][2]
        of_adapter = self._of_adapter[adapter]
        for turns in (self._turns, of_adapter):
            del turns[bisect_left(turns, turn)]
        if not of_adapter:
            del self._of_adapter[adapter]
