"""Pure. Which version of an adapter answers. The old one answers until the new one is loaded and
valid, or until the old one cannot be had any more.

The store's listing says which versions exist; this module says which is served. A name that this
process has served has a current version. When the store shows another one, a `VersionChange`
begins. The new version is prepared where the old one is (see version_placement.py), and then takes
over in one step. A version that is not valid is refused, and not tried again until its content
changes. After any other failure it is tried again later, at growing intervals. Versions that were
replaced or deleted leave the engines when nobody has used them for a while. Every table is bounded.

    WAITING --begin--> PREPARING --ready--> SWITCHED
       ^---fail-----------|   |----invalid--> REFUSED        lost (the old one is nowhere any more):
                              SWITCHED, from any of them
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from gateway.adapters.version_placement import KnownVersion, Prepare
from shared.adapters.identity import AdapterKey, StoredAdapter, key_of
from shared.errors import EngineFailure, InvalidAdapter, LoraplexError

RECENT_S = 3600.0
"""An adapter with a request within this time keeps its old version until the new one is checked.
That holds even if no engine has it now.
"""
FIRST_PAUSE_S, MAX_PAUSE_S = 1.0, 60.0
ENGINE_TRIES = 2
"""Engines that may die over a new version before it counts as refused."""
QUIET_S = 2.0
"""An old version leaves an engine after this long without a request: other gateways may switch a
little later and still ask for it.
"""
LINGER_S = 120.0
"""A replaced version is looked for in the engines at least this long: a request that queued for it
may bring it back.
"""
FORGET_S = 3600.0
EXPLICIT_S = 300.0
"""A version that was asked for by its digest within this time stays."""
MAX_SERVED = 20_000
MAX_CHANGES = 10_000
MAX_PREPARING = 8
MAX_RETIRED = 5_000
MAX_EXPLICIT = 5_000
MAX_OLDER = 4
"""Replaced versions of one adapter that are remembered, for `name@digest`."""
_SPEC = re.compile(r"[0-9a-f]{8,16}\Z")
DIGEST_LENGTH = 16


class VersionStage(Enum):
    WAITING = "waiting"
    PREPARING = "preparing"
    SWITCHED = "switched"
    REFUSED = "refused"


class VersionEvent(Enum):
    BEGIN = "begin"
    READY = "ready"
    FAIL = "fail"
    INVALID = "invalid"
    LOST = "lost"


NEXT = {
    (VersionStage.WAITING, VersionEvent.BEGIN): VersionStage.PREPARING,
    (VersionStage.PREPARING, VersionEvent.READY): VersionStage.SWITCHED,
    (VersionStage.PREPARING, VersionEvent.FAIL): VersionStage.WAITING,
    (VersionStage.PREPARING, VersionEvent.INVALID): VersionStage.REFUSED,
    (VersionStage.WAITING, VersionEvent.LOST): VersionStage.SWITCHED,
    (VersionStage.PREPARING, VersionEvent.LOST): VersionStage.SWITCHED,
    (VersionStage.REFUSED, VersionEvent.LOST): VersionStage.SWITCHED,
}


@dataclass(slots=True)
class VersionChange:
    """The change of one name from `old` to `new`. `code` and `reason` are of the last failure."""

    old: StoredAdapter
    new: StoredAdapter
    stage: VersionStage = VersionStage.WAITING
    until: float = 0.0
    attempts: int = 0
    code: str = ""
    reason: str = ""

    def on(self, event: VersionEvent) -> VersionStage:
        after = NEXT.get((self.stage, event))
        if after is None:
            raise AssertionError(f"{event} in {self.stage} of {self.new.name}@{self.new.digest}")
        self.stage = after
        return after


@dataclass(slots=True)
class _Served:
    adapter: StoredAdapter
    used_at: float


@dataclass(slots=True)
class _Retired:
    since: float
    busy_at: float


class Versions:
    """The versions of one base model's adapters that this process has served. Times are seconds of
    one monotonic clock.
    """

    def __init__(self) -> None:
        self._served: OrderedDict[str, _Served] = OrderedDict()  # the longest unused first
        self._changes: OrderedDict[str, VersionChange] = OrderedDict()
        self._older: OrderedDict[str, tuple[StoredAdapter, ...]] = OrderedDict()
        self._retired: OrderedDict[AdapterKey, _Retired] = OrderedDict()
        self._explicit: OrderedDict[AdapterKey, float] = OrderedDict()

    # ---- what answers ----------------------------------------------------------------------------

    def current(self, latest: StoredAdapter) -> StoredAdapter:
        """The version that answers while the store shows `latest`."""
        served = self._served.get(latest.name)
        return served.adapter if served is not None else latest

    def of(self, latest: StoredAdapter) -> list[KnownVersion]:
        """The versions of a name that this process knows, the current one first."""
        current = self.current(latest)
        found = [KnownVersion(current.digest, "current", current)]
        if latest.digest != current.digest:
            change = self._changes.get(latest.name)
            refused = change is not None and change.stage is VersionStage.REFUSED
            found.append(KnownVersion(latest.digest, "refused" if refused else "preparing", latest))
        digests = {current.digest, latest.digest}
        return found + [
            KnownVersion(o.digest, "older", o)
            for o in self._older.get(latest.name, ())
            if o.digest not in digests
        ]

    def change(self, name: str) -> VersionChange | None:
        """The change of this name that is in progress or was refused. Read only."""
        return self._changes.get(name)

    def changes(self) -> Iterable[VersionChange]:
        return self._changes.values()

    def count(self, stage: VersionStage) -> int:
        return sum(c.stage is stage for c in self._changes.values())

    # ---- what happens ----------------------------------------------------------------------------

    def use(self, adapter: StoredAdapter, now: float) -> None:
        """A request is answered from this version, which is the current one."""
        served = self._served.get(adapter.name)
        if served is None:
            served = self._served[adapter.name] = _Served(adapter, now)
            if len(self._served) > MAX_SERVED:
                self._changes.pop(self._served.popitem(last=False)[0], None)
        elif served.adapter.digest != adapter.digest:
            return
        served.used_at = now
        self._served.move_to_end(adapter.name)
        if self._retired:
            self._retired.pop(key_of(adapter), None)

    def use_explicitly(self, key: AdapterKey, now: float) -> None:
        """A request names this version by its digest. The version stays in the engines for a while;
        the current version does not change.
        """
        self._explicit[key] = now
        self._explicit.move_to_end(key)
        if len(self._explicit) > MAX_EXPLICIT:
            self._explicit.popitem(last=False)

    def unusable(self, adapter: StoredAdapter) -> None:
        """The version is invalid, so it is not worth keeping."""
        served = self._served.get(adapter.name)
        if served is not None and served.adapter.digest == adapter.digest:
            self._forget(adapter.name)

    def lost(self, adapter: StoredAdapter, now: float) -> None:
        """This version cannot be had anywhere any more. What the store shows takes over at once."""
        served, change = self._served.get(adapter.name), self._changes.get(adapter.name)
        if served is None or served.adapter.digest != adapter.digest:
            return
        if change is None:
            self._forget(adapter.name)
        else:
            change.on(VersionEvent.LOST)
            self._switch(change, now)

    def listed(self, known: Mapping[str, StoredAdapter], now: float, *, complete: bool) -> None:
        """Takes the store's listing. Only names that were served are examined. A name that a
        complete listing lacks counts as deleted.
        """
        for name in [*self._served]:
            latest = known.get(name)
            if latest is not None:
                self.found(latest, now)
            elif complete:
                self.deleted(name, now)

    def found(self, latest: StoredAdapter, now: float) -> None:
        """The store now shows this version of a name."""
        served = self._served.get(latest.name)
        if served is None:
            return
        change = self._changes.get(latest.name)
        if latest.digest == served.adapter.digest:
            self._changes.pop(latest.name, None)  # the store shows the old content again
        elif change is None or change.new.digest != latest.digest:
            self._begin(VersionChange(served.adapter, latest))

    def deleted(self, name: str, now: float) -> None:
        served = self._served.get(name)
        if served is not None:
            self._forget(name)
            self._retire(served.adapter, now)
        self._older.pop(name, None)

    # ---- what is to be done ----------------------------------------------------------------------

    def due(self, now: float) -> list[Prepare]:
        """The changes to begin now; at most MAX_PREPARING run at once."""
        room = MAX_PREPARING - self.count(VersionStage.PREPARING)
        found: list[Prepare] = []
        for change in self._changes.values():
            if len(found) >= room:
                break
            if change.stage is VersionStage.WAITING and change.until <= now:
                change.on(VersionEvent.BEGIN)
                change.attempts += 1
                found.append(
                    Prepare(
                        change.old,
                        change.new,
                        now - self._served[change.new.name].used_at < RECENT_S,
                    )
                )
        return found

    def ready(self, new: StoredAdapter, now: float) -> bool:
        """The new version is loaded and valid: it answers from now on. False if the store has shown
        another one meanwhile.
        """
        change = self._preparing(new)
        if change is None:
            return False
        change.on(VersionEvent.READY)
        self._switch(change, now)
        return True

    def failed(self, new: StoredAdapter, error: LoraplexError, now: float) -> VersionStage:
        """The new version could not be made ready. It is REFUSED until the content changes, or
        WAITING for the next try.
        """
        change = self._preparing(new)
        if change is None:
            return VersionStage.WAITING
        change.code, change.reason = error.code, error.message
        if isinstance(error, InvalidAdapter) or (
            isinstance(error, EngineFailure) and change.attempts >= ENGINE_TRIES
        ):
            return change.on(VersionEvent.INVALID)
        change.until = now + min(FIRST_PAUSE_S * 2.0 ** (change.attempts - 1), MAX_PAUSE_S)
        return change.on(VersionEvent.FAIL)

    def leaving(
        self, in_flight: Callable[[AdapterKey], int | None], now: float
    ) -> list[AdapterKey]:
        """The replaced and deleted versions that should leave the engines now. `in_flight` gives
        the requests in flight, or None if no engine holds the version.
        """
        found = []
        for key, retired in [*self._retired.items()]:
            requests = in_flight(key)
            if requests:
                retired.busy_at = now
            elif (
                requests is None and now - retired.since > LINGER_S
            ) or now - retired.since > FORGET_S:
                del self._retired[key]
            elif (
                requests is not None
                and now - retired.busy_at >= QUIET_S
                and now - self._explicit.get(key, -EXPLICIT_S) >= EXPLICIT_S
            ):
                found.append(key)
        return found

    # ---- inside ----------------------------------------------------------------------------------

    def _preparing(self, new: StoredAdapter) -> VersionChange | None:
        change = self._changes.get(new.name)
        return (
            change
            if change is not None
            and change.stage is VersionStage.PREPARING
            and change.new.digest == new.digest
            else None
        )

    def _begin(self, change: VersionChange) -> None:
        """Starts a change. At the bound the oldest refusal is forgotten; it would be refused again.
        Without a refusal to forget, the next listing shows the change again.
        """
        if change.new.name not in self._changes and len(self._changes) >= MAX_CHANGES:
            refused = next(
                (n for n, c in self._changes.items() if c.stage is VersionStage.REFUSED), None
            )
            if refused is None:
                return
            del self._changes[refused]
        self._changes[change.new.name] = change

    def _switch(self, change: VersionChange, now: float) -> None:
        name = change.new.name
        del self._changes[name]
        self._served[name].adapter = change.new
        self._retired.pop((name, change.new.digest), None)
        self._retire(change.old, now)
        older = [
            o
            for o in self._older.pop(name, ())
            if o.digest not in (change.old.digest, change.new.digest)
        ]
        self._older[name] = (change.old, *older)[:MAX_OLDER]
        if len(self._older) > MAX_SERVED:
            self._older.popitem(last=False)

    def _retire(self, adapter: StoredAdapter, now: float) -> None:
        self._retired[key_of(adapter)] = _Retired(now, now)
        if len(self._retired) > MAX_RETIRED:
            self._retired.popitem(last=False)

    def _forget(self, name: str) -> None:
        del self._served[name]
        self._changes.pop(name, None)


# ---- where ---------------------------------------------------------------------------------------


# ---- by digest -----------------------------------------------------------------------------------


def is_spec(text: str) -> bool:
    """Whether the text may stand after the `@` of `name@digest`: a digest, or at least its first 8
    characters.
    """
    return _SPEC.match(text) is not None
