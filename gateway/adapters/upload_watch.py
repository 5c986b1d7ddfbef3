"""Pure. Recognises uploads that are still in progress. A store shows files and not uploads. So a
new version that shares some files with the old one may be half an upload: a mixture that nobody
made.

A new version is taken at once if none of its files is the same as before, since the upload is then
complete. Otherwise it is taken once it has not changed for `settle_s`. So a change of the config
alone, or of the weights alone, takes effect that much later. The same holds for an adapter that was
gone in between, or had no weights: some uploaders delete one file first and write it anew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass

from shared.adapters.identity import StoredAdapter, has_all_weights

MAX_PENDING = 10_000


@dataclass(frozen=True, slots=True)
class _Pending:
    version: StoredAdapter
    since: float


class UploadWatch:
    """Watches the adapters of one base model. Times are `time.monotonic()`."""

    def __init__(self, settle_s: float) -> None:
        self._settle_s = settle_s
        self._pending: dict[str, _Pending] = {}
        self._gone: OrderedDict[str, StoredAdapter] = OrderedDict()  # the longest gone first

    def look(self, before: StoredAdapter | None, seen: StoredAdapter, now: float) -> StoredAdapter:
        """The version to use now: the one that the store shows, or for the moment the one
        before.
        """
        if before is None or seen == before or not _share_a_file(before, seen):
            self._take(seen)
            return seen
        pending = self._pending.get(seen.name)
        if pending is None or pending.version != seen:
            if pending is None and len(self._pending) >= MAX_PENDING:
                return seen
            self._pending[seen.name] = pending = _Pending(seen, now)
        if now - pending.since < self._settle_s:
            return before
        self._take(seen)
        if not is_whole(seen):
            self.gone(before)
        return seen

    def is_pending(self, name: str) -> bool:
        """Whether a new version of this adapter waits until its upload is complete."""
        return name in self._pending

    def gone(self, version: StoredAdapter) -> None:
        """The store does not show all of the adapter any more. This is its last version."""
        self._gone[version.name] = version
        self._gone.move_to_end(version.name)
        if len(self._gone) > MAX_PENDING:
            self._gone.popitem(last=False)

    def last(self, name: str) -> StoredAdapter | None:
        """The version that an adapter had before it was gone."""
        return self._gone.get(name)

    def keep(self, names: Collection[str]) -> None:
        """Forgets all other adapters, which the store no longer has."""
        for name in [n for n in self._pending if n not in names]:
            del self._pending[name]

    def _take(self, seen: StoredAdapter) -> None:
        self._pending.pop(seen.name, None)
        if seen.name in self._gone and is_whole(seen):
            del self._gone[seen.name]


def is_whole(version: StoredAdapter) -> bool:
    """Whether the store shows weights, and all files of them."""
    return has_all_weights([file.path for file in version.files])


def _share_a_file(one: StoredAdapter, other: StoredAdapter) -> bool:
    return not set(one.files).isdisjoint(other.files)
