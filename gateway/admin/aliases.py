"""Shell. `/admin/aliases`: shows what aliases stand for now, and changes them. A change takes
effect on all gateway processes of the machine within a second.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec
from aiohttp import web

from gateway.adapters.alias_store import AliasStore
from gateway.adapters.aliases import ActiveAliases, Alias, from_config
from gateway.adapters.catalog import Catalog
from gateway.adapters.model_names import split_model
from gateway.adapters.resolver import ResolvedModel, Resolver
from gateway.adapters.version_placement import in_engines
from gateway.admin.parameters import Handler
from gateway.fleet.commands import SendCommand
from gateway.fleet.fleet import Fleet
from gateway.fleet.rendezvous import Rendezvous
from gateway.http.json_responses import to_json
from shared.adapters.identity import key_of
from shared.config.aliases import MAX_ALIASES, AliasConfig, plain_alias
from shared.config.section import error_lines, read_section
from shared.errors import (
    AdapterNotFound,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    WorkerUnavailable,
)
from shared.link.messages import AdapterAction, Tier

PATH = "/admin/aliases"
LOAD_TIMEOUT_S = 120.0
"""Time limit of a PUT that first loads its target on a worker."""


class AliasAdmin:
    def __init__(
        self,
        alias_store: AliasStore,
        resolver: Resolver,
        catalogs: Mapping[str, Catalog | None],
        fleet: Fleet,
        send_command: SendCommand,
    ) -> None:
        self._alias_store, self._resolver, self._catalogs = alias_store, resolver, catalogs
        self._fleet, self._send_command = fleet, send_command
        self._homes: dict[str, Rendezvous] = {}

    def routes(self) -> dict[tuple[str, str], Handler]:
        return {("GET", PATH): self.show}

    def below(self, method: str, path: str) -> Handler | None:
        """The handler for paths that hold an alias's name."""
        return (
            {"PUT": self.put, "DELETE": self.delete}.get(method)
            if path.startswith(PATH + "/")
            else None
        )

    async def show(self, request: web.BaseRequest) -> web.Response:
        """Every alias in force, with the counts of this process."""
        return _json(
            {
                "aliases": [
                    self._entry(base, found)
                    for base in self._catalogs
                    for found in self._alias_store.of(base).values()
                ]
            }
        )

    async def put(self, request: web.BaseRequest) -> web.Response:
        """Sets an alias: `{"adapter": "v8"}` or `{"shares": [{"adapter": "v7", "weight": 90},
        ...]}`. Both may hold `rollback`.

        Unless `?now=1` is given, its adapters are loaded on some worker before the alias takes
        effect.
        """
        base, name = self._name(request)
        alias = _read(await request.read())
        known = self._alias_store.of(base)
        if name not in known and len(known) >= MAX_ALIASES:
            raise InvalidRequest(f"There are {MAX_ALIASES} aliases already; delete one first.")
        targets = [
            await self._target(base, share.adapter) for share in alias.shares if share.weight > 0
        ]
        if request.query.get("now", "") not in ("1", "true"):
            await self._load(targets)
        await self._alias_store.put(base, name, alias)
        return _json(self._entry(base, self._alias_store.of(base)[name]))

    async def delete(self, request: web.BaseRequest) -> web.Response:
        """Removes an operator's alias. The config's alias of the same name is in force again."""
        base, name = self._name(request)
        found = self._alias_store.of(base).get(name)
        if found is None:
            raise AdapterNotFound(f"There is no alias `{name}` of model `{base}`.", param="name")
        if found.source == "config" and not found.rollbacks:
            raise InvalidRequest(
                f"The alias `{name}` stands in the config file; take it out there, or "
                "PUT another meaning.",
                param="name",
            )
        await self._alias_store.delete(base, name)
        left = self._alias_store.of(base).get(name)
        return _json(
            {
                "deleted": f"{base}:{name}",
                "now": self._entry(base, left) if left is not None else None,
            }
        )

    # ---- inside ----------------------------------------------------------------------------------

    def _name(self, request: web.BaseRequest) -> tuple[str, str]:
        """(base, alias) from `base:alias` in the path, or from `alias` alone if only one base model
        has adapters.
        """
        text = request.path.removeprefix(PATH + "/")
        if ":" not in text:
            bases = [base for base, catalog in self._catalogs.items() if catalog is not None]
            if len(bases) != 1:
                raise InvalidRequest(
                    "Say which base model is meant: /admin/aliases/BASE:ALIAS.", param="name"
                )
            text = f"{bases[0]}:{text}"
        base, name = split_model(text, self._catalogs)
        if self._catalogs[base] is None or name is None:
            raise ModelNotFound(f"The model `{base}` is served without adapters.", param="name")
        return base, name

    async def _target(self, base: str, adapter: str) -> ResolvedModel:
        name, _, spec = adapter.partition("@")
        return await self._resolver.adapter(base, name, spec)

    async def _load(self, targets: list[ResolvedModel]) -> None:
        """Loads the targets that no worker has in a slot, each on its home. Raises the error of the
        first one that fails.
        """
        loads = []
        for target in targets:
            assert target.adapter is not None
            key, pool = key_of(target.adapter), self._fleet.pool(target.base)
            there = in_engines(key, pool)
            if any(w.tier_at(key) is Tier.GPU for w in there):
                continue
            if not pool.workers:
                raise WorkerUnavailable(
                    "No worker serves this model now; add ?now=1 (--now) to change the "
                    "alias all the same."
                )
            home = (
                there[0]
                if there
                else self._homes.setdefault(target.base, Rendezvous()).order(key, pool)[0]
            )
            loads.append(
                self._send_command(home, AdapterAction.LOAD, target.adapter, target.stored)
            )
        if not loads:
            return
        done, late = await asyncio.wait(loads, timeout=LOAD_TIMEOUT_S)
        for future in late:
            future.add_done_callback(lambda f: f.exception())
        for future in done:
            future.result()
        if late:
            raise Overloaded(
                f"The adapter was not loaded within {LOAD_TIMEOUT_S:g} s; the alias is "
                "as it was. ?now=1 (--now) changes it all the same."
            )

    def _entry(self, base: str, found: ActiveAliases) -> dict[str, object]:
        catalog = self._catalogs.get(base)
        shares = []
        for share in found.alias.shares:
            count, rollback = (
                self._alias_store.count(base, found, share.adapter),
                found.rollbacks.get(share.adapter),
            )
            rolled_back = (
                {"reason": rollback.reason, "at": rollback.at} if rollback is not None else None
            )
            shares.append(
                {
                    "adapter": share.adapter,
                    "weight": 0 if rollback is not None else share.weight,
                    "given_weight": share.weight,
                    "rolled_back": rolled_back,
                    "requests": count.requests,
                    "errors": count.errors,
                }
            )
        return {
            "model": f"{base}:{found.name}",
            "source": found.source,
            "shares": shares,
            "rollback": found.alias.rollback,
            "hides_adapter": catalog is not None and found.name in catalog.known,
        }


def _read(body: bytes) -> Alias:
    """Reads a PUT body. Raises InvalidRequest that names every fault."""
    try:
        raw: Any = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise InvalidRequest(f"The request body is not valid JSON: {exc}") from exc
    section, findings = read_section(AliasConfig, plain_alias(raw), ())
    lines = error_lines(findings, lambda _: "body")
    if section is None or lines:
        raise InvalidRequest("; ".join(lines).replace("body: ", ""))
    return from_config(section)


def _json(value: object) -> web.Response:
    return web.Response(body=to_json(value), content_type="application/json")
