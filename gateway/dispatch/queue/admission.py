"""Pure. The gateway's queue of requests that no worker takes now. It is bounded in number and in
time. It is fair between tenants, and between one tenant's adapters (see wait_queue.py).

A tenant's oldest requests go first while its clients wait for their answers, else its newest (see
overload.py). A request that waits for a slot does not hold up others that need none. If the queue
is full, the tenant with the most places gives one to a tenant with fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from gateway.dispatch.queue.overload import AbandonmentRate
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
"""How many tenants are tried in vain before the search ends."""


@dataclass(frozen=True, slots=True)
class QueueBound:
    """The queue settings of one base model. `max_queued` -1: only the gateway's own bound holds.
    `retry_after_s` None: it is estimated.
    """

    max_queued: int = -1
    rate_limited: bool = False
    retry_after_s: float | None = None

    def refusal(self, guess_s: float) -> Overloaded:
        """The error for a request when the queue is full."""
        kind = RateLimited if self.rate_limited else Overloaded
        after_s = guess_s if self.retry_after_s is None else self.retry_after_s
        return kind("All workers are busy and the queue is full.", retry_after_s=after_s)


UNBOUND = QueueBound()


class Admission(Generic[T]):
    """Holds at most `max_queued` items, each for at most `timeout_s` seconds. A base model in
    `bounds` has a bound of its own as well. Cancelled items leave at once and free their place.
    """

    def __init__(
        self, max_queued: int, timeout_s: float, bounds: Mapping[str, QueueBound] | None = None
    ) -> None:
        self._max_queued = max_queued
        self._bounds = dict(bounds or {})
        self.timeout_s = timeout_s
        self.queues: dict[str, WaitQueue[T]] = {}
        """Of the base models for which an item waits. Others only look whether there is one."""
        # all places, in the order in which they came
        self._arrivals: dict[Ticket[T], None] = {}
        self._last_number = 0
        self._back_at: dict[str, float] = {}
        self.abandonment = AbandonmentRate()

    def configure(
        self, max_queued: int, timeout_s: float, bounds: Mapping[str, QueueBound]
    ) -> None:
        """Takes changed bounds. Items that wait already keep their time, and later ones do not end
        before them.
        """
        self._max_queued, self.timeout_s, self._bounds = max_queued, timeout_s, dict(bounds)

    def __len__(self) -> int:
        return len(self._arrivals)

    def depth(self, base: str) -> int:
        queue = self.queues.get(base)
        return queue.size if queue else 0

    def turned_away(self, base: str, back_at: float) -> None:
        """A client was refused while no worker served, and told to ask again at `back_at`."""
        self._back_at[base] = back_at

    def demand(self, base: str, now: float) -> int:
        """Items that wait for a worker. A client that was turned away counts as one until it is to
        ask again: if nobody may wait, it is all that tells that a worker is to be started.
        """
        return self.depth(base) + (self._back_at.get(base, now) > now)

    def bound(self, base: str) -> QueueBound:
        return self._bounds.get(base, UNBOUND)

    def bases(self) -> list[str]:
        return list(self.queues)

    def offer(
        self,
        base: str,
        item: T,
        now: float,
        flow: Flow = ANYBODY,
        weight: float = 1.0,
        *,
        admitted: bool = False,
        deadline: float | None = None,
    ) -> Ticket[T] | None:
        """The item's place in the queue, or None if the queue is full. An item that was `admitted`
        before is never turned away. `deadline`: of one that has waited before, which goes on.
        """
        queue = self.queues.get(base)
        most = self.bound(base).max_queued
        full = len(self._arrivals) >= self._max_queued or 0 <= most <= (queue.size if queue else 0)
        if full and not admitted:
            return None
        if queue is None:
            queue = self.queues[base] = WaitQueue()
        self._last_number += 1
        until = now + self.timeout_s if deadline is None else deadline
        ticket = Ticket(base, item, until, flow, self._last_number, admitted)
        self._arrivals[ticket] = None
        queue.add(ticket, weight)
        return ticket

    def ahead(self, base: str, tenant: str, weight: float, priority: int = 0) -> float:
        """How many items are served before the tenant's next one of this priority, if all of them
        are alike.
        """
        queue = self.queues.get(base)
        return queue.ahead(tenant, weight, priority) if queue is not None else 0.0

    def give_way(self, base: str, tenant: str, weight: float, priority: int = 0) -> T | None:
        """The item that leaves a full queue for the tenant's next one, which has this priority.
        None: no tenant has more places than this one, and its own items matter as much. Or all that
        might leave matters more.
        """
        queue = self.queues.get(base)
        if queue is None:
            return None
        most, largest = max(queue.waiting_per_weight())
        newest_first = self.abandonment.newest_first(largest)
        if largest == tenant or most <= (queue.waiting(tenant) + 1) / weight:
            own = queue.last_of(tenant, newest_first=self.abandonment.newest_first(tenant))
            if own is not None and own.flow[0] > priority:  # as the lines of its batches
                self.leave(own)
                return own.item
            if largest != tenant or not newest_first:
                return None
        ticket = queue.last_of(largest, newest_first=newest_first)
        if ticket is None or ticket.flow[0] < priority:  # it is served first, whoever waits here
            return None
        self.leave(ticket)
        return ticket.item

    def leave(self, ticket: Ticket[T]) -> None:
        """Removes the item. Without it, nothing happens."""
        if ticket not in self._arrivals:
            return
        del self._arrivals[ticket]
        queue = self.queues[ticket.base]
        queue.remove(ticket)
        if not queue.size:
            del self.queues[ticket.base]

    def expect(self, base: str, flow: Flow, tokens: float) -> None:
        """A request of the flow was sent that will likely take so many weighted tokens. The number
        is negative once it has ended. It counts only while the base model has a queue.
        """
        queue = self.queues.get(base)
        if queue is not None:
            queue.expect(flow, tokens)

    def charge(self, base: str, flow: Flow, tokens: float) -> None:
        """The flow was served so many weighted tokens. It counts only while the base model has a
        queue.
        """
        queue = self.queues.get(base)
        if queue is not None:
            queue.charge(flow, tokens)

    def admit_waiting(
        self,
        base: str,
        dispatch: Callable[[T], Blocked | None],
        adapter: AdapterKey | None = None,
    ) -> None:
        """Offers waiting items to `dispatch` in order. `dispatch` returns None if it took the item.
        SLOT or TURN: the next flow is tried. ROOM: nothing more can be taken.

        Items that wait for `adapter` are tried even if their turn has not come, since only they
        can use what has become free.
        """
        queue = self.queues.get(base)
        if queue is None:
            return
        last = self._offer_in_turn(queue, dispatch)
        if adapter is not None and last is not Blocked.ROOM:
            self._offer_all(queue, adapter, dispatch)

    def items(self) -> list[T]:
        """All waiting items, in the order in which they came."""
        return [ticket.item for ticket in self._arrivals]

    def positions(self) -> dict[T, int]:
        """Item -> its position in the queue of its base model, by priority and arrival. It is
        approximate, since fairness between flows changes the order.
        """
        ahead: dict[str, int] = {}
        found: dict[T, int] = {}
        for ticket in sorted(self._arrivals, key=lambda p: (p.flow[0], p.number)):
            ahead[ticket.base] = found[ticket.item] = ahead.get(ticket.base, 0) + 1
        return found

    def expire(self, now: float, held: Collection[str] = ()) -> list[T]:
        """Removes and returns the items whose time is over. For items of base models in `held` a
        worker is starting: their time begins once it serves.
        """
        waiting = [t for t in self._arrivals if t.base in held] if held else []
        for ticket in waiting:
            del self._arrivals[ticket]
            ticket.deadline = now + self.timeout_s
            self._arrivals[ticket] = None
        late = [ticket for ticket in self._arrivals if ticket.deadline <= now]
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
        taken: dict[str, Flow] = {}  # by tenant: the rest of the flow needs no other slot
        while exhausted < MAX_TENANTS_TRIED:
            turn = queue.next_tenant(tried) if skip and tried is not None else queue.next(tried)
            if turn is None:
                break
            tenant = turn[1][1][1]
            joining = queue.turn_of(taken[tenant]) if tenant in taken else None
            if joining is not None and joining[0] == turn[0]:
                turn = joining
            blocked = self._offer(queue, turn, dispatch)
            if blocked is Blocked.ROOM:
                return blocked
            taken.pop(tenant, None)
            if blocked is None:
                taken[tenant] = turn[1][1]
            if turn is joining:
                continue
            if blocked is not None:
                tried, of = turn, (turn[1][1][1], blocked)
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
        newest = self.abandonment.newest_first(turn[1][1][1])
        ticket = queue.newest(turn) if newest else queue.oldest(turn)
        blocked = dispatch(ticket.item)
        if blocked is None:
            self.leave(ticket)
        return blocked
