"""Pure. Which adapters are to be pinned: the config's list, what operators changed since then
(stored in a file), and what a worker still lacks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TypeVar

import msgspec

from shared.adapters.identity import AdapterKey
from shared.errors import InvalidRequest, TooManyPins
from shared.link.messages import AdapterAction, AdapterState, Tier, WorkerId

T = TypeVar("T")


class PinState(msgspec.Struct, frozen=True):
    """What operators changed. `pinned`: base -> name -> workers (none named: all). `unpinned`: base
    -> names of the config's list that are not pinned any more.
    """

    pinned: dict[str, dict[str, tuple[WorkerId, ...]]] = {}
    unpinned: dict[str, tuple[str, ...]] = {}


class Pins(msgspec.Struct, frozen=True):
    """The pins of one base model: the config's list, and how many slots its workers have."""

    base: str
    configured: tuple[str, ...] = ()
    preload: tuple[str, ...] = ()
    slots: int = 0

    def wanted(self, state: PinState, worker: WorkerId | None = None) -> set[str]:
        """The names to be pinned on this worker. Without a worker: the names to be
        pinned on all.
        """
        everywhere = set(self.configured).difference(state.unpinned.get(self.base, ()))
        return everywhere | {
            n
            for n, workers in state.pinned.get(self.base, {}).items()
            if not workers or worker in workers
        }

    def names(self, state: PinState) -> set[str]:
        """All names that are pinned or preloaded anywhere."""
        return self.wanted(state) | set(state.pinned.get(self.base, ())) | set(self.preload)

    def pin(self, state: PinState, name: str, worker: WorkerId | None) -> PinState:
        """Adds a pin. Raises TooManyPins if no slot would be left for other adapters."""
        here = dict(state.pinned.get(self.base, {}))
        if worker is None:
            here[name] = ()
        elif name not in self.wanted(state):
            here[name] = tuple(dict.fromkeys((*here.get(name, ()), worker)))
        if worker is None and name in self.configured:
            del here[name]  # the config's own pins are not stored in the file
        kept = tuple(
            n for n in state.unpinned.get(self.base, ()) if n != name or worker is not None
        )
        changed = self._changed(state, here, kept)
        most = max(
            len(self.wanted(changed, w))
            for w in {w for workers in here.values() for w in workers} | {worker}
        )
        if most >= self.slots:
            raise TooManyPins(
                f"The adapter `{name}` cannot be pinned: {self.slots - 1} of a "
                f"worker's {self.slots} slots may be, since one must stay for "
                "the others; unpin one, or give the workers more slots "
                "(max_num_adapters_per_replica)."
            )
        return changed

    def unpin(self, state: PinState, name: str, worker: WorkerId | None) -> PinState:
        """Removes all pins of the name, or the one on this worker. Raises InvalidRequest if a
        worker is named but the name is pinned on all of them.
        """
        here = dict(state.pinned.get(self.base, {}))
        off = state.unpinned.get(self.base, ())
        if worker is not None:
            if name in self.wanted(state):
                raise InvalidRequest(
                    f"The adapter `{name}` is pinned on every worker; unpin it "
                    "everywhere, then pin it where you want it."
                )
            left = tuple(w for w in here.pop(name, ()) if w != worker)
            return self._changed(state, here | ({name: left} if left else {}), off)
        here.pop(name, None)
        if name in self.configured and name not in off:
            off = (*off, name)
        return self._changed(state, here, off)

    def _changed(
        self, state: PinState, pinned: dict[str, tuple[WorkerId, ...]], unpinned: tuple[str, ...]
    ) -> PinState:
        return PinState(
            _with(state.pinned, self.base, pinned), _with(state.unpinned, self.base, unpinned)
        )


def missing_commands(
    pinned: Mapping[str, str | None],
    preload: Mapping[str, str],
    held: Mapping[AdapterKey, AdapterState],
    preloaded: Collection[AdapterKey],
) -> Iterator[tuple[AdapterAction, AdapterKey]]:
    """The commands that a worker still has to get. `pinned` and `preload` map name -> digest (None:
    nobody knows it); `held` is what the worker has.

    A pinned name whose newest version is not there yet keeps the old one. The worker drops the old
    one as soon as it has the new one.
    """
    for name, digest in pinned.items():
        if digest is not None:
            state = held.get((name, digest))
            if state is None or not state.pinned:
                yield AdapterAction.PIN, (name, digest)
    for name, digest in preload.items():
        key = (name, digest)
        if key not in preloaded and name not in pinned:
            state = held.get(key)
            if state is None or state.loading or state.tier is not Tier.GPU:
                yield AdapterAction.LOAD, key
    for key, state in held.items():
        if state.pinned and key[0] not in pinned:
            yield AdapterAction.UNPIN, key


def _with(mapping: dict[str, T], key: str, value: T) -> dict[str, T]:
    changed = {**mapping, key: value}
    return changed if value else {k: v for k, v in changed.items() if k != key}
