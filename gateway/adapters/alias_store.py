"""Shell. The aliases in force on this gateway process. They come from the config and from the state
file that all processes of the machine share.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gateway.adapters import aliases
from gateway.adapters.alias_rollback import OutcomeCount, ShareOutcomes
from gateway.adapters.aliases import ActiveAliases, Alias, AliasShare, AliasState, RollbackRecord
from gateway.telemetry.prometheus import Metrics
from shared.errors import ConfigError, LoraplexError
from shared.runtime.state_file import StateFile

log = logging.getLogger("loraplex.aliases")

FILE = "aliases.json"
MAX_UNWRITTEN = 100
"""Rollbacks on their way to the file; there are at most as many as shares."""


@dataclass(frozen=True, slots=True, eq=False)
class _Rollback:
    """A share of `found`, an alias of the base model `base`, that is rolled back."""

    base: str
    found: ActiveAliases
    adapter: str
    record: RollbackRecord

    def of(self, state: AliasState) -> AliasState:
        """The state with it. See aliases.with_rollback."""
        return aliases.with_rollback(state, self.base, self.found, self.adapter, self.record)


class AliasStore:
    """Reads the file once at the start; `run()` then follows its changes. Raises ConfigError if the
    file cannot be read.
    """

    def __init__(
        self,
        configured: Mapping[str, Mapping[str, Alias]],
        file: StateFile[AliasState],
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._configured, self._file, self._metrics, self._clock = configured, file, metrics, clock
        self._in_force: dict[str, dict[str, ActiveAliases]] = {}
        self._shares: dict[tuple[str, str], tuple[Alias, ShareOutcomes]] = {}
        self._unwritten: dict[_Rollback, None] = {}  # the file does not have them yet
        self._to_write = asyncio.Event()
        self._state = AliasState()
        self._apply(file.read())

    def configure(self, configured: Mapping[str, Mapping[str, Alias]]) -> None:
        """The config's aliases are these from now on."""
        self._configured = configured
        self._apply(self._state)

    def of(self, base: str) -> Mapping[str, ActiveAliases]:
        """The aliases of a base model, by name."""
        return self._in_force.get(base, {})

    def pick(self, found: ActiveAliases, user: bytes) -> AliasShare:
        """The user's share. If every share were rolled back, the first one would answer; no
        rollback leads to that.
        """
        return aliases.pick(found.name, found.live or found.alias.shares[:1], user)

    def note(self, base: str, name: str, adapter: str, *, failed: bool) -> None:
        """A request by alias has ended. Rolls its share back if the share now has
        too many errors.
        """
        found = self.of(base).get(name)
        if found is None or all(share.adapter != adapter for share in found.alias.shares):
            return  # the alias has changed since the request came
        self._metrics.alias_request(base, name, adapter, failed)
        reason = self._counts(base, found).note(adapter, failed, self._clock())
        if reason is None or adapter in found.rollbacks or len(self._unwritten) >= MAX_UNWRITTEN:
            return
        rollback = _Rollback(base, found, adapter, RollbackRecord(reason, round(time.time(), 3)))
        if rollback.of(self._state) is not self._state:
            log.error(
                "share of an alias rolled back",
                extra={"base": base, "alias": name, "adapter": adapter, "reason": reason},
            )
            self._metrics.alias_rollback(base, name)
            self._unwritten[rollback] = None
            self._to_write.set()
            self._apply(self._state)

    def count(self, base: str, found: ActiveAliases, adapter: str) -> OutcomeCount:
        """This process's requests of a share within its window."""
        return self._counts(base, found).count(adapter, self._clock())

    async def put(self, base: str, name: str, alias: Alias) -> None:
        """Sets an alias. Raises LoraplexError if the file cannot be written; then nothing has
        changed.
        """
        await self._update(lambda state: aliases.with_alias(state, base, name, alias))
        self._shares.pop((base, name), None)

    async def delete(self, base: str, name: str) -> None:
        """Removes an alias. Raises as `put`."""
        await self._update(lambda state: aliases.without_alias(state, base, name))
        self._shares.pop((base, name), None)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._write_rollbacks(), name="alias rollbacks")
            async for state in self._file.changes():
                self._apply(state)

    async def _write_rollbacks(self) -> None:
        while await self._to_write.wait():
            rollback = next(iter(self._unwritten))
            try:
                await self._update(rollback.of)
            except LoraplexError as exc:
                log.error(
                    "rollback not saved",
                    extra={
                        "base": rollback.base,
                        "alias": rollback.found.name,
                        "adapter": rollback.adapter,
                        "reason": exc.message,
                    },
                )
            finally:
                del self._unwritten[rollback]
                if not self._unwritten:
                    self._to_write.clear()

    async def _update(self, change: Callable[[AliasState], AliasState]) -> None:
        try:
            await asyncio.to_thread(self._file.update, change)
            self._apply(self._file.read())
        except OSError as exc:
            raise LoraplexError(
                f"The aliases could not be written to gateway.state_dir: {exc.strerror}."
            ) from exc
        except ConfigError as exc:
            raise LoraplexError(
                "The file of the aliases in gateway.state_dir cannot be read; mend or "
                f"remove {self._file.path.name}."
            ) from exc

    def _apply(self, state: AliasState) -> None:
        for rollback in self._unwritten:
            state = rollback.of(state)
        self._state = state
        bases = {*self._configured, *state.bases}
        changed = {
            b: aliases.in_force(self._configured.get(b, {}), state.bases.get(b, {})) for b in bases
        }
        for base, found in changed.items():
            before = self._in_force.get(base, {})
            for name in {*before, *found}:
                if found.get(name) != before.get(name):
                    log.info(
                        "alias",
                        extra={"base": base, "alias": name, "shares": _shown(found.get(name))},
                    )
                    if name not in found:
                        self._shares.pop((base, name), None)
        self._in_force = changed

    def _counts(self, base: str, found: ActiveAliases) -> ShareOutcomes:
        """The outcomes of an alias's shares; they start anew whenever the alias changes."""
        alias, shares = self._shares.get((base, found.name), (None, None))
        if shares is None or alias != found.alias:
            shares = ShareOutcomes(found.alias.rollback)
            self._shares[base, found.name] = (found.alias, shares)
        return shares


def _shown(found: ActiveAliases | None) -> str:
    if found is None:
        return "none"
    return ", ".join(
        f"{s.adapter}={0 if s.adapter in found.rollbacks else s.weight:g}"
        for s in found.alias.shares
    )
