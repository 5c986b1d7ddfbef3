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

from gateway.adapters.settling import Settling
from gateway.adapters.versions import Versions
from shared.adapters.identity import StoredAdapter
from shared.errors import AdapterNotFound, LoraplexError, StoreUnavailable
from shared.stores import AdapterStore, Skipped

log = logging.getLogger("loraplex.catalog")

MAX_ADAPTERS = 100_000  # per base model; more are not listed, but still found by name
NEGATIVE_TTL_S = 5.0  # a name that was not found is not asked for again within this time
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
        self._settling = Settling(settle_s)
        self._known: dict[str, StoredAdapter] = {}
        self._missing: OrderedDict[str, float] = OrderedDict()
        self._asking: dict[str, asyncio.Future[StoredAdapter | None]] = {}
        # what workers found invalid: name -> (digest, when the store was asked again)
        self._refused: OrderedDict[str, tuple[str, float]] = OrderedDict()
        # what single questions found since the running listing began: newer than it
        self._fresh: dict[str, StoredAdapter | None] = {}
        self._told: set[str] = set()  # keys of skipped folders, and "" of an empty store
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
            adapter = self._settling.look(self._worth_keeping(before), seen, time.monotonic())
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
        """A warning for each folder that is left out, once; and for a store without adapters, which
        a wrong prefix has.
        """
        where = {"base": self.base, "store": self._store.url}
        for one in skipped.shown:
            if one.key not in self._told:
                log.warning("folder skipped", extra={**where, "folder": one.key, "reason": one.why})
        if empty and "" not in self._told:
            log.warning(
                "no adapters in the store: nothing there has an adapter_config.json; "
                "is the path right?",
                extra=where,
            )
        self._told = {one.key for one in skipped.shown} | ({""} if empty else set())

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
        """Why a name that people see in the store is none; trainers leave an adapter in a folder of
        its own below the one that people name.
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
        """As `latest`, but asks the store now, whatever is known: the adapter changed since it was
        listed. `whole`: somebody says that no upload is under way, so that nothing has to settle.
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

    def refused(self, adapter: StoredAdapter) -> None:
        """A worker found the version invalid. It may be half of an upload, so the store is asked
        again, at most once in LOOK_AGAIN_S for as long as somebody wants it.
        """
        self.versions.unusable(adapter)
        name, now = adapter.name, time.monotonic()
        _, asked_at = self._refused.pop(name, ("", 0.0))
        look = now - asked_at >= LOOK_AGAIN_S and name not in self._asking
        self._refused[name] = (adapter.digest, now if look else asked_at)
        if len(self._refused) > MAX_NEGATIVE:
            self._refused.popitem(last=False)
        if look:
            self._question(name).add_done_callback(_heard)

    def is_settling(self, name: str) -> bool:
        """The store shows what may be half of an upload, and the version before it goes on."""
        return self._settling.is_pending(name)

    def _worth_keeping(self, version: StoredAdapter | None) -> StoredAdapter | None:
        if version is None or self._refused.get(version.name, ("",))[0] == version.digest:
            return None
        return version

    def _swap(self, name: str, adapter: StoredAdapter | None) -> None:
        """A copy, so that whoever reads the mapping has it whole: under a millisecond for a hundred
        thousand.
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
            before = None if whole else self._worth_keeping(self._known.get(name))
            adapter = self._settling.look(before, adapter, time.monotonic())
        self._fresh[name] = adapter
        if len(self._fresh) > MAX_NEGATIVE:
            del self._fresh[next(iter(self._fresh))]
        if adapter is not None:
            if adapter != self._known.get(name):
                self._swap(name, adapter)
            self.versions.found(adapter, time.monotonic())
            return adapter
        self.miss(name)
        return None

    def miss(self, name: str) -> None:
        """The store has no such name, or nobody such a version (`name@digest`)."""
        self._missing[name] = time.monotonic() + NEGATIVE_TTL_S
        while len(self._missing) > MAX_NEGATIVE:
            self._missing.popitem(last=False)


def _heard(asked: asyncio.Future[StoredAdapter | None]) -> None:
    """Nobody waits for the answer; a store that is down is heard of from the next listing."""
    if not asked.cancelled():
        asked.exception()


def no_such_adapter(base: str, name: str, hint: str = "") -> AdapterNotFound:
    return AdapterNotFound(
        f"The adapter `{name}` of model `{base}` does not exist.{hint}", param="model"
    )
