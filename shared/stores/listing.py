"""Pure. Groups a store's keys into adapters. An adapter is a folder with an
`adapter_config.json`.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import msgspec

from shared.adapters.identity import (
    CONFIG_FILE,
    StoredAdapter,
    StoredFile,
    adapter_parts,
    may_be_part,
    name_problem,
)

DIGEST_HEX_CHARS = 16
# the config, an index and the shards of the weights
MAX_FILES_PER_ADAPTER = 256
# the limit of S3 and GCS for a key
MAX_KEY_CHARS = 1024
MAX_SHOWN = 100  # skipped folders that are listed one by one


class Entry(NamedTuple):
    """One object of a store. `key` is relative to the store's root, with `/` and no leading `/`."""

    key: str
    size_bytes: int
    version: str


class SkipReason(Enum):
    """Why a listing leaves out a folder that could be an adapter."""

    NAME = "name"
    LINK = "link_out"
    LOOP = "loop"
    UNREADABLE = "unreadable"
    TOO_MANY_FILES = "too_many_files"


_WORDS = {
    SkipReason.LINK: "its symbolic link leads out of the store",
    SkipReason.LOOP: "its folders lead back to themselves, or are too deep",
    SkipReason.UNREADABLE: "it cannot be read: check its permissions",
    SkipReason.TOO_MANY_FILES: f"it has more than {MAX_FILES_PER_ADAPTER} files",
}


_CLOSED = (SkipReason.LINK, SkipReason.LOOP, SkipReason.UNREADABLE)


class SkippedFolder(msgspec.Struct, frozen=True):
    """`key` is where the folder lies below the store's root, printable. `why` is a sentence for
    people.
    """

    key: str
    reason: SkipReason
    why: str

    def hides(self, path: str) -> bool:
        """Whether the folder with this path lies below, where nobody has looked."""
        return self.reason in _CLOSED and path.startswith(self.key + "/")


class Skipped(msgspec.Struct, frozen=True):
    """What a listing left out: how many folders for which reason, and the first MAX_SHOWN
    of them.
    """

    counts: tuple[tuple[SkipReason, int], ...] = ()
    shown: tuple[SkippedFolder, ...] = ()

    @property
    def total(self) -> int:
        return sum(count for _, count in self.counts)

    def why(self, key: str) -> str:
        """Why this folder was skipped, alone or with one above it. "" if it was not, or if the
        reason is not among those shown.
        """
        path = printable(key)
        return next((s.why for s in self.shown if s.key == path or s.hides(path)), "")


def join_skipped(parts: Iterable[Skipped]) -> Skipped:
    counts: Counter[SkipReason] = Counter()
    shown: list[SkippedFolder] = []
    for part in parts:
        counts.update(dict(part.counts))
        shown += part.shown[: MAX_SHOWN - len(shown)]
    return Skipped(tuple(counts.items()), tuple(shown))


def printable(key: str) -> str:
    """The key, safe for a log. Anybody may have written it."""
    short = key[:MAX_KEY_CHARS]
    return short if short.isprintable() else ascii(short)[1:-1]


class OutOfOrder(ValueError):
    """The keys did not come in ascending order."""


def valid_path(path: str) -> bool:
    """Whether each part of a relative path may be a part of an adapter's name."""
    folder, _, file = path.rpartition("/")
    return not (name_problem(file) or (folder and name_problem(folder)))


def valid_name(name: str) -> bool:
    """Whether an adapter may have this name. A client's string that passes is safe below
    any root.
    """
    return not name_problem(name)


def digest_of(name: str, files: Iterable[StoredFile]) -> str:
    """16 hex characters over the sorted (path, size, version) of all files. The paths begin at the
    store's root.

    Two adapters of one family often have the same file names and sizes. If a build sets all times
    to one value, they even have the same versions. Paths from the root keep their digests
    different.
    """
    rows = sorted((f"{name}/{f.path}", f.size_bytes, f.version) for f in files)
    return hashlib.sha256(msgspec.json.encode(rows)).hexdigest()[:DIGEST_HEX_CHARS]


@dataclass(slots=True)
class _Folder:
    """A folder whose keys are still arriving. `files` are those that may belong to an adapter."""

    path: str
    is_adapter: bool = False
    files: list[Entry] = field(default_factory=list)

    def hold(self, entry: Entry) -> None:
        """Keeps the entry, up to one more than an adapter may have. That distinguishes "full" from
        "too many" and bounds the memory.
        """
        if len(self.files) <= MAX_FILES_PER_ADAPTER:
            self.files.append(entry)


class Grouping:
    """Turns entries in ascending order of their keys, as stores list them, into adapters. Each
    adapter comes out as soon as its folder has ended.

    Buckets list in the order of characters. Azure accounts with a hierarchical namespace (Data Lake
    Gen2) list each folder before its neighbours (`a/x`, then `a-b/x`). In both orders no folder is
    listed in two pieces.

    Only the adapter's own files, directly in its folder, count. Anything else there or below is
    ignored. Only the folders on the way to the current key are kept, each with at most
    MAX_FILES_PER_ADAPTER + 1 entries. So memory depends on the depth and not on the size of the
    bucket. `skipped` counts what was left out.
    """

    def __init__(self) -> None:
        self._open = [_Folder("")]
        self._last_key = self._last_by_folders = ""
        self._by_characters = self._by_folders = True
        self._counts: Counter[SkipReason] = Counter()
        self._shown: list[SkippedFolder] = []

    @property
    def skipped(self) -> Skipped:
        return Skipped(tuple(self._counts.items()), tuple(self._shown))

    def add(self, entry: Entry) -> list[StoredAdapter]:
        """The adapters that this entry shows to be complete.

        Raises:
            OutOfOrder: the keys so far are in neither order.
        """
        self._check_order(entry.key)
        path, _, file_name = entry.key.rpartition("/")
        if not may_be_part(file_name):
            return []
        if problem := path and name_problem(path):
            if file_name == CONFIG_FILE:
                self.skip(path, SkipReason.NAME, problem)
            return []
        complete = self._leave(path)
        self._enter(path)
        self._open[-1].hold(entry)
        if file_name == CONFIG_FILE:
            self._open[-1].is_adapter = True
        return complete

    def _check_order(self, key: str) -> None:
        by_folders = key.replace("/", "\0")  # sorts before every other character
        self._by_characters = self._by_characters and key >= self._last_key
        self._by_folders = self._by_folders and by_folders >= self._last_by_folders
        self._last_key, self._last_by_folders = key, by_folders
        if not (self._by_characters or self._by_folders):
            raise OutOfOrder("the store's keys are not in ascending order")

    def skip(self, key: str, reason: SkipReason, why: str = "") -> None:
        """Counts a folder that its store cannot show."""
        self._counts[reason] += 1
        if len(self._shown) < MAX_SHOWN:
            why = f"of its name: {why}" if reason is SkipReason.NAME else _WORDS[reason]
            self._shown.append(SkippedFolder(printable(key), reason, why))

    def finish(self) -> list[StoredAdapter]:
        """The adapters that were still open at the end of the listing."""
        return self._leave(None)

    def _enter(self, path: str) -> None:
        start = len(self._open[-1].path)
        while len(self._open[-1].path) < len(path):
            end = path.find("/", start + 1)
            start = len(path) if end < 0 else end
            self._open.append(_Folder(path[:start]))

    def _leave(self, path: str | None) -> list[StoredAdapter]:
        """Closes the open folders that are not on the way to `path`. None closes all but the root,
        which has no name and is no adapter.
        """
        complete: list[StoredAdapter] = []
        while len(self._open) > 1:
            folder = self._open[-1]
            if path is not None and (path == folder.path or path.startswith(folder.path + "/")):
                break
            self._open.pop()
            if folder.is_adapter:
                complete.extend(self._adapter(folder))
        if len(self._open) == 1:
            self._open[0] = _Folder("")
        return complete

    def _adapter(self, folder: _Folder) -> list[StoredAdapter]:
        if len(folder.files) > MAX_FILES_PER_ADAPTER:
            self.skip(folder.path, SkipReason.TOO_MANY_FILES)
            return []
        start = len(folder.path) + 1
        parts = adapter_parts([e.key[start:] for e in folder.files])
        # Nearly all adapters have the same file names. Interned, they take memory only once.
        files = tuple(
            StoredFile(sys.intern(name), e.size_bytes, e.version)
            for e in folder.files
            if (name := e.key[start:]) in parts
        )
        return [StoredAdapter(folder.path, digest_of(folder.path, files), files)]


def group(entries: Iterable[Entry]) -> tuple[list[StoredAdapter], Skipped]:
    """All adapters among entries in any order, and what was left out. It holds all entries, for
    stores that list in no order.
    """
    grouping = Grouping()
    adapters = [adapter for entry in sorted(entries) for adapter in grouping.add(entry)]
    adapters += grouping.finish()
    return adapters, grouping.skipped
