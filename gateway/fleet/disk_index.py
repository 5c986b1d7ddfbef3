"""Pure. Which adapters' files lie on which host's disk, as far as workers have told.

Heartbeats name what an engine holds. Its files are in the host's disk cache, for all workers of
that host and across their restarts, and stay there after the engine has dropped it, until the
disk's quota makes room. No heartbeat tells of that: a hint, and where it is out of date, files are
fetched again. (Whether an adapter is on any disk at all, for the list of adapters, is in usage.py,
by name.)
"""

from __future__ import annotations

from collections.abc import Iterable

MOST = 200_000
"""Of all hosts together: a hundred whose cache of 50 GiB is full of 26 MiB adapters."""


class DiskIndex:
    """Keys are those of gateway/fleet/worker_view.py. The longest unseen are forgotten beyond
    `most`. Hosts without a name have none.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        # (host, base, key), the longest unseen first
        self._seen: dict[tuple[str, str, tuple[str, str]], None] = {}

    def __len__(self) -> int:
        return len(self._seen)

    def put(self, host: str, base: str, keys: Iterable[tuple[str, str]]) -> None:
        """They are on the host's disk now."""
        for key in keys if host else ():
            mark = (host, base, key)
            self._seen.pop(mark, None)
            self._seen[mark] = None
        while len(self._seen) > self._most:
            del self._seen[next(iter(self._seen))]

    def has(self, host: str, base: str, key: tuple[str, str]) -> bool:
        return (host, base, key) in self._seen
