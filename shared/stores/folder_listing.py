"""Shell. Lists a folder of adapters. The next listing looks only at what may have changed.

A *unit* is a topmost folder with an `adapter_config.json`, with everything below it. Its adapters
depend on nothing outside of it. If the unit's folder and files have the same inodes, sizes and
times as at the last listing, its adapters are unchanged. A folder of a hundred thousand adapters
then costs three `stat` calls per adapter. Nothing is read, hashed or made again.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import struct
import time
from collections.abc import Iterator, Sequence
from typing import BinaryIO, TypeAlias

import msgspec

from shared.adapters.identity import CONFIG_FILE, StoredAdapter, may_be_part, name_problem
from shared.stores.listing import Entry, Grouping, Skipped, SkipReason, join_skipped

# Bytes of each end of a file that are read for its version. Both ends differ between two trainings,
# because the tensors are stored in alphabetical order.
_SAMPLE_BYTES = 64 * 1024
_MAX_DEPTH = 32
_SETTLED_NS = 2_000_000_000
"""A folder that changed within this time before it was read may change again without a new time.
File systems count time in steps of up to 2 s.
"""
_OWN_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_BREATH = 512
_BREATH_S = 0.0005
"""How long, and how often, a listing leaves the interpreter to the event loop of its process.
Otherwise the loop would get it only every 5 ms.
"""
_pack = struct.Struct("=QQqqq").pack
_NONE = Skipped()
_Found: TypeAlias = Sequence[tuple[str, bool, bool]]
"""The contents of a folder: (name, is it a folder?, is it a link?)."""


class _Unit(msgspec.Struct, frozen=True, gc=False):
    """What the last listing found in a unit. `stamps` are those of the folder and of each of
    `names`. `flat`: it had no folders, so the time of the unit's own folder shows any change of
    names. Many units share their `names` and their empty `skipped`.
    """

    names: tuple[str, ...]
    flat: bool
    stamps: bytes
    adapters: tuple[StoredAdapter, ...]
    skipped: Skipped


class FolderListing:
    """The listings of one root. `scan` runs in a thread, one at a time."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._units: dict[str, _Unit] = {}

    def scan(self, real_root: str) -> tuple[list[StoredAdapter], Skipped]:
        """All adapters, and what was left out. An adapter that has not changed is the same object
        as last time.
        """
        scan = _Scan(real_root, self._units)
        scan.folder(self._root, "", ())
        self._units = scan.units
        return scan.adapters, scan.skipped()


class _Scan:
    """One listing in progress."""

    def __init__(self, real_root: str, before: dict[str, _Unit]) -> None:
        self._real_root = real_root
        self._before = before
        self._began_ns = time.time_ns()
        self._shapes = {unit.names: unit.names for unit in before.values()}
        self._outside = Grouping()
        self._looked = 0
        self.units: dict[str, _Unit] = {}
        self.adapters: list[StoredAdapter] = []

    def skipped(self) -> Skipped:
        kept = (u.skipped for u in self.units.values() if u.skipped is not _NONE)
        return join_skipped([self._outside.skipped, *kept])

    def folder(self, path: str, key: str, above: tuple[tuple[int, int], ...]) -> None:
        """Lists a folder. `above` are the folders on the way to it: following a link back to one of
        them would never end.
        """
        known = self._before.get(key)
        if known is not None and known.flat and known.stamps == _stamps_of(path, known.names):
            self._keep(key, known)
            return
        try:
            status = os.stat(path)
            with os.scandir(path) as entries:
                found = [(e.name, _is_folder(e), e.is_symlink()) for e in entries]
        except OSError as exc:
            raise_own_shortage(exc)
            self._outside.skip(key, SkipReason.UNREADABLE)
            return
        here = (status.st_dev, status.st_ino)
        if here in above or len(above) >= _MAX_DEPTH:
            self._outside.skip(key, SkipReason.LOOP)
        elif key and any(name == CONFIG_FILE and not is_folder for name, is_folder, _ in found):
            self._keep(key, self._unit(path, key, above, status, found, known))
        else:
            for child, at, is_folder in self._inside(self._outside, path, key, found):
                if is_folder:  # files outside of all adapters are ignored
                    self.folder(at, child, (*above, here))

    def _inside(
        self, grouping: Grouping, path: str, key: str, found: _Found
    ) -> Iterator[tuple[str, str, bool]]:
        """(key, path, is it a folder?) of everything that a listing may look at. `grouping` is told
        what it may not look at.
        """
        for name, is_folder, is_link in found:
            child, at = (f"{key}/{name}" if key else name), f"{path}/{name}"
            if name.startswith("."):
                _skip_hidden(grouping, child, at)
            elif is_link and (out := _link_out(at, self._real_root)):
                grouping.skip(child, out)
            else:
                yield child, at, is_folder

    def _unit(
        self,
        path: str,
        key: str,
        above: tuple[tuple[int, int], ...],
        status: os.stat_result,
        found: _Found,
        known: _Unit | None,
    ) -> _Unit:
        grouping = Grouping()
        if any(is_folder for _, is_folder, _ in found):
            flat, files = False, list(walk(self._real_root, grouping, path, key, above))
        else:
            flat = status.st_mtime_ns < self._began_ns - _SETTLED_NS
            parts = [one for one in found if may_be_part(one[0])]
            files = sorted((child, at) for child, at, _ in self._inside(grouping, path, key, parts))
        names = tuple(child[len(key) + 1 :] for child, _ in files)
        names = self._shapes.setdefault(names, names)
        if (
            known is not None
            and known.names == names
            and known.stamps == _stamps_of(path, names)
            and grouping.skipped == known.skipped
        ):
            return msgspec.structs.replace(known, flat=flat)
        stamps, adapters = [_stamp(status)], []
        for child, at in files:
            read = read_entry(child, at)
            if read is None or not read[1]:
                grouping.skip(child, SkipReason.UNREADABLE)
            if read is None:
                continue  # the rest of the folder stays good
            entry, stamp = read
            stamps.append(stamp)
            adapters += grouping.add(entry)
        adapters += grouping.finish()
        return _Unit(
            names,
            flat,
            b"".join(stamps),
            tuple(adapters),
            grouping.skipped if grouping.skipped != _NONE else _NONE,
        )

    def _keep(self, key: str, unit: _Unit) -> None:
        self.units[key] = unit
        self.adapters += unit.adapters
        self._looked += 1
        if self._looked % _BREATH == 0:
            time.sleep(_BREATH_S)


def read_entry(key: str, path: str) -> tuple[Entry, bytes] | None:
    """A file as an entry of the store, and its stamp. None if it is gone.

    A file that this process may not read has an entry and no stamp: its fetch says so, where a
    missing file would be taken for an unfinished upload.
    """
    try:
        with open_regular(path) as handle:
            status = os.fstat(handle.fileno())
            return Entry(key, status.st_size, _version(handle, status)), _stamp(status)
    except PermissionError:
        return _denied_entry(key, path)
    except OSError as exc:
        raise_own_shortage(exc)
        return None


def _denied_entry(key: str, path: str) -> tuple[Entry, bytes] | None:
    try:
        status = os.stat(path)
    except OSError as exc:
        raise_own_shortage(exc)
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return Entry(key, status.st_size, f"{status.st_mtime_ns:x}-denied"), b""


def raise_own_shortage(error: OSError) -> None:
    """Raises the error again if it is this machine's shortage and says nothing of the file. What a
    listing then left out would be taken for gone.
    """
    if error.errno in _OWN_SHORTAGES:
        raise error


def walk(
    real_root: str,
    grouping: Grouping,
    folder: str,
    key: str,
    above: tuple[tuple[int, int], ...] = (),
) -> Iterator[tuple[str, str]]:
    """(key, path) of each file below a folder, in ascending order of the keys, as Grouping needs
    them. `grouping` is told what is left out.
    """
    try:
        status = os.stat(folder)
        with os.scandir(folder) as entries:
            # The keys below a folder begin with its name and a slash. "-" and "." sort before the
            # slash.
            names = sorted((e.name + "/" if _is_folder(e) else e.name) for e in entries)
    except OSError as exc:
        raise_own_shortage(exc)
        grouping.skip(key, SkipReason.UNREADABLE)
        return
    here = (status.st_dev, status.st_ino)
    if here in above or len(above) >= _MAX_DEPTH:
        grouping.skip(key, SkipReason.LOOP)
        return
    for name in names:
        child, path = (f"{key}/{name}" if key else name), os.path.join(folder, name.rstrip("/"))
        if not name.endswith("/") and not may_be_part(name):
            continue
        if name.startswith("."):
            _skip_hidden(grouping, child.rstrip("/"), path)
        elif os.path.islink(path) and (out := _link_out(path, real_root)):
            grouping.skip(child.rstrip("/"), out)
        elif name.endswith("/"):
            yield from walk(real_root, grouping, path, child[:-1], (*above, here))
        else:
            yield child, path


def _skip_hidden(grouping: Grouping, key: str, path: str) -> None:
    """Hidden files and folders are left out silently, unless they are adapters."""
    if os.path.isfile(f"{path}/{CONFIG_FILE}"):
        grouping.skip(key, SkipReason.NAME, name_problem(key))


def _link_out(path: str, real_root: str) -> SkipReason | None:
    """Why a link is not followed. None if it is followed."""
    to = os.path.realpath(path)
    if to == real_root:
        return SkipReason.LOOP
    return None if below(to, real_root) else SkipReason.LINK


def below(path: str, real_root: str) -> bool:
    """Whether the path leads to a place below the root."""
    return path.startswith(real_root.rstrip("/") + "/")


def open_regular(path: str) -> BinaryIO:
    """Opens a file for reading. A folder, pipe or device counts as "not found"; opening it might
    hang.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FileNotFoundError("not a regular file")
    return os.fdopen(fd, "rb")


def version_of(handle: BinaryIO) -> tuple[int, str]:
    """The size of an open file in bytes, and its version."""
    status = os.fstat(handle.fileno())
    return status.st_size, _version(handle, status)


def _version(handle: BinaryIO, status: os.stat_result) -> str:
    """The time of change, and a hash of both ends of the file."""
    fd, end = handle.fileno(), max(_SAMPLE_BYTES, status.st_size - _SAMPLE_BYTES)
    ends = os.pread(fd, _SAMPLE_BYTES, 0) + os.pread(fd, _SAMPLE_BYTES, end)
    return f"{status.st_mtime_ns:x}-{hashlib.blake2b(ends, digest_size=8).hexdigest()}"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _stamp(status: os.stat_result) -> bytes:
    return _pack(
        status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    )


def _stamps_of(folder: str, names: Sequence[str]) -> bytes | None:
    """The stamps of the folder's files. None if one is gone."""
    try:
        return b"".join(
            [_stamp(os.stat(folder)), *[_stamp(os.stat(f"{folder}/{name}")) for name in names]]
        )
    except OSError:
        return None
