"""Shell. One download into a partial folder. It asks several sources in turn, keeps the parts that
are complete, and notes them in the journal.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shared.adapters.checks import AdapterFacts
from shared.adapters.identity import AdapterRef, StoredAdapter
from shared.errors import StoreUnavailable
from shared.stores import AdapterStore
from shared.stores.transfer import (
    PARTS_PER_ADAPTER,
    FilePart,
    PartBudget,
    PartId,
    Transfer,
    TransferRetries,
)
from worker.disk.download_journal import DownloadJournal
from worker.disk.layout import FILES

log = logging.getLogger("loraplex.disk_cache")
clock = time.monotonic


class Source(Protocol):
    """A place to download an adapter's files from: a store, or a worker of another host."""

    async def fetch(
        self, adapter: StoredAdapter, into: Path, transfer: Transfer | None = None
    ) -> None:
        """Like AdapterStore.fetch. Raises PeerFailed if another source may still have the files."""
        ...


class FolderCheck(Protocol):
    """The check of one folder."""

    def look(self, part: FilePart) -> None:
        """A part has come, and will not change any more. The check may look at it now, even while
        `facts` runs; it is called in a thread, and refuses nothing.
        """
        ...

    def facts(self) -> AdapterFacts:
        """All parts are there. Blocks. Raises InvalidAdapter."""
        ...


def nothing(_: Path) -> None: ...


@dataclass(frozen=True, slots=True)
class DownloadJob:
    """What to download, and from where. The `peers` are asked first, in their order. `on_brought`
    gets the folder of the files, once all came from the store and before they are checked.
    """

    ref: AdapterRef
    stored: StoredAdapter
    store: AdapterStore
    peers: Sequence[Source] = ()
    on_brought: Callable[[Path], None] = nothing


class Download:
    """One download. `parts` are the complete parts with their sha256. `peer_bytes` came from peers;
    `peer_s` and `store_s` are the seconds spent with peers and with the store.

    `begin` begins a check of the files. Each source has its own, which looks at parts as they come;
    `check` is that of the last source. A thread that nobody waits for may still end a part of the
    source before: it must not count. The check looks in the threads of `looks`, and no part waits
    for it: the engine may read the files meanwhile.
    """

    def __init__(
        self,
        job: DownloadJob,
        partial: Path,
        pace: TransferRetries,
        budget: PartBudget,
        begin: Callable[[], FolderCheck],
        looks: Executor,
    ) -> None:
        self._job, self._stored, self._files = job, job.stored, partial / FILES
        self._looks, self._may_look = looks, threading.Semaphore(PARTS_PER_ADAPTER)
        self._pace, self._budget, self._begin = pace, budget, begin
        self.check = begin()
        self._journal = DownloadJournal(partial, job.stored)
        self.parts: dict[PartId, str] = {}
        self._from_store: set[PartId] = set()
        self.peer_bytes = 0
        self.peer_s = self.store_s = 0.0

    def resume(self) -> None:
        """Takes over the complete parts that an earlier try left. Blocks."""
        self.parts.update(self._journal.whole_parts())
        if self.parts:
            log.info(
                "download resumed",
                extra={"adapter": str(self._job.ref), "parts": len(self.parts)},
            )

    async def bring(self) -> None:
        """Downloads every missing part: first from the peers in their order, then what is still
        missing from the store.
        """
        start = clock()
        for peer in self._job.peers:
            try:
                await peer.fetch(self._stored, self._files, self._transfer(self._on_peer_part))
                self.peer_s = clock() - start
                return
            except PeerFailed as exc:
                log.info(
                    "peer sent only a part of the adapter",
                    extra={
                        "adapter": str(self._job.ref),
                        "reason": exc.message,
                        "peer_bytes": self.peer_bytes,
                    },
                )
        self.peer_s = clock() - start if self._job.peers else 0.0
        await self._ask_store()

    @property
    def from_store_alone(self) -> bool:
        """Whether every part came from the store, in this try."""
        return not self.parts.keys() - self._from_store

    async def doubt(self) -> bool:
        """The files turned out to be invalid. If some parts did not come from the store, downloads
        those again from the store and returns True.
        """
        doubtful = self.parts.keys() - self._from_store
        if doubtful:
            log.warning(
                "adapter from a peer is not valid and is fetched again from the store",
                extra={"adapter": str(self._job.ref)},
            )
            for part_id in doubtful:
                del self.parts[part_id]
            self.peer_bytes = 0
            await self._ask_store()
        return bool(doubtful)

    async def _ask_store(self) -> None:
        start = clock()
        await self._job.store.fetch(self._stored, self._files, self._transfer(self._on_store_part))
        self.store_s += clock() - start

    def _transfer(self, on_part: Callable[[FilePart, str], None]) -> Transfer:
        check = self.check = self._begin()

        def on_part_of_source(part: FilePart, sha256: str) -> None:
            if check is self.check:
                on_part(part, sha256)
                self._look(check, part)

        return Transfer(
            pace=self._pace,
            budget=self._budget,
            done=dict(self.parts),
            may_exist=True,
            on_bytes=lambda _: self._journal.touch(),
            on_idle=self._journal.moved,
            on_part=on_part_of_source,
        )

    # ---- in threads ------------------------------------------------------------------------------

    def _on_store_part(self, part: FilePart, sha256: str) -> None:
        self._from_store.add(part.id)
        self._note(part, sha256)

    def _on_peer_part(self, part: FilePart, sha256: str) -> None:
        self.peer_bytes += part.size_bytes
        self._note(part, sha256)

    def _look(self, check: FolderCheck, part: FilePart) -> None:
        """Few parts wait for a look, since others' checks wait behind them. `facts` looks at what
        was left out.
        """

        def look() -> None:
            try:
                check.look(part)
            finally:
                self._may_look.release()

        if self._may_look.acquire(blocking=False):
            self._looks.submit(look)

    def _note(self, part: FilePart, sha256: str) -> None:
        self.parts[part.id] = sha256
        self._journal.add(part, sha256)


class PeerFailed(StoreUnavailable):
    """A peer did not give what it was asked for. Another source may still have it."""
