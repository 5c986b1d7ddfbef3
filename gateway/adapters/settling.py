"""Pure. Uploads in progress: a version that differs from the one that answers in some of its files
only may be half of an upload, a third adapter that nobody made.

A store shows files, not uploads. So a new version is taken at once if all its files are others than
before: the upload is whole. If some are the same, it is taken once it has been seen unchanged for
`settle_s`: a change of the config alone, or of the weights alone, comes that much later.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from shared.adapters.identity import StoredAdapter

MAX_PENDING = 10_000


@dataclass(frozen=True, slots=True)
class _Pending:
    version: StoredAdapter
    since: float


class Settling:
    """Of the adapters of one base model. Times are `time.monotonic()`."""

    def __init__(self, settle_s: float) -> None:
        self._settle_s = settle_s
        self._pending: dict[str, _Pending] = {}

    def look(self, before: StoredAdapter | None, seen: StoredAdapter, now: float) -> StoredAdapter:
        """The version to go by: the one that the store shows, or the one before for now."""
        if before is None or seen == before or not _share_a_file(before, seen):
            self._pending.pop(seen.name, None)
            return seen
        pending = self._pending.get(seen.name)
        if pending is None or pending.version != seen:
            if pending is None and len(self._pending) >= MAX_PENDING:
                return seen
            self._pending[seen.name] = pending = _Pending(seen, now)
        if now - pending.since < self._settle_s:
            return before
        del self._pending[seen.name]
        return seen

    def is_pending(self, name: str) -> bool:
        return name in self._pending

    def keep(self, names: Collection[str]) -> None:
        """Forgets the others: they are not in the store any more."""
        for name in [n for n in self._pending if n not in names]:
            del self._pending[name]


def _share_a_file(one: StoredAdapter, other: StoredAdapter) -> bool:
    return not set(one.files).isdisjoint(other.files)
