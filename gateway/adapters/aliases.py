"""Pure. Aliases in force: what the config says, what operators changed at run time, and which
shares were rolled back.

A user's share is found by weighted rendezvous hashing (Schindelhauer and Schomaker, "Weighted
Distributed Hash Tables", 2005): each share draws a number from the hash of alias, adapter and user,
and the smallest -ln(u) / weight wins. So every user stays with one share; a change of one weight
moves users only to or from that share, in the least number; and when a share is rolled back only
its own users move.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from shared.config.aliases import AliasConfig, RollbackConfig


class Share(msgspec.Struct, frozen=True):
    """`adapter` is a name or `name@digest`; `weight` counts in relation to the other shares."""

    adapter: str
    weight: float = 1.0


class Alias(msgspec.Struct, frozen=True):
    shares: tuple[Share, ...]
    rollback: RollbackConfig | None = None


class RollbackRecord(msgspec.Struct, frozen=True):
    """A share was rolled back. `at` is in seconds since 1970."""

    reason: str
    at: float


class Kept(msgspec.Struct, frozen=True):
    """What the state file holds of one alias: an operator's own (None: the config's holds), and the
    shares that were rolled back.

    `rolled_back_of` are the shares that the rollbacks were about: once the alias has others, they
    are history.
    """

    alias: Alias | None = None
    rollbacks: dict[str, RollbackRecord] = {}
    rolled_back_of: tuple[Share, ...] = ()


class AliasState(msgspec.Struct, frozen=True):
    """The state file: base model -> alias -> what is kept of it."""

    bases: dict[str, dict[str, Kept]] = {}


@dataclass(frozen=True, slots=True)
class ActiveAliases:
    """An alias as it holds now. `live` are the shares that get requests."""

    name: str
    alias: Alias
    source: str  # "config" or "runtime"
    rollbacks: Mapping[str, RollbackRecord]
    live: tuple[Share, ...]


def from_config(config: AliasConfig) -> Alias:
    return Alias(tuple(Share(s.adapter, s.weight) for s in config.parts), config.rollback)


def in_force(configured: Mapping[str, Alias], kept: Mapping[str, Kept]) -> dict[str, ActiveAliases]:
    """The aliases of one base model: an operator's own before the config's."""
    found = {}
    for name in sorted({*configured, *(n for n, k in kept.items() if k.alias is not None)}):
        entry = kept.get(name, Kept())
        alias = entry.alias or configured[name]
        rollbacks = entry.rollbacks if entry.rolled_back_of == alias.shares else {}
        live = tuple(s for s in alias.shares if s.weight > 0 and s.adapter not in rollbacks)
        found[name] = ActiveAliases(
            name, alias, "runtime" if entry.alias is not None else "config", rollbacks, live
        )
    return found


def pick(alias: str, shares: Sequence[Share], user: bytes) -> Share:
    """The share of a user, the same on every gateway and for ever, as long as the shares stay.
    `shares` have weights above 0.
    """
    if len(shares) == 1:
        return shares[0]
    return min(
        shares, key=lambda share: -math.log(_draw(alias, share.adapter, user)) / share.weight
    )


def _draw(alias: str, adapter: str, user: bytes) -> float:
    """Uniform in (0, 1]."""
    drawn = hashlib.blake2b(
        b"%b\0%b\0%b" % (alias.encode(), adapter.encode(), user), digest_size=8
    ).digest()
    return (int.from_bytes(drawn, "big") + 1) / (1 << 64)


# ---- changes of the state ------------------------------------------------------------------------


def with_alias(state: AliasState, base: str, name: str, alias: Alias) -> AliasState:
    """An operator's word; what was rolled back before is forgotten."""
    return _with(state, base, name, Kept(alias))


def without_alias(state: AliasState, base: str, name: str) -> AliasState:
    """The config's alias of this name holds again, if there is one."""
    return _with(state, base, name, None)


def with_rollback(
    state: AliasState, base: str, found: ActiveAliases, adapter: str, rollback: RollbackRecord
) -> AliasState:
    """Without effect if the alias has changed meanwhile, or if no other share would be left."""
    kept = state.bases.get(base, {}).get(found.name, Kept())
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
        Kept(kept.alias, {**rollbacks, adapter: rollback}, found.alias.shares),
    )


def _with(state: AliasState, base: str, name: str, kept: Kept | None) -> AliasState:
    entries = {n: k for n, k in state.bases.get(base, {}).items() if n != name}
    if kept is not None:
        entries[name] = kept
    return AliasState({**state.bases, base: entries})
