"""Pure. The aliases in force: those of the config, those that operators changed at run time, and
the shares that were rolled back.

A user's share is found by weighted rendezvous hashing (Schindelhauer and Schomaker, "Weighted
Distributed Hash Tables", 2005). Each share draws a number from the hash of alias, adapter and user,
and the smallest -ln(u) / weight wins. So every user stays with one share. A change of one weight
moves users only to or from that share, and as few as possible. When a share is rolled back, only
its own users move.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from shared.config.aliases import AliasConfig, RollbackConfig


class AliasShare(msgspec.Struct, frozen=True):
    """`adapter` is a name or `name@digest`. `weight` is relative to the weights of the other
    shares.
    """

    adapter: str
    weight: float = 1.0


class Alias(msgspec.Struct, frozen=True):
    """What an alias stands for. `rollback` None: its shares are never rolled back automatically."""

    shares: tuple[AliasShare, ...]
    rollback: RollbackConfig | None = None


class RollbackRecord(msgspec.Struct, frozen=True):
    """A share was rolled back. `at` is in seconds since 1970."""

    reason: str
    at: float


class StoredAlias(msgspec.Struct, frozen=True):
    """What the state file holds of one alias: the alias that an operator has set (None: the
    config's is in force), and the shares that were rolled back.

    `rolled_back_of` are the shares of the alias at the time of the rollbacks. Once the alias has
    other shares, the rollbacks no longer apply.
    """

    alias: Alias | None = None
    rollbacks: dict[str, RollbackRecord] = {}
    rolled_back_of: tuple[AliasShare, ...] = ()


class AliasState(msgspec.Struct, frozen=True):
    """The state file: base model -> alias -> what the file holds of it."""

    bases: dict[str, dict[str, StoredAlias]] = {}


@dataclass(frozen=True, slots=True)
class ActiveAliases:
    """An alias that is in force now. `live` are the shares that get requests."""

    name: str
    alias: Alias
    source: str  # "config" or "runtime"
    rollbacks: Mapping[str, RollbackRecord]
    live: tuple[AliasShare, ...]


def from_config(config: AliasConfig) -> Alias:
    return Alias(tuple(AliasShare(s.adapter, s.weight) for s in config.parts), config.rollback)


def in_force(
    configured: Mapping[str, Alias], kept: Mapping[str, StoredAlias]
) -> dict[str, ActiveAliases]:
    """The aliases of one base model. An operator's alias comes before the config's of the same
    name.
    """
    found = {}
    for name in sorted({*configured, *(n for n, k in kept.items() if k.alias is not None)}):
        entry = kept.get(name, StoredAlias())
        alias = entry.alias or configured[name]
        rollbacks = entry.rollbacks if entry.rolled_back_of == alias.shares else {}
        live = tuple(s for s in alias.shares if s.weight > 0 and s.adapter not in rollbacks)
        found[name] = ActiveAliases(
            name, alias, "runtime" if entry.alias is not None else "config", rollbacks, live
        )
    return found


def pick(alias: str, shares: Sequence[AliasShare], user: bytes) -> AliasShare:
    """The share of a user. It is the same on every gateway and at any time, as long as the shares
    stay. `shares` have weights above 0.
    """
    if len(shares) == 1:
        return shares[0]
    return min(
        shares, key=lambda share: -math.log(_draw(alias, share.adapter, user)) / share.weight
    )


def _draw(alias: str, adapter: str, user: bytes) -> float:
    """A number that is uniform in (0, 1]."""
    drawn = hashlib.blake2b(
        b"%b\0%b\0%b" % (alias.encode(), adapter.encode(), user), digest_size=8
    ).digest()
    return (int.from_bytes(drawn, "big") + 1) / (1 << 64)


# ---- changes of the state ------------------------------------------------------------------------


def with_alias(state: AliasState, base: str, name: str, alias: Alias) -> AliasState:
    """Sets an operator's alias. Earlier rollbacks are forgotten."""
    return _with(state, base, name, StoredAlias(alias))


def without_alias(state: AliasState, base: str, name: str) -> AliasState:
    """Removes an operator's alias. The config's alias of this name is in force again, if there is
    one.
    """
    return _with(state, base, name, None)


def with_rollback(
    state: AliasState, base: str, found: ActiveAliases, adapter: str, rollback: RollbackRecord
) -> AliasState:
    """Rolls a share back. Nothing changes if the alias was changed meanwhile, or if no other share
    would be left.
    """
    kept = state.bases.get(base, {}).get(found.name, StoredAlias())
    if (kept.alias or found.alias).shares != found.alias.shares:
        return state
    rollbacks = kept.rollbacks if kept.rolled_back_of == found.alias.shares else {}
    if not any(
        s.weight > 0 and s.adapter != adapter and s.adapter not in rollbacks
        for s in found.alias.shares
    ):
        return state
    return _with(
        state,
        base,
        found.name,
        StoredAlias(kept.alias, {**rollbacks, adapter: rollback}, found.alias.shares),
    )


def _with(state: AliasState, base: str, name: str, kept: StoredAlias | None) -> AliasState:
    entries = {n: k for n, k in state.bases.get(base, {}).items() if n != name}
    if kept is not None:
        entries[name] = kept
    return AliasState({**state.bases, base: entries})
