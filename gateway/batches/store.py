"""Shell. Files and batches in the state folder, each account's in a folder of its own. Everything
is found there again after a process was killed.

    batches/OWNER/file-ID.json, file-ID.jsonl    a file: what is known of it, and its bytes
    batches/OWNER/batch_ID.json                  a batch
    batches/OWNER/batch_ID.out, .err             its results so far, in JSON lines
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec

from gateway.accounts.owned_ids import owner_tag
from gateway.batches.records import (
    ENDED,
    MOST_KEPT_S,
    Batch,
    BatchStatus,
    UserFile,
    answered,
)
from shared.errors import (
    BatchNotFound,
    BodyTooLarge,
    ConfigError,
    FileNotFound,
    InvalidRequest,
)
from shared.runtime.state_file import StateFile

log = logging.getLogger("loraplex.batches")

MAX_FILES = 1000
MAX_KEPT_BYTES = 1 << 30
MAX_OPEN_BATCHES, MAX_BATCHES = 100, 1000
"""These bounds hold for each account. Of batches that have ended, the oldest are forgotten."""
MAX_ALL_BYTES = 16 << 30
"""This one holds for all of them together."""
HALF_WRITTEN_S = 3600
"""After this time a file of which nothing is known will never be completed."""
_FILE_ID = re.compile(r"file-[0-9a-f]{24}\Z")
_BATCH_ID = re.compile(r"batch_[0-9a-f]{24}\Z")
_ID_BYTES = 12
_T = TypeVar("_T", UserFile, Batch)


class _BatchFile(msgspec.Struct, frozen=True):
    """What the state file of a batch holds."""

    batch: Batch | None = None


class BatchStore:
    """`folder` is made when the first file comes. Every call uses the disk, so call it in a
    thread.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._adding = threading.Lock()  # two uploads at once must not both find room
        self._ended: set[Path] = set()  # need not be read again
        self._unread: dict[Path, str] = {}  # those that could not be read, and why

    # ---- files -----------------------------------------------------------------------------------

    def add_file(
        self, owner: str, filename: str, purpose: str, data: bytes, kept_s: int = MOST_KEPT_S
    ) -> UserFile:
        """Raises BodyTooLarge if the account, or all accounts together, already keep too much, and
        OSError if the disk cannot be written. Then nothing of it is kept.
        """
        made = f"file-{secrets.token_hex(_ID_BYTES)}"
        file = UserFile(made, owner, filename, purpose, len(data), int(time.time()), kept_s)
        with self._adding:
            self._check_room(owner, len(data))
            folder = self._of(owner)
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            try:
                (folder / f"{file.id}.jsonl").write_bytes(data)
                self._write(folder / f"{file.id}.json", file)
            except OSError:  # a part of it would take the room that is left
                self._remove(file)
                raise
        return file

    def _check_room(self, owner: str, size_bytes: int) -> None:
        """Raises BodyTooLarge."""
        if len(list(self.files(owner))) >= MAX_FILES:
            raise BodyTooLarge(f"At most {MAX_FILES} files are kept for a key; delete some.")
        full = self.full((owner,), size_bytes).get(owner)
        if full is not None:
            raise full

    def full(self, owners: Iterable[str], more_bytes: int = 0) -> dict[str, BodyTooLarge]:
        """Why some of these accounts may not keep so many bytes more. The results of batches that
        run count as well.
        """
        if _size_of(self._folder.glob("*/*")) + more_bytes > MAX_ALL_BYTES:
            text = (
                f"At most {MAX_ALL_BYTES >> 30} GiB of files are kept for all keys together; "
                "there is room again when some are deleted or expire."
            )
            return {owner: BodyTooLarge(text) for owner in owners}
        text = f"At most {MAX_KEPT_BYTES >> 20} MiB are kept for a key; delete some files."
        return {
            owner: BodyTooLarge(text)
            for owner in owners
            if _size_of(self._of(owner).glob("*")) + more_bytes > MAX_KEPT_BYTES
        }

    def file(self, owner: str, file_id: str) -> UserFile:
        """Raises FileNotFound. The message is the same for another account's file."""
        if _FILE_ID.match(file_id):
            found = self._read(self._of(owner) / f"{file_id}.json", UserFile)
            if found is not None and found.owner == owner:
                return found
        raise FileNotFound(f"There is no file `{file_id[:100]}`.")

    def files(self, owner: str) -> Iterator[UserFile]:
        for path in self._of(owner).glob("file-*.json"):
            found = self._read(path, UserFile)
            if found is not None and found.owner == owner:
                yield found

    def content(self, owner: str, file_id: str) -> bytes:
        """Raises FileNotFound."""
        with self.open_content(owner, file_id) as file:
            return file.read()

    def open_content(self, owner: str, file_id: str) -> BinaryIO:
        """Raises FileNotFound."""
        file = self.file(owner, file_id)
        try:
            return (self._of(owner) / f"{file.id}.jsonl").open("rb")
        except FileNotFoundError as exc:
            raise FileNotFound(f"There is no file `{file_id[:100]}`.") from exc

    def delete_file(self, owner: str, file_id: str) -> None:
        """Raises FileNotFound, or InvalidRequest while a batch needs it."""
        file = self.file(owner, file_id)
        if any(b.input_file_id == file.id for b in self.batches(owner) if b.status not in ENDED):
            raise InvalidRequest(f"A batch that has not ended needs the file `{file.id}`.")
        self._remove(file)

    def remove_expired(self, now: float) -> int:
        """Removes files whose time is over and that no open batch needs, and batches that ended
        long ago. Returns how many. Raises ConfigError while it is not known what a batch needs.
        """
        needed = {batch.input_file_id for batch in self.open_batches(or_raise=True)}
        removed = 0
        for path in self._folder.glob("*/file-*.json"):
            try:
                file = self._read(path, UserFile)
            except OSError:
                continue
            if file is not None and file.expires_at <= now and file.id not in needed:
                self._remove(file)
                removed += 1
        for path in self._folder.glob("*/batch_*.json"):
            batch = self._batch_in(path)
            if batch is not None and batch.is_past(now):
                self._forget(path)
                removed += 1
        # the rest is of processes that were killed between two writes
        for path in (*self._folder.glob("*/batch_*.out"), *self._folder.glob("*/batch_*.err")):
            batch_path = path.with_suffix(".json")
            if batch_path in self._ended or not batch_path.exists():
                path.unlink(missing_ok=True)  # its results are files by now
        for path in self._folder.glob("*/file-*.jsonl"):
            with contextlib.suppress(FileNotFoundError):
                age_s = now - path.stat().st_mtime
                if age_s > HALF_WRITTEN_S and not path.with_suffix(".json").exists():
                    path.unlink()
        return removed

    def _remove(self, file: UserFile) -> None:
        for ending in ("json", "jsonl"):
            (self._of(file.owner) / f"{file.id}.{ending}").unlink(missing_ok=True)

    def _forget(self, path: Path) -> None:
        """Removes a batch that has ended, with the lock of its state."""
        path.unlink(missing_ok=True)
        path.with_name(f".{path.name}.lock").unlink(missing_ok=True)
        self._ended.discard(path)

    # ---- batches ---------------------------------------------------------------------------------

    def add_batch(
        self,
        owner: str,
        endpoint: str,
        input_file_id: str,
        metadata: dict[str, str] | None,
        results_kept_s: int = MOST_KEPT_S,
    ) -> Batch:
        """Raises FileNotFound, or InvalidRequest if too many batches are open."""
        self.file(owner, input_file_id)
        kept = sorted(self.batches(owner), key=lambda b: b.created_at)
        ended = [b for b in kept if b.status in ENDED]
        if len(kept) - len(ended) >= MAX_OPEN_BATCHES:
            raise InvalidRequest(f"At most {MAX_OPEN_BATCHES} batches of a key may be open.")
        for old in ended[: max(0, len(kept) + 1 - MAX_BATCHES)]:
            self._forget(self._state(owner, old.id).path)
        made = f"batch_{secrets.token_hex(_ID_BYTES)}"
        batch = Batch(
            made,
            owner,
            endpoint,
            input_file_id,
            int(time.time()),
            metadata=metadata,
            results_kept_s=results_kept_s,
        )
        self._state(owner, made).update(lambda _: _BatchFile(batch))
        return batch

    def batch(self, owner: str, batch_id: str) -> Batch:
        """Raises BatchNotFound. The message is the same for another account's batch."""
        if _BATCH_ID.match(batch_id):
            found = self._state(owner, batch_id).read().batch
            if found is not None and found.owner == owner:
                return found
        raise BatchNotFound(f"There is no batch `{batch_id[:100]}`.")

    def batches(self, owner: str) -> Iterator[Batch]:
        """Raises ConfigError if the disk cannot be read now."""
        for path in self._of(owner).glob("batch_*.json"):
            found = self._batch_in(path, or_raise=True)
            if found is not None and found.owner == owner:
                yield found

    def open_batches(self, *, or_raise: bool = False) -> list[Batch]:
        """The open batches of all accounts, the oldest first. With `or_raise` it raises ConfigError
        if any of them cannot be read now.
        """
        found = []
        for path in self._folder.glob("*/batch_*.json"):
            if path in self._ended:
                continue
            batch = self._batch_in(path, or_raise=or_raise)
            if batch is not None and batch.status not in ENDED:
                found.append(batch)
            elif batch is not None:
                self._ended.add(path)
        return sorted(found, key=lambda b: (b.created_at, b.id))

    def cancel(self, owner: str, batch_id: str) -> Batch:
        """Raises BatchNotFound."""
        self.batch(owner, batch_id)

        def cancelled(state: _BatchFile) -> _BatchFile:
            batch = state.batch
            if batch is None or batch.status in ENDED:
                return state
            return _BatchFile(batch.become(BatchStatus.CANCELLING, int(time.time())))

        changed = self._state(owner, batch_id).update(cancelled).batch
        if changed is None:  # forgotten meanwhile
            raise BatchNotFound(f"There is no batch `{batch_id[:100]}`.")
        return changed

    def put(self, batch: Batch) -> Batch:
        """Writes what the runner knows. A request to cancel the batch is kept."""

        def merged(state: _BatchFile) -> _BatchFile:
            before = state.batch
            if (
                before is not None
                and before.status is BatchStatus.CANCELLING
                and batch.status not in ENDED
            ):
                times = {**before.times, **batch.times}
                return _BatchFile(msgspec.structs.replace(batch, status=before.status, times=times))
            return _BatchFile(batch)

        kept = self._state(batch.owner, batch.id).update(merged).batch
        assert kept is not None
        return kept

    # ---- results ---------------------------------------------------------------------------------

    def append(self, batch: Batch, lines: bytes, *, failed: bool) -> None:
        with self._results(batch, failed).open("ab") as out:
            out.write(lines)

    def answered(self, batch: Batch, *, failed: bool) -> set[str]:
        """The `custom_id` of all results. What is no whole result any more is removed, and asked
        again.
        """
        path = self._results(batch, failed)
        try:
            with path.open("rb") as lines:  # one by one: together they may be larger than memory
                found, whole = answered(lines)
        except FileNotFoundError:
            return set()
        if whole < path.stat().st_size:
            os.truncate(path, whole)
        return found

    def results_as_file(self, batch: Batch, *, failed: bool) -> str | None:
        """The id of a file with these results, which is the same if asked again. None: there are
        none.
        """
        path = self._results(batch, failed)
        if not path.exists() or not path.stat().st_size:
            return None
        kind = "error" if failed else "output"
        digits = batch.id.removeprefix("batch_")[:-1] + ("e" if failed else "0")
        file = UserFile(
            f"file-{digits}",
            batch.owner,
            f"{batch.id}_{kind}.jsonl",
            "batch_output",
            path.stat().st_size,
            int(time.time()),
            batch.results_kept_s,
        )
        content = path.with_name(f"{file.id}.jsonl")
        content.unlink(missing_ok=True)
        # The results keep their name until the batch has ended: a killed process looks for them.
        os.link(path, content)
        self._write(path.with_name(f"{file.id}.json"), file)
        return file.id

    def forget_results(self, batch: Batch) -> None:
        """Removes the results of a batch that has ended. They are files by now."""
        for failed in (False, True):
            self._results(batch, failed).unlink(missing_ok=True)

    # ---- inside ----------------------------------------------------------------------------------

    def _of(self, owner: str) -> Path:
        return self._folder / owner_tag(owner)

    def _state(self, owner: str, batch_id: str) -> StateFile[_BatchFile]:
        return StateFile(self._of(owner) / f"{batch_id}.json", _BatchFile)

    def _results(self, batch: Batch, failed: bool) -> Path:
        return self._of(batch.owner) / f"{batch.id}.{'err' if failed else 'out'}"

    def _batch_in(self, path: Path, *, or_raise: bool = False) -> Batch | None:
        """None: it cannot be read, which is logged. With `or_raise` only a broken one is None: of
        others it is not known that they have ended.
        """
        try:
            batch = StateFile(path, _BatchFile).read().batch
        except ConfigError as exc:
            if or_raise and isinstance(exc.__cause__, OSError):
                raise
            if self._unread.get(path) != exc.message:  # it is looked at every second
                self._unread[path] = exc.message
                log.error("a batch cannot be read", extra={"why": exc.message})
            return None
        self._unread.pop(path, None)
        return batch

    @staticmethod
    def _read(path: Path, kind: type[_T]) -> _T | None:
        """None: there is none, or it is broken. Raises OSError if the disk cannot be read now."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=kind)
        except (FileNotFoundError, msgspec.MsgspecError):
            return None

    @staticmethod
    def _write(path: Path, value: UserFile) -> None:
        aside = path.with_name(f".{path.name}.new")
        try:
            aside.write_bytes(msgspec.json.encode(value))
            aside.rename(path)
        except OSError:
            aside.unlink(missing_ok=True)
            raise


def _size_of(paths: Iterable[Path]) -> int:
    """In bytes. A file that has just been removed counts nothing, and one with two names once."""
    sizes: dict[int, int] = {}
    for path in paths:
        with contextlib.suppress(OSError):
            found = path.stat()
            sizes[found.st_ino] = found.st_size
    return sum(sizes.values())
