"""Pure. Aliases of adapters: a name that stands for one adapter or, by shares, for several. The
same shape in the config and in `PUT /admin/aliases`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from shared.adapters.identity import check_name
from shared.config.section import Finding, Section, read_section, shown, under
from shared.errors import AdapterNotFound

MAX_SHARES = 16
MAX_ALIASES = 1000
"""Of one base model."""
_DIGEST = re.compile(r"[0-9a-f]{8,16}\Z")


class ShareConfig(Section, frozen=True, kw_only=True):
    """A part of an alias's users: `weight` in relation to the other shares. `adapter` is a name, or
    `name@digest` for one version of it.
    """

    adapter: Annotated[str, Meta(min_length=1)]
    weight: Annotated[float, Meta(ge=0)] = 1.0

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> Iterator[Finding]:
        adapter, weight = values.get("adapter"), values.get("weight")
        if isinstance(adapter, str):
            name, at, digest = adapter.partition("@")
            yield from _name_rule(name, ("adapter",))
            if at and not _DIGEST.match(digest):
                yield Finding(
                    ("adapter",),
                    f"{shown(adapter)}: behind the @ goes a digest, or at least its "
                    "first 8 characters",
                )
        if isinstance(weight, float) and not math.isfinite(weight):
            yield Finding(("weight",), "expected a number")


class RollbackConfig(Section, frozen=True, kw_only=True):
    """A share whose errors exceed `error_rate`, and the others' rate, over at least `min_requests`
    in `window_s` gets no more requests.
    """

    error_rate: Annotated[float, Meta(gt=0, le=1)] = 0.05
    min_requests: Annotated[int, Meta(ge=1)] = 50
    window_s: Annotated[float, Meta(gt=0, le=86_400)] = 60.0


class AliasConfig(Section, frozen=True, kw_only=True):
    """What an alias stands for. `rollback: null` switches the automatic rollback off."""

    shares: tuple[Any, ...]
    rollback: RollbackConfig | None = msgspec.field(default_factory=RollbackConfig)

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> Iterator[Finding]:
        shares = values.get("shares")
        if shares is None:
            return
        if not 1 <= len(shares) <= MAX_SHARES:
            yield Finding(("shares",), f"expected 1 to {MAX_SHARES} shares, got {len(shares)}")
            return
        read = []
        for n, raw in enumerate(shares):
            share, findings = read_section(ShareConfig, raw, ("shares", n))
            # an unknown key in a share leaves nothing that could hold
            yield from (replace(found, severity="error") for found in findings)
            read.append(share)
        good = [share for share in read if share is not None]
        if len({share.adapter for share in good}) < len(good):
            yield Finding(
                ("shares",),
                "an adapter stands twice; give it one share with the sum of the weights",
            )
        if len(good) == len(read) and not any(share.weight for share in good):
            yield Finding(("shares",), "every weight is 0; somebody must answer")

    @property
    def parts(self) -> tuple[ShareConfig, ...]:
        return tuple(
            raw if isinstance(raw, ShareConfig) else msgspec.convert(raw, ShareConfig)
            for raw in self.shares
        )


def plain_alias(raw: object) -> object:
    """`v7`, a list of shares or `{adapter: v7}` -> the long form; whatever else stays as it is, to
    be refused with its place.
    """
    match raw:
        case str():
            return {"shares": [{"adapter": raw}]}
        case list() | tuple():
            return {"shares": list(raw)}
        case Mapping() if "adapter" in raw and "shares" not in raw:
            return {
                "shares": [{"adapter": raw["adapter"]}],
                **{key: value for key, value in raw.items() if key != "adapter"},
            }
        case _:
            return raw


def alias_findings(aliases: Mapping[str, Any]) -> Iterator[Finding]:
    """What is wrong with a mapping of aliases in their long form."""
    if len(aliases) > MAX_ALIASES:
        yield Finding((), f"expected at most {MAX_ALIASES} aliases, got {len(aliases)}")
    for name, raw in aliases.items():
        yield from _name_rule(name, (name,))
        yield from under((), read_section(AliasConfig, raw, (name,))[1])


def _name_rule(name: str, path: tuple[str, ...]) -> Iterator[Finding]:
    try:
        check_name(name)
    except AdapterNotFound as exc:
        yield Finding(path, exc.message)
