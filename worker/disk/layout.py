"""Shell. How adapters lie on disk: the folders and the locks on them, the manifests, and how often
each entry is used.

    entries/<key>/    complete: files/ (the adapter as the engine gets it), `manifest` (what must be
                      in it), `verdict` (what a process found when it hashed and checked it),
                      `uses` (how often it was used: a hint, never synced)
    partial/<key>/    being downloaded: files/ with holes, `journal` (which parts are complete)
    trash/            waits for deletion
    lock  clock       one scan at a time, and the clock of the eviction policy

The key is a hash of (base, name, digest), never a client's string. The lock on an entry is a
`flock` on its folder. It stays with the folder when that moves from partial/ to entries/. The
kernel drops it when its process dies.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import socket
import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from shared.adapters.checks import AdapterFacts
from shared.adapters.identity import AdapterRef, StoredAdapter, StoredFile
from shared.stores.transfer import FilePart, PartId, parts_of
from worker.disk.eviction import UseFrequency

LAYOUT = 1
FILES, MANIFEST, JOURNAL, USES, VERDICT = "files", "manifest", "journal", "uses", "verdict"
_KEY = re.compile(r"[0-9a-f]{32}")
_USES = struct.Struct("<Qdd")
_CLOCK = struct.Struct("<d")
_READ_BYTES = 1 << 20


class ManifestFile(msgspec.Struct, frozen=True):
    """One file of an entry; `parts` are the sha256 of its parts of PART_BYTES."""

    path: str
    size_bytes: int
    parts: tuple[str, ...]


class Manifest(msgspec.Struct, frozen=True):
    """What an entry holds. `content` is the sha256 over paths, sizes and parts: equal content,
    equal value, in any store.
    """

    layout: int
    ref: AdapterRef
    files: tuple[ManifestFile, ...]
    content: str

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


Stamp = tuple[int, int, int, int]
"""(inode, size, mtime, ctime) of a file: equal as long as nothing wrote to it."""


class EntryVerdict(msgspec.Struct, frozen=True):
    """A process of `host` (see `host_of`) has hashed the entry, checked it by `rules` and synced
    it, while its files had these stamps.
    """

    host: str
    rules: str
    stamps: tuple[Stamp, ...]
    facts: AdapterFacts


def entry_key(ref: AdapterRef) -> str:
    """The name of an adapter's folders. It is a hash, so no client's string becomes a path."""
    return hashlib.sha256("\0".join((ref.base, ref.name, ref.digest)).encode()).hexdigest()[:32]


def is_key(name: str) -> bool:
    return _KEY.fullmatch(name) is not None


def host_of(root: Path) -> str:
    """A name for the disk cache at `root`. All processes that share the folder on this boot of this
    machine get the same name, whatever containers they run in.

    It is not made of /etc/machine-id and the path. Machines started from one image share the first,
    and containers share the second.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = socket.gethostname()
    there = root.stat()
    return hashlib.sha256(f"{boot} {there.st_dev} {there.st_ino}".encode()).hexdigest()[:16]


# ---- locks ---------------------------------------------------------------------------------------


class EntryLock:
    """A locked folder. `release` ends the lock, and so does the death of the process and of the
    children that it forked without exec.
    """

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def share(self) -> bool:
        """Turns the exclusive lock into a shared one. The kernel releases the lock for a moment
        meanwhile: returns False if another process took it.
        """
        try:
            fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def holds(self, path: Path) -> bool:
        """Whether the locked folder is the one at `path` now."""
        try:
            there = os.stat(path)
        except FileNotFoundError:
            return False
        here = os.fstat(self._fd)
        return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)

    def release(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        """Releases the lock that a thread returns to a task that was cancelled meanwhile."""
        self.release()


def lock_entry(folder: Path, *, exclusive: bool) -> EntryLock | None:
    """Locks a folder without waiting. None if another lock on it excludes this one. Raises
    FileNotFoundError if the folder is gone.
    """
    held = EntryLock(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    try:
        fcntl.flock(held._fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        held.release()
        return None
    except OSError:
        held.release()
        raise
    if not held.holds(folder):  # the folder was moved between the open and the lock
        held.release()
        raise FileNotFoundError(folder)
    return held


# ---- contents ------------------------------------------------------------------------------------


def manifest_of(ref: AdapterRef, stored: StoredAdapter, parts: Mapping[PartId, str]) -> Manifest:
    """The manifest of a complete download. `parts` are the sha256 of all its parts."""
    files = tuple(
        ManifestFile(file.path, file.size_bytes, tuple(parts[part.id] for part in parts_of(file)))
        for file in sorted(stored.files, key=lambda f: f.path)
    )
    content = hashlib.sha256(msgspec.json.encode(files)).hexdigest()
    return Manifest(LAYOUT, ref, files, content)


def read_manifest(folder: Path) -> Manifest | None:
    """None if there is no manifest, or it cannot be read."""
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return manifest if manifest.layout == LAYOUT else None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    _replace(folder / MANIFEST, manifest)


def read_verdict(folder: Path) -> EntryVerdict | None:
    """None if there is no verdict, or it cannot be read."""
    try:
        return msgspec.json.decode((folder / VERDICT).read_bytes(), type=EntryVerdict)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def write_verdict(folder: Path, verdict: EntryVerdict) -> None:
    _replace(folder / VERDICT, verdict)


def _replace(path: Path, record: msgspec.Struct) -> None:
    """Writes it under another name, and renames it."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.new")
    aside.write_bytes(msgspec.json.encode(record))
    aside.rename(path)


def stamps(folder: Path, manifest: Manifest) -> tuple[Stamp, ...] | None:
    """The stamps of the files. None unless each file is there, is regular, and has the manifest's
    size. Costs one `lstat` per file.
    """
    found = []
    for file in manifest.files:
        try:
            status = os.lstat(folder / FILES / file.path)
        except OSError:
            return None
        if status.st_size != file.size_bytes or (status.st_mode & 0o170000) != 0o100000:
            return None
        found.append((status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return tuple(found)


def is_whole(folder: Path, manifest: Manifest) -> bool:
    """Whether every byte is as the manifest says. Reads and hashes them all."""
    for file in manifest.files:
        stored = StoredFile(file.path, file.size_bytes, "")
        try:
            with (folder / FILES / file.path).open("rb") as handle:
                if (
                    tuple(hash_part(handle.fileno(), part) for part in parts_of(stored))
                    != file.parts
                ):
                    return False
        except OSError:
            return False
    return True


def hash_part(fd: int, part: FilePart) -> str:
    """The sha256 (hex) of one part of an open file."""
    digest = hashlib.sha256()
    offset, end = part.offset, part.offset + part.size_bytes
    while offset < end and (piece := os.pread(fd, min(_READ_BYTES, end - offset), offset)):
        digest.update(piece)
        offset += len(piece)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Syncs one file or folder to disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_files(folder: Path) -> None:
    """Syncs every file and folder below `folder`, and `folder` itself."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


# ---- downloads in progress -----------------------------------------------------------------------


def planned_bytes(partial: Path) -> int:
    """How many bytes a partial folder will take once it is complete."""
    try:
        with (partial / JOURNAL).open("rb") as handle:
            word, _, number = handle.readline(40).partition(b" ")
        return int(number) if word == b"bytes" else size_on_disk(partial)
    except (OSError, ValueError):
        return size_on_disk(partial)


def moved_at(partial: Path) -> float | None:
    """When the download of a partial folder last got bytes; None if there is no such folder."""
    try:
        return (partial / JOURNAL).stat().st_mtime
    except OSError:
        return None


def size_on_disk(folder: Path) -> int:
    """The bytes that are allocated below `folder`. Holes in files do not count."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.lstat().st_blocks * 512
    return total


# ---- hints: lost or wrong, they cost time and nothing else ---------------------------------------


def read_use_frequency(folder: Path) -> UseFrequency:
    try:
        uses, cost_s, priority = _USES.unpack((folder / USES).read_bytes())
    except (OSError, struct.error):
        return UseFrequency()
    return UseFrequency(uses, cost_s, priority)


def write_use_frequency(folder: Path, uses: UseFrequency) -> None:
    with suppress(OSError):
        _overwrite(folder / USES, _USES.pack(uses.uses, uses.cost_s, uses.priority))


def read_clock(root: Path) -> float:
    try:
        clock: float = _CLOCK.unpack((root / "clock").read_bytes())[0]
    except (OSError, struct.error):
        return 0.0
    return clock if 0.0 <= clock < float("inf") else 0.0


def write_clock(root: Path, clock: float) -> None:
    with suppress(OSError):
        _overwrite(root / "clock", _CLOCK.pack(clock))


def _overwrite(path: Path, record: bytes) -> None:
    """Writes in place in one call, so a reader sees either the old or the new record."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.pwrite(fd, record, 0)
    finally:
        os.close(fd)


def keys_in(folder: Path) -> Iterable[tuple[str, int]]:
    """(key, inode) of the folders below `folder`."""
    with os.scandir(folder) as entries:
        return [(entry.name, entry.inode()) for entry in entries if is_key(entry.name)]
