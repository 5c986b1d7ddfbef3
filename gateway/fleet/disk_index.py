"""Pure. Which adapters' files lie on which host's disk, as far as workers have reported.

A heartbeat names what an engine holds. The files are in the disk cache of the host, for all its
workers and across their restarts. They stay there after the engine has dropped the adapter, until
the disk quota evicts them. No heartbeat reports that eviction, so an entry is a hint: if it is out
of date, the worker fetches the files again. (adapters/usage.py knows by name whether an adapter is
on any disk at all, for the list of adapters.)
"""

from __future__ import annotations

from collections.abc import Iterable

from shared.adapters.identity import AdapterKey

MOST = 200_000
"""The bound for all hosts together: a hundred hosts, each with a cache of 50 GiB full of adapters
of 26 MiB.
"""


class DiskIndex:
    """Keys are those of `key_of`. Beyond `most` entries, those reported longest ago are forgotten.
    Hosts without a name have no entries.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        # (host, base, key), the longest unseen first
        self._seen: dict[tuple[str, str, AdapterKey], None] = {}

    def __len__(self) -> int:
        return len(self._seen)

    def put(self, host: str, base: str, keys: Iterable[AdapterKey]) -> None:
        """The adapters are on the host's disk now."""
        for key in keys if host else ():
            mark = (host, base, key)
            self._seen.pop(mark, None)
            self._seen[mark] = None
        while len(self._seen) > self._most:
            del self._seen[next(iter(self._seen))]

    def has(self, host: str, base: str, key: AdapterKey) -> bool:
        return (host, base, key) in self._seen

    def marks(self) -> list[tuple[str, str, AdapterKey]]:
        """(host, base, key) of each adapter."""
        return [*self._seen]
