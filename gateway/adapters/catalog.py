"""Shell. Which adapters exist: one immutable mapping per base model, swapped after each listing
that differs, and a lookup on demand for unknown names.

`GET /v1/models` and known names never wait for the store. What the store once showed stays usable
while the store is down. `known` is what the store shows; `find` says which version of it answers
(see `versions`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Mapping

from gateway.adapters.upload_watch import UploadWatch, is_whole
from gateway.adapters.versions import Versions
from shared.adapters.identity import StoredAdapter
from shared.errors import (
    UNFINISHED_RETRY_AFTER_S,
    AdapterNotFound,
    LoraplexError,
    StoreUnavailable,
)
from shared.stores import AdapterStore, Skipped

log = logging.getLogger("loraplex.catalog")

MAX_ADAPTERS = 100_000  # per base model; more are not listed, but still found by name
NEGATIVE_TTL_S = UNFINISHED_RETRY_AFTER_S
"""A name that was not found is not asked for again within this time. It may be an upload whose
config comes last, so it waits no longer than one whose weights do.
"""
KEPT_TTL_S = 30.0  # a tag of a hub may point elsewhere after this time
MAX_NEGATIVE = 10_000
LOOK_AGAIN_S = 1.0
FIND_TIMEOUT_S = 10.0
TURN = 256  # adapters of a listing between two turns of the event loop


class Catalog:
    """The adapters of one base model. `run()` refreshes for ever; `find` answers from memory or
    asks the store once.
    """

    def __init__(
        self, base: str, store: AdapterStore, refresh_s: float, settle_s: float = 0.0
    ) -> None:
        self.base = base
        self._store = store
        self._refresh_s = refresh_s
        self._settling = UploadWatch(settle_s)
        self._known: dict[str, StoredAdapter] = {}
        self._missing: OrderedDict[str, float] = OrderedDict()
        self._asking: dict[str, asyncio.Future[StoredAdapter | None]] = {}
        # what workers found invalid: name -> (digest, when the store is asked again)
        self._refused: OrderedDict[str, tuple[str, float]] = OrderedDict()
        # what single questions found since the running listing began: newer than it
        self._fresh: dict[str, StoredAdapter | None] = {}
        self._logged: set[str] = set()  # keys of skipped folders, and "" of an empty store
        # (name, version) -> what the store said of it, and how long that holds
        self._kept: OrderedDict[tuple[str, str], tuple[StoredAdapter | None, float]] = OrderedDict()
        self.versions = Versions()
        self.listed = False
        self.version = 0
        """Grows whenever `known` is another one."""

    @property
    def known(self) -> Mapping[str, StoredAdapter]:
        return self._known

    async def run(self) -> None:
        """Lists the store every `refresh_s` seconds; a failed listing keeps what was known."""
        while True:
            try:
                await self.refresh()
            except LoraplexError as exc:
                log.warning(
                    "listing failed",
                    extra={"base": self.base, "store": self._store.url, "error": exc.message},
                )
            await asyncio.sleep(self._refresh_s)

    async def refresh(self) -> None:
        known: dict[str, StoredAdapter] = {}
        same = named = 0
        complete = True
        self._fresh.clear()
        async for seen in self._store.list():
            before = self._known.get(seen.name)
            adapter = self._look(before, seen)
            named += before is not None
            if before == adapter:
                # so that equal ones are there once, however many requests hold one
                adapter, same = before, same + 1
            known[adapter.name] = adapter
            if len(known) % TURN == 0:
                # a store that has its listing ready never gives the loop a turn
                await asyncio.sleep(0)
            if len(known) >= MAX_ADAPTERS:
                log.warning(
                    "too many adapters, listing cut",
                    extra={"base": self.base, "limit": MAX_ADAPTERS},
                )
                complete = False
                break
        for name, found in self._fresh.items():
            known.pop(name, None)
            if found is not None:
                known[name] = found
        if complete:
            if named < len(self._known):
                for name in self._known.keys() - known.keys():
                    self._settling.gone(self._known[name])
            self._settling.keep(known)
            self._tell(self._store.skipped, empty=not known)
        if not len(known) == len(self._known) == named or not self.listed:
            log.info(
                "adapters listed",
                extra={"base": self.base, "store": self._store.url, "adapters": len(known)},
            )
        if not len(known) == len(self._known) == same:
            self._known = known
            self.version += 1
        self.listed = True
        self.versions.listed(known, time.monotonic(), complete=complete)

    @property
    def skipped(self) -> Skipped:
        """What the last complete listing left out."""
        return self._store.skipped

    def _tell(self, skipped: Skipped, *, empty: bool) -> None:
        """Logs each folder that is left out, once. Also warns of a store without adapters, since a
        wrong prefix looks like that.
        """
        where = {"base": self.base, "store": self._store.url}
        for one in skipped.shown:
            if one.key not in self._logged:
                log.warning("folder skipped", extra={**where, "folder": one.key, "reason": one.why})
        if empty and "" not in self._logged:
            log.warning(
                "no adapters in the store: nothing there has an adapter_config.json; "
                "is the path right?",
                extra=where,
            )
        self._logged = {one.key for one in skipped.shown} | ({""} if empty else set())

    async def find(self, name: str) -> StoredAdapter:
        """The version of the adapter that answers now. See `latest`, also for what it raises."""
        return self.versions.current(await self.latest(name))

    async def latest(self, name: str) -> StoredAdapter:
        """The adapter by name, as the store shows it. Concurrent questions for one unknown name ask
        the store once.

        Raises:
            AdapterNotFound: the store does not have it (remembered for NEGATIVE_TTL_S).
                StoreUnavailable: the store cannot say.
        """
        adapter = self._known.get(name)
        if adapter is None and not self.is_missing(name):
            adapter = await self._ask(name)
        if adapter is None:
            raise no_such_adapter(self.base, name, self._hint(name))
        return adapter

    def _hint(self, name: str) -> str:
        """Why a name that people see in the store is no adapter. Trainers put the adapter into a
        folder of its own below the one that people name.
        """
        if why := self.skipped.why(name):
            return f" Its folder in the store is skipped because {why}."
        begin = f"{name}/checkpoint-"
        found = [known for known in self._known if known.startswith(begin)]
        if not found:
            return ""
        example = max(found, key=lambda known: (len(known), known))
        return (
            f" Its trainer's checkpoints lie one folder below: ask for `{example}`, or move it up."
        )

    async def look_again(self, name: str, *, whole: bool = False) -> StoredAdapter:
        """Like `latest`, but asks the store even if the name is known, because the adapter may have
        changed. With `whole`, the caller asserts that no upload is in progress, so the new version
        is taken at once.
        """
        was_known = name in self._known
        if whole:
            adapter = await asyncio.shield(self._ask_store(name, whole=True))
        else:
            adapter = await self._ask(name)
        if adapter is None:
            self._swap(name, None)
            self.versions.deleted(name, time.monotonic())
            gone = "does not exist any more" if was_known else "does not exist"
            raise AdapterNotFound(
                f"The adapter `{name}` of model `{self.base}` {gone}.", param="model"
            )
        return adapter

    async def kept(self, name: str, version: str) -> StoredAdapter | None:
        """An older version of an adapter, if the store keeps it. `version` is a digest, the
        beginning of one, or the store's own name of a version. Asked once in KEPT_TTL_S.
        """
        key, now = (name, version), time.monotonic()
        found, until = self._kept.get(key, (None, 0.0))
        if until > now:
            return found
        try:
            async with asyncio.timeout(FIND_TIMEOUT_S):
                found = await self._store.find_version(name, version)
        except TimeoutError as exc:
            raise StoreUnavailable(
                "The adapter store did not answer in time.", retry_after_s=5.0
            ) from exc
        self._kept.pop(key, None)
        self._kept[key] = found, now + (NEGATIVE_TTL_S if found is None else KEPT_TTL_S)
        if len(self._kept) > MAX_NEGATIVE:
            self._kept.popitem(last=False)
        return found

    def refused(self, adapter: StoredAdapter) -> None:
        """A worker found the version invalid. It may be half of an upload, so the store is asked
        again, at most once in LOOK_AGAIN_S for as long as somebody wants it. A refusal within that
        time after a look is followed by one at its end, so that the next request finds the rest.
        """
        self.versions.unusable(adapter)
        name, now = adapter.name, time.monotonic()
        _, look_at = self._refused.pop(name, ("", 0.0))
        if look_at <= now:
            look_at = max(now, look_at + LOOK_AGAIN_S)
            asyncio.get_running_loop().call_later(look_at - now, self._look_again_at_last, name)
        self._refused[name] = (adapter.digest, look_at)
        if len(self._refused) > MAX_NEGATIVE:
            self._refused.popitem(last=False)

    def _look_again_at_last(self, name: str) -> None:
        if name not in self._asking:
            self._question(name).add_done_callback(_take_exception)

    def is_settling(self, name: str) -> bool:
        """Whether an upload of this adapter seems to be in progress, so that the old version still
        answers.
        """
        return self._settling.is_pending(name)

    def _look(self, before: StoredAdapter | None, seen: StoredAdapter) -> StoredAdapter:
        """The version to use of an adapter that the store shows, `before` of it being known."""
        keep = self._worth_keeping(before)
        if before is None or (keep is not None and seen != keep and not is_whole(keep)):
            keep = self._worth_keeping(self._settling.last(seen.name))
        return self._settling.look(keep, seen, time.monotonic())

    def _worth_keeping(self, version: StoredAdapter | None) -> StoredAdapter | None:
        if version is None or self._refused.get(version.name, ("",))[0] == version.digest:
            return None
        return version

    def _swap(self, name: str, adapter: StoredAdapter | None) -> None:
        """Replaces the mapping by a changed copy, so a reader always sees a consistent one. With a
        hundred thousand names, the copy takes less than a millisecond.
        """
        known = self._known.copy()
        if adapter is not None:
            known[name] = adapter
        else:
            known.pop(name, None)
        self._known = known
        self.version += 1

    def is_missing(self, name: str) -> bool:
        return self._missing.get(name, 0.0) > time.monotonic()

    async def _ask(self, name: str) -> StoredAdapter | None:
        # One client's leaving must not cancel the question of the others.
        return await asyncio.shield(self._question(name))

    def _question(self, name: str) -> asyncio.Future[StoredAdapter | None]:
        asking = self._asking.get(name)
        if asking is None:
            asking = self._asking[name] = asyncio.ensure_future(self._ask_store(name))
            asking.add_done_callback(lambda _: self._asking.pop(name, None))
        return asking

    async def _ask_store(self, name: str, *, whole: bool = False) -> StoredAdapter | None:
        try:
            async with asyncio.timeout(FIND_TIMEOUT_S):
                adapter = await self._store.find(name)
        except TimeoutError as exc:
            raise StoreUnavailable(
                "The adapter store did not answer in time.", retry_after_s=5.0
            ) from exc
        if adapter is not None:
            if whole:
                self._settling.look(None, adapter, time.monotonic())
            else:
                adapter = self._look(self._known.get(name), adapter)
        self._fresh[name] = adapter
        if len(self._fresh) > MAX_NEGATIVE:
            del self._fresh[next(iter(self._fresh))]
        if adapter is not None:
            if adapter != self._known.get(name):
                self._swap(name, adapter)
            self.versions.found(adapter, time.monotonic())
            return adapter
        if (before := self._known.get(name)) is not None:
            self._settling.gone(before)
        self.miss(name)
        return None

    def miss(self, name: str) -> None:
        """The store has no such name, or nobody such a version (`name@digest`)."""
        self._missing[name] = time.monotonic() + NEGATIVE_TTL_S
        while len(self._missing) > MAX_NEGATIVE:
            self._missing.popitem(last=False)


def _take_exception(lookup: asyncio.Future[StoredAdapter | None]) -> None:
    """Nobody waits for the answer; a store that is down is heard of from the next listing."""
    if not lookup.cancelled():
        lookup.exception()


def no_such_adapter(base: str, name: str, hint: str = "") -> AdapterNotFound:
    return AdapterNotFound(
        f"The adapter `{name}` of model `{base}` does not exist.{hint}", param="model"
    )
