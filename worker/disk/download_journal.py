"""Shell. The journal of a download: which parts are complete in its partial folder, and when the
download last got bytes.
"""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from pathlib import Path

from shared.adapters.identity import StoredAdapter
from shared.stores.transfer import FilePart, PartId, parts_of
from worker.disk.layout import FILES, JOURNAL, hash_part

_LINE = re.compile(r"(\d+) (\d+) ([0-9a-f]{64})")


class DownloadJournal:
    """A file with one line per complete part, written after the part itself. Its mtime is the time
    at which the download last got bytes.
    """

    def __init__(self, folder: Path, stored: StoredAdapter) -> None:
        self._path = folder / JOURNAL
        self._number = {file.path: number for number, file in enumerate(stored.files)}
        self._stored = stored
        self._files = folder / FILES
        self._touched = 0.0

    def start(self) -> None:
        """Begins the journal. Its first line reserves the adapter's bytes (see
        `layout.planned_bytes`).
        """
        if not self._path.exists():
            self._path.write_text(f"bytes {self._stored.size_bytes}\n")
        self.touch()

    def add(self, part: FilePart, sha256: str) -> None:
        """Writes the line in one call, so that lines of several threads never mix."""
        with self._path.open("ab", buffering=0) as handle:
            handle.write(f"{self._number[part.file.path]} {part.number} {sha256}\n".encode())

    def touch(self) -> None:
        """The download got bytes. The file is touched at most once a second."""
        now = time.monotonic()
        if now - self._touched >= 1.0:
            self._touched = now
            with suppress(OSError):
                os.utime(self._path)

    def moved(self, idle_s: float) -> None:
        """Notes that this download waits for another host's download, which last got bytes `idle_s`
        ago. It takes over that age. So two downloads that wait for each other both look idle, and
        are given up.
        """
        at = time.time() - idle_s
        with suppress(OSError):
            if at > self._path.stat().st_mtime:
                os.utime(self._path, (at, at))

    def whole_parts(self) -> dict[PartId, str]:
        """The parts of an earlier try that are unchanged. Every byte of them is hashed again."""
        parts = {part.id: part for file in self._stored.files for part in parts_of(file)}
        return {
            part_id: sha256
            for part_id, sha256 in self.listed_parts().items()
            if self._hash(parts[part_id]) == sha256
        }

    def listed_parts(self) -> dict[PartId, str]:
        """The parts that were complete when their lines were written, with their sha256."""
        by_id = {
            (number, part.number): part
            for number, file in enumerate(self._stored.files)
            for part in parts_of(file)
        }
        try:
            lines = self._path.read_bytes().decode("ascii", "replace").split("\n")
        except OSError:
            return {}
        listed: dict[PartId, str] = {}
        for line in lines[:-1]:  # the last line is empty or half written
            match = _LINE.fullmatch(line)
            part = by_id.get((int(match[1]), int(match[2]))) if match else None
            if match and part is not None:
                listed[part.id] = match[3]
        return listed

    def _hash(self, part: FilePart) -> str:
        try:
            fd = os.open(self._files / part.file.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return ""
        try:
            return hash_part(fd, part)
        finally:
            os.close(fd)
