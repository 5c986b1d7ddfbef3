"""Shell. Keeps adapters pinned and preloaded. It compares what is wanted with what the workers'
heartbeats show, and sends the missing commands.

Every gateway process does this on its own. If two of them send the same command, the worker carries
it out once. Operators' changes are in a file that all processes read.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from gateway.adapters.catalog import Catalog
from gateway.adapters.pins import Pins, PinState, missing_commands
from gateway.adapters.usage import AdapterUsage
from gateway.fleet.commands import SendCommand
from gateway.fleet.fleet import Fleet
from gateway.fleet.worker_view import WorkerView
from shared.adapters.identity import AdapterKey, AdapterRef, key_of
from shared.errors import ConfigError, LoraplexError
from shared.link.messages import AdapterAction, WorkerId
from shared.runtime.state_file import POLL_S, StateFile

log = logging.getLogger("loraplex.reconciler")
clock = time.monotonic

LOOK_S = 0.5
SETTLE_S = 4 * POLL_S
"""What was changed just now is left alone for this long: another process may already
know better.
"""
RETRY_S = 10.0
MAX_OPEN = 64  # commands of this process without an answer yet; further ones wait
DueCommand: TypeAlias = tuple[AdapterAction, AdapterKey]


@dataclass(slots=True)
class _SentCommands:
    """One life (epoch) of one worker: the commands it got and their results."""

    epoch: int
    preloaded: set[AdapterKey] = field(default_factory=set)
    pinned: set[AdapterKey] = field(default_factory=set)
    unpinned: set[AdapterKey] = field(default_factory=set)
    """Each adapter is unpinned once. If it is pinned again, a gateway of another machine wants it;
    the two would otherwise undo each other for ever.
    """
    due: dict[DueCommand, float] = field(default_factory=dict)
    """Command -> earliest time to send it. A command that is no longer due is forgotten."""


class Reconciler:
    """`state` is what operators changed, as far as this process knows."""

    def __init__(
        self,
        fleet: Fleet,
        send_command: SendCommand,
        catalogs: Mapping[str, Catalog | None],
        pins: Mapping[str, Pins],
        file: StateFile[PinState],
        usage: AdapterUsage,
        refresh_s: float,
    ) -> None:
        """Raises ConfigError if the file cannot be read."""
        self._fleet, self._send_command = fleet, send_command
        self._catalogs = catalogs
        self._pins = pins
        self._file = file
        self._usage = usage
        self._refresh_s = refresh_s
        self.state = file.read()
        self._sent: dict[WorkerId, _SentCommands] = {}
        self._open: dict[asyncio.Future[None], None] = {}
        self._logged: dict[tuple[str, str], str] = {}

    def pins(self, base: str) -> Pins:
        return self._pins[base]

    def configure(self, pins: Mapping[str, Pins]) -> None:
        """The config's pins are these from now on."""
        self._pins = pins

    def wanted_on(self, worker: WorkerView) -> list[AdapterRef]:
        """What is pinned there or preloaded, as far as the store's listing knows it."""
        base = worker.heartbeat.base
        catalog, pins = self._catalogs.get(base), self._pins.get(base)
        if catalog is None or pins is None:
            return []
        names = dict.fromkeys((*sorted(pins.wanted(self.state, worker.id)), *pins.preload))
        found = [stored for name in names if (stored := catalog.known.get(name)) is not None]
        return [AdapterRef(base, s.name, catalog.versions.current(s).digest) for s in found]

    async def change(self, change: Callable[[PinState], PinState]) -> None:
        """Changes the pins for every process of this machine; the change survives a restart. Raises
        what `change` raises, or ConfigError.
        """
        try:
            self.state = await asyncio.to_thread(self._file.update, change)
        except OSError as exc:
            raise ConfigError(
                f"{self._file.path} cannot be written: {exc.strerror}; pins are kept there"
            ) from exc

    async def follow(self) -> None:
        """Takes over what other processes change."""
        async for state in self._file.changes():
            self.state = state

    async def look_up(self) -> None:
        """Asks the stores at each refresh for wanted names that no listing shows. Logs each missing
        name once.
        """
        while True:
            for base, catalog in self._catalogs.items():
                if catalog is not None and catalog.listed:
                    for name in sorted(self._pins[base].names(self.state)):
                        await self._find(catalog, base, name)
            await asyncio.sleep(
                self._refresh_s
                if all(c is None or c.listed for c in self._catalogs.values())
                else LOOK_S
            )

    async def run(self) -> None:
        while True:
            now = clock()
            workers = [w for w in self._fleet if w.routable]
            self._sent = {w.id: self._sent_to(w) for w in workers}
            for worker in workers:
                self._reconcile(worker, self._sent[worker.id], now)
            await asyncio.sleep(LOOK_S)

    # ---- inside ----------------------------------------------------------------------------------

    def _sent_to(self, worker: WorkerView) -> _SentCommands:
        sent = self._sent.get(worker.id)
        return (
            sent
            if sent is not None and sent.epoch == worker.heartbeat.epoch
            else _SentCommands(worker.heartbeat.epoch)
        )

    def _reconcile(self, worker: WorkerView, sent: _SentCommands, now: float) -> None:
        base = worker.heartbeat.base
        catalog, pins = self._catalogs.get(base), self._pins.get(base)
        if catalog is None or pins is None:
            return
        current = catalog.versions.current  # a good new version takes over without a command
        digests = {
            name: current(stored).digest
            for name in pins.names(self.state)
            if (stored := catalog.known.get(name))
        }
        pinned = {name: digests.get(name) for name in pins.wanted(self.state, worker.id)}
        preload = {name: digests[name] for name in pins.preload if name in digests}
        wanted = [
            o
            for o in missing_commands(pinned, preload, worker.held, sent.preloaded)
            if o[0] is not AdapterAction.UNPIN or o[1] not in sent.unpinned
        ]
        sent.due = {command: when for command, when in sent.due.items() if command in wanted}
        sent.pinned |= {key for key, state in worker.held.items() if state.pinned}
        for command in wanted:
            action, key = command
            # Another process may have changed what this one has not read yet. So only what is new
            # is done at once.
            settled = action is AdapterAction.LOAD or (
                action is AdapterAction.PIN and key not in sent.pinned
            )
            if (
                sent.due.setdefault(command, now if settled else now + SETTLE_S) <= now
                and len(self._open) < MAX_OPEN
            ):
                self._send(worker, sent, action, key)

    def _send(
        self, worker: WorkerView, sent: _SentCommands, action: AdapterAction, key: AdapterKey
    ) -> None:
        catalog = self._catalogs[worker.heartbeat.base]
        assert catalog is not None
        ref = AdapterRef(worker.heartbeat.base, *key)
        sent.due[action, key] = float("inf")
        latest = catalog.known.get(ref.name)
        future = self._send_command(
            worker, action, ref, catalog.versions.current(latest) if latest is not None else None
        )
        self._open[future] = None
        future.add_done_callback(lambda f: self._ended(f, worker.id, sent, action, ref))

    def _ended(
        self,
        future: asyncio.Future[None],
        worker: WorkerId,
        sent: _SentCommands,
        action: AdapterAction,
        ref: AdapterRef,
    ) -> None:
        del self._open[future]
        key = key_of(ref)
        error = None if future.cancelled() else future.exception()
        sent.due[action, key] = clock() + (SETTLE_S if error is None else RETRY_S)
        facts = {"adapter": str(ref), "worker": worker, "action": action.name.lower()}
        if error is None:
            if action is AdapterAction.LOAD:
                sent.preloaded.add(key)
            elif action is AdapterAction.UNPIN:
                sent.unpinned.add(key)
            else:
                sent.unpinned.discard(key)
            if action is not AdapterAction.UNPIN:
                self._usage.worked(ref)
                self._keep(ref)
            log.info("adapter command done", extra=facts)
        elif isinstance(error, LoraplexError):
            self._usage.failed(ref, error)
            if self._say(ref.base, ref.name, f"{ref.digest} {error.code}"):
                log.warning(
                    "adapter command failed",
                    extra={**facts, "code": error.code, "reason": error.message},
                )

    def _keep(self, ref: AdapterRef) -> None:
        """What is pinned or preloaded counts as served, so that a bad new version does not replace
        it.
        """
        catalog = self._catalogs[ref.base]
        latest = catalog.known.get(ref.name) if catalog is not None else None
        if (
            catalog is not None
            and latest is not None
            and (current := catalog.versions.current(latest)).digest == ref.digest
        ):
            catalog.versions.use(current, clock())

    async def _find(self, catalog: Catalog, base: str, name: str) -> None:
        try:
            await catalog.find(name)
        except LoraplexError as exc:
            if self._say(base, name, exc.code):
                log.warning(
                    "an adapter to be pinned or preloaded was not found",
                    extra={"base": base, "adapter": name, "reason": exc.message},
                )
        else:
            self._logged.pop((base, name), None)

    def _say(self, base: str, name: str, what: str) -> bool:
        """Logs a fact about a name. False if it is the same as last time."""
        new = self._logged.get((base, name)) != what
        self._logged[base, name] = what
        return new
