"""Pure. Aliases of adapters. An alias is a name that stands for one adapter, or for several by
shares. It has the same shape in the config and in `PUT /admin/aliases`.
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
"""Aliases per base model."""
# a digest, not too short a beginning of one, or what the store itself calls a version
_VERSION = re.compile(r"(?![0-9a-f]{1,7}\Z)[\w.+/=-]{1,1024}\Z", re.ASCII)


class ShareConfig(Section, frozen=True, kw_only=True):
    """One share of an alias's users. `weight` is relative to the other shares. `adapter` is a name,
    or `name@version` for one version of it: a digest, or the store's own name of a version.
    """

    adapter: Annotated[str, Meta(min_length=1)]
    weight: Annotated[float, Meta(ge=0)] = 1.0

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> Iterator[Finding]:
        adapter, weight = values.get("adapter"), values.get("weight")
        if isinstance(adapter, str):
            name, at, digest = adapter.partition("@")
            yield from _name_rule(name, ("adapter",))
            if at and not _VERSION.match(digest):
                yield Finding(
                    ("adapter",),
                    f"{shown(adapter)}: behind the @ goes a digest, at least its first 8 "
                    "characters, or what the store calls a version",
                )
        if isinstance(weight, float) and not math.isfinite(weight):
            yield Finding(("weight",), "expected a number")


class RollbackConfig(Section, frozen=True, kw_only=True):
    """When a share loses its requests. Its error rate must exceed `error_rate` and the rate of the
    other shares, over at least `min_requests` within `window_s`.
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
            # with an unknown key in a share, the alias cannot be used at all
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
    """Turns `v7`, a list of shares, or `{adapter: v7}` into the long form. Anything else is
    returned as it is, so that it is refused with its place in the file.
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
