"""Pure. The gateway's queue: requests that no worker takes now, bounded in number and in time, in
fair order between tenants and between one tenant's adapters (see wait_queue.py).

A tenant's oldest go first while its clients wait for their answers, else its newest (see
overload.py). Whoever waits for a slot does not hold up others that need none. In a full queue the
tenant with the most places gives way to one with fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from gateway.dispatch.queue.overload import Impatience
from gateway.dispatch.queue.wait_queue import ANYBODY, Flow, Ticket, Turn, WaitQueue
from gateway.routing.policy import Blocked
from shared.adapters.identity import AdapterKey
from shared.errors import Overloaded, RateLimited

__all__ = ["ANYBODY", "UNBOUND", "Admission", "Flow", "QueueBound", "Ticket"]

T = TypeVar("T")

MAX_WITHOUT_SLOT, MAX_NOT_YET = 8, 32
"""How many of one tenant's flows are tried in vain before it is the next tenant's turn. Flows
behind them have no better claim to a slot, and time spent here delays every request. MAX_NOT_YET is
larger: flows that only wait for their turn leave the slots of others alone.
"""
MAX_TENANTS_TRIED = 4
"""Tenants that were tried so, before all of this ends."""


@dataclass(frozen=True, slots=True)
class QueueBound:
    """What one base model's config says of its queue. `max_queued` -1: only the gateway's own bound
    holds. `retry_after_s` None: a guess.
    """

    max_queued: int = -1
    rate_limited: bool = False
    retry_after_s: float | None = None

    def refusal(self, guess_s: float) -> Overloaded:
        """The answer when the queue is full."""
        kind = RateLimited if self.rate_limited else Overloaded
        after_s = guess_s if self.retry_after_s is None else self.retry_after_s
        return kind("All workers are busy and the queue is full.", retry_after_s=after_s)


UNBOUND = QueueBound()


class Admission(Generic[T]):
    """Holds at most `max_queued` items, each for at most `timeout_s` seconds; of a base model in
    `bounds` at most as many as it says.

    Cancelled items leave at once and free their place.
    """

    def __init__(
        self, max_queued: int, timeout_s: float, bounds: Mapping[str, QueueBound] | None = None
    ) -> None:
        self._max_queued = max_queued
        self._bounds = dict(bounds or {})
        self.timeout_s = timeout_s
        self._queues: dict[str, WaitQueue[T]] = {}
        # all places; all wait equally long, so the order of arrival is that of the deadlines
        self._arrivals: dict[Ticket[T], None] = {}
        self._last_number = 0
        self.impatience = Impatience()

    def __len__(self) -> int:
        return len(self._arrivals)

    def depth(self, base: str) -> int:
        queue = self._queues.get(base)
        return queue.size if queue else 0

    def bound(self, base: str) -> QueueBound:
        return self._bounds.get(base, UNBOUND)

    def bases(self) -> list[str]:
        return list(self._queues)

    def offer(
        self,
        base: str,
        item: T,
        now: float,
        flow: Flow = ANYBODY,
        weight: float = 1.0,
        *,
        admitted: bool = False,
    ) -> Ticket[T] | None:
        """The item's place in the queue, or None if the queue is full. `admitted`: it was let in
        before, and a queue that is full does not turn it away.
        """
        queue = self._queues.get(base)
        most = self.bound(base).max_queued
        full = len(self._arrivals) >= self._max_queued or 0 <= most <= (queue.size if queue else 0)
        if full and not admitted:
            return None
        if queue is None:
            queue = self._queues[base] = WaitQueue()
        self._last_number += 1
        ticket = Ticket(base, item, now + self.timeout_s, flow, self._last_number, admitted)
        self._arrivals[ticket] = None
        queue.add(ticket, weight)
        return ticket

    def ahead(self, base: str, tenant: str, weight: float) -> float:
        """Items that are served before the tenant's next one, if all of them are alike."""
        queue = self._queues.get(base)
        return queue.ahead(tenant, weight) if queue is not None else 0.0

    def give_way(self, base: str, tenant: str, weight: float) -> T | None:
        """Where the queue is full: the item that leaves it for the tenant's next one.

        None: nobody has more places than the tenant, and its own are worth as much.
        """
        queue = self._queues.get(base)
        if queue is None:
            return None
        most, crowd = max(queue.crowds())
        newest_first = self.impatience.newest_first(crowd)
        if crowd != tenant and most <= (queue.waiting(tenant) + 1) / weight:
            return None
        if crowd == tenant and not newest_first:
            return None
        ticket = queue.last_of(crowd, newest_first=newest_first)
        if ticket is None:
            return None
        self.leave(ticket)
        return ticket.item

    def leave(self, ticket: Ticket[T]) -> None:
        """Idempotent."""
        if ticket not in self._arrivals:
            return
        del self._arrivals[ticket]
        queue = self._queues[ticket.base]
        queue.remove(ticket)
        if not queue.size:
            del self._queues[ticket.base]

    def charge(self, base: str, flow: Flow, tokens: float) -> None:
        """The flow was served so many weighted tokens (negative: fewer than charged before). Counts
        only while the base model has a queue.
        """
        queue = self._queues.get(base)
        if queue is not None:
            queue.charge(flow, tokens)

    def admit_waiting(
        self,
        base: str,
        dispatch: Callable[[T], Blocked | None],
        adapter: AdapterKey | None = None,
        reserved_for: Iterable[AdapterKey] = (),
    ) -> None:
        """Offers waiting items to `dispatch` in order. None: it took the item. SLOT or TURN: the
        next flow's turn. ROOM: that was all.

        Those who wait for `reserved_for` are tried first, whoever's turn it is: something is kept
        for them. Those who wait for `adapter` are tried as well if their turn has not come:
        something was freed that they alone can use.
        """
        queue = self._queues.get(base)
        if queue is None:
            return
        for heir in reserved_for:
            self._offer_all(queue, heir, dispatch)
        last = self._offer_in_turn(queue, dispatch)
        if adapter is not None and last is not Blocked.ROOM:
            self._offer_all(queue, adapter, dispatch)

    def items(self) -> list[T]:
        """All that wait, oldest first."""
        return [ticket.item for ticket in self._arrivals]

    def positions(self) -> dict[T, int]:
        """Where each stands in the queue of its base model, by priority and arrival: about its
        turn, for fairness between flows changes it.
        """
        ahead: dict[str, int] = {}
        found: dict[T, int] = {}
        for ticket in sorted(self._arrivals, key=lambda p: (p.flow[0], p.number)):
            ahead[ticket.base] = found[ticket.item] = ahead.get(ticket.base, 0) + 1
        return found

    def expire(self, now: float, held: Container[str] = ()) -> list[T]:
        """Removes and returns the items whose time is over, but for those of base models in `held`:
        for them a worker is on its way.
        """
        late: list[Ticket[T]] = []
        for ticket in self._arrivals:
            if ticket.deadline > now:
                break
            if ticket.base not in held:
                late.append(ticket)
        for ticket in late:
            self.leave(ticket)
        return [ticket.item for ticket in late]

    def _offer_in_turn(
        self, queue: WaitQueue[T], dispatch: Callable[[T], Blocked | None]
    ) -> Blocked | None:
        """ROOM: there is none left for anybody."""
        in_vain: dict[tuple[str, Blocked], int] = {}
        exhausted = 0
        tried: Turn | None = None  # what was tried in vain, up to here, is not tried again
        skip = False  # all else of its tenant neither
        while exhausted < MAX_TENANTS_TRIED:
            turn = queue.next_tenant(tried) if skip and tried is not None else queue.next(tried)
            if turn is None:
                break
            blocked = self._offer(queue, turn, dispatch)
            if blocked is Blocked.ROOM:
                return blocked
            if blocked is not None:
                tried, of = turn, (turn[1][2][1], blocked)
                count = in_vain[of] = in_vain.get(of, 0) + 1
                skip = count >= (MAX_WITHOUT_SLOT if blocked is Blocked.SLOT else MAX_NOT_YET)
                exhausted += skip
        return None

    def _offer_all(
        self, queue: WaitQueue[T], adapter: AdapterKey, dispatch: Callable[[T], Blocked | None]
    ) -> None:
        """Those who wait for the adapter, to the first that is not taken."""
        while (turn := queue.next(None, adapter)) is not None:
            if self._offer(queue, turn, dispatch) is not None:
                return

    def _offer(
        self, queue: WaitQueue[T], turn: Turn, dispatch: Callable[[T], Blocked | None]
    ) -> Blocked | None:
        newest = self.impatience.newest_first(turn[1][2][1])
        ticket = queue.newest(turn) if newest else queue.oldest(turn)
        blocked = dispatch(ticket.item)
        if blocked is None:
            self.leave(ticket)
        return blocked
