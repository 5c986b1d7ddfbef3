"""Shell. Brings an adapter to this worker: from disk, from peers or from the store, and then into
the engine's host memory.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from shared.adapters.identity import AdapterRef, StoredAdapter
from shared.errors import AdapterNotFound
from shared.link.messages import Tier
from shared.stores import AdapterStore
from worker.adapters.load_times import LoadTimes
from worker.disk.cache import Cached, Check, DiskCache
from worker.disk.download import Source, nothing
from worker.engine.base import Engine, Loaded

log = logging.getLogger("loraplex.agent")
clock = time.monotonic


@dataclass(frozen=True, slots=True)
class FetchHint:
    """What a gateway said about an adapter's files: the files in the store, if it sent them, and
    the endpoints of peers that have them.
    """

    stored: StoredAdapter | None = None
    peers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Fetched:
    """An adapter on this host's disk. `came_from` is DISK if it was there before, else REMOTE.
    `check_s` is how long the check of files that were there took.
    """

    cached: Cached
    came_from: Tier
    check_s: float
    int_id: int
    fetch_s: float = 0.0


class AdapterFetcher:
    """Fetches adapters and prepares them for the engine. `sources` turns peer endpoints into places
    to download from.
    """

    def __init__(
        self,
        engine: Engine,
        store: AdapterStore | None,
        cache: DiskCache,
        sources: Callable[[AdapterRef, tuple[str, ...]], Sequence[Source]],
        times: LoadTimes,
    ) -> None:
        self._engine, self._store, self._cache = engine, store, cache
        self._sources, self._times = sources, times
        self._int_ids = itertools.count(1)

    async def fetch(
        self, ref: AdapterRef, hint: FetchHint, check: Check, *, ahead: bool
    ) -> Fetched:
        """Brings the adapter to disk, validated and in use. The store is not asked for an adapter
        that is on disk, so it may be down. `ahead`: the engine may read it while it is checked;
        `prepare` or `leave` must follow.

        Raises: AdapterNotFound, InvalidAdapter, StoreUnavailable.
        """
        start, int_id = clock(), next(self._int_ids)
        cached = await self._cache.open(ref, check)
        if cached is not None:
            return Fetched(cached, Tier.DISK, clock() - start, int_id)
        start = clock()
        stored = hint.stored or await self._look_up(ref)
        assert self._store is not None
        find_s = clock() - start
        peers = self._sources(ref, hint.peers)
        read: list[Path] = []

        def on_brought(files: Path) -> None:
            read.append(files)
            self._engine.read_ahead(ref, int_id, files)

        try:
            cached = await self._cache.fetch(
                ref, stored, self._store, check, peers, on_brought if ahead else nothing
            )
        except BaseException:
            if read:
                self._engine.forget(int_id)
            raise
        self._note_fetch(ref, cached, find_s)
        check_s = cached.times.validate_s
        return Fetched(cached, Tier.REMOTE, check_s, int_id, max(0.0, clock() - start - check_s))

    def leave(self, fetched: Fetched) -> None:
        """The adapter is wanted on disk only."""
        self._engine.forget(fetched.int_id)

    async def prepare(self, ref: AdapterRef, fetched: Fetched) -> Loaded:
        """Brings the adapter into the engine's host memory, ready for a slot. Raises InvalidAdapter
        or EngineFailure.
        """
        cached = fetched.cached
        loaded = Loaded(
            ref,
            fetched.int_id,
            cached.folder,
            cached.facts.rank,
            cached.size_bytes,
            fetched.fetch_s,
            fetched.check_s,
        )
        start = clock()
        await self._engine.prepare(loaded)
        prepare_s = clock() - start
        self._times.prepared(fetched.came_from, fetched.check_s, prepare_s)
        in_ms = {"ms": round(prepare_s * 1e3, 1), "check_ms": round(fetched.check_s * 1e3, 1)}
        log.info(
            "adapter prepared", extra={"adapter": str(ref), "bytes": cached.size_bytes, **in_ms}
        )
        return loaded

    async def _look_up(self, ref: AdapterRef) -> StoredAdapter:
        """Asks the store for the adapter's files. The gateway believed that they were here, so it
        sent none.
        """
        stored = await self._store.find(ref.name) if self._store is not None else None
        if stored is None or stored.digest != ref.digest:
            raise AdapterNotFound(
                f"The adapter `{ref.name}` of model `{ref.base}` is gone or has changed.",
                param="model",
            )
        return stored

    def _note_fetch(self, ref: AdapterRef, cached: Cached, find_s: float) -> None:
        took = {"find_s": find_s, **asdict(cached.times)}
        in_ms = {
            key.removesuffix("_s") + "_ms": round(seconds * 1e3, 1) for key, seconds in took.items()
        }
        sources = {"peer": cached.peer_bytes > 0, "store": cached.times.download_s > 0}
        # If neither gave bytes, another worker of this host downloaded it.
        origin = "+".join(name for name, had_part in sources.items() if had_part) or "host"
        log.info(
            "adapter fetched",
            extra={
                "adapter": str(ref),
                "from": origin,
                "bytes": cached.size_bytes,
                "peer_bytes": cached.peer_bytes,
                **in_ms,
            },
        )
        if origin == "store":
            self._times.fetched(sum(took.values()) - cached.times.wait_s)
