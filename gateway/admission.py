"""Pure. The gateway's queue: requests that no worker has room for, bounded in number and in time, first in first out per base model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Place(Generic[T]):
    """An item's place in the queue."""

    base: str
    item: T
    deadline: float


class Admission(Generic[T]):
    """Holds at most `max_queued` items, each for at most `timeout_s` seconds. Cancelled items leave at once and free their place."""

    def __init__(self, max_queued: int, timeout_s: float) -> None:
        self._max_queued = max_queued
        self._timeout_s = timeout_s
        self._queues: dict[str, dict[Place[T], None]] = {}  # dicts keep order and let any place leave at once
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def depth(self, base: str) -> int:
        return len(self._queues.get(base, ()))

    def offer(self, base: str, item: T, now: float) -> Place[T] | None:
        """The item's place in the queue, or None if the queue is full."""
        if self._size >= self._max_queued:
            return None
        place = Place(base, item, now + self._timeout_s)
        self._queues.setdefault(base, {})[place] = None
        self._size += 1
        return place

    def leave(self, place: Place[T]) -> None:
        """Idempotent."""
        queue = self._queues.get(place.base, {})
        if place in queue:
            del queue[place]
            self._size -= 1
            if not queue:
                del self._queues[place.base]

    def pump(self, base: str, dispatch: Callable[[T], bool]) -> None:
        """Offers waiting items to `dispatch`, oldest first, until it declines one."""
        for place in list(self._queues.get(base, ())):
            if not dispatch(place.item):
                return
            self.leave(place)

    def expire(self, now: float) -> list[T]:
        """Removes and returns the items whose time is over. The queues are in order of deadline."""
        late: list[T] = []
        for queue in list(self._queues.values()):
            for place in list(queue):
                if place.deadline > now:
                    break
                self.leave(place)
                late.append(place.item)
        return late

    def bases(self) -> list[str]:
        return list(self._queues)
