"""Shell. What operators can ask over HTTP: which adapters are where, and what a request would cost.
docs/OPERATIONS.md is the manual.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping

from aiohttp import web

from gateway.adapters.reconciler import Reconciler
from gateway.adapters.resolver import Resolver
from gateway.adapters.usage import AdapterName, AdapterUsage, UsageRecord
from gateway.adapters.versions import VersionChange
from gateway.admin import adapter_views
from gateway.admin.actions import PREFIX, AdminActions
from gateway.admin.context import AdminContext
from gateway.admin.history import UsageElsewhere
from gateway.admin.parameters import Handler, choice, json_answer, number
from gateway.advisor.traffic import TrafficCounter
from gateway.routing.explanation import candidate_row
from shared.adapters.identity import StoredAdapter, check_name, key_of

# Prompt length that /admin/explain assumes, and the longest that it takes.
EXPLAINED_TOKENS, MAX_EXPLAINED_TOKENS = 128, 10**7
PAGE = 1000
LOOKED_AT_ONCE = 1000  # adapters between two turns of the loop


class AdapterAdmin:
    """Every path about adapters that needs an admin key."""

    def __init__(
        self,
        context: AdminContext,
        actions: AdminActions,
        reconciler: Reconciler,
        usage: AdapterUsage,
        resolver: Resolver,
        traffic: TrafficCounter,
        usage_elsewhere: Callable[[str, str], Awaitable[UsageElsewhere]],
    ) -> None:
        self._traffic, self._usage_elsewhere = traffic, usage_elsewhere
        self._context = context
        self._actions = actions
        self._reconciler = reconciler
        self._usage = usage
        self._resolver = resolver
        self._sorted: dict[str, tuple[Mapping[str, StoredAdapter], list[str]]] = {}

    def routes(self) -> dict[tuple[str, str], Handler]:
        return {
            ("GET", "/admin/explain"): self.explain,
            ("GET", "/admin/adapters"): self.adapters,
            ("GET", "/admin/skipped"): self.skipped,
            ("POST", "/v1/load_lora_adapter"): self._actions.load,
            ("POST", "/v1/unload_lora_adapter"): self._actions.unload,
        }

    def below(self, method: str, path: str) -> Handler | None:
        """The handler for paths that hold an adapter's name: GET /admin/adapters/{name}, POST
        /admin/adapters/{name}/{action}.
        """
        if not path.startswith(PREFIX):
            return None
        if method in ("GET", "HEAD"):
            return self.adapter
        do = self._actions
        actions = {"pin": do.pin, "unpin": do.unpin, "prefetch": do.prefetch, "evict": do.evict}
        return actions.get(path.rpartition("/")[2]) if method == "POST" else None

    # ---- looking ---------------------------------------------------------------------------------

    async def adapters(self, request: web.BaseRequest) -> web.Response:
        """One page of the table, sorted by base and name. The client sends `next` as `after` to get
        the following page. With `?workers=0` the rows do not say which workers have the adapter.
        """
        bases = (
            [choice("base", request.query["base"], self._context.catalogs)]
            if "base" in request.query
            else sorted(self._context.catalogs)
        )
        wanted = (
            choice("state", request.query["state"], adapter_views.STATES)
            if "state" in request.query
            else None
        )
        limit = int(number(request, "limit", PAGE, PAGE))
        last_base, _, last_name = request.query.get("after", "").partition(":")
        brief = request.query.get("workers") == "0"
        records = self._usage.with_others((await self._usage_elsewhere("", "")).records)
        rows: list[adapter_views.AdapterRow] = []
        follows = None
        for base in bases:
            if base < last_base:
                continue
            begin_after = last_name if base == last_base else ""
            async with contextlib.aclosing(self._rows(base, begin_after, wanted, records)) as found:
                async for row in found:
                    if len(rows) == limit:
                        follows = f"{rows[-1]['base']}:{rows[-1]['name']}"
                        break
                    if brief:
                        del row["workers"]
                    rows.append(row)
            if follows is not None:
                break
        skipped = sum(
            c.skipped.total for b in bases if (c := self._context.catalogs[b]) is not None
        )
        return json_answer({"adapters": rows, "next": follows, "skipped": skipped})

    async def _rows(
        self,
        base: str,
        begin_after: str,
        wanted: str | None,
        records: Mapping[AdapterName, UsageRecord],
    ) -> AsyncGenerator[adapter_views.AdapterRow, None]:
        """The rows of one base model in the state `wanted` (None: any), beginning after a name."""
        fleet = self._context.dispatcher.fleet
        held = adapter_views.holders(w for w in fleet if w.heartbeat.base == base)
        known = self._context.known(base)
        names = adapter_views.names_of(known, held, self._in_order(base))
        for n in range(adapter_views.after(names, begin_after), len(names)):
            if n % LOOKED_AT_ONCE == LOOKED_AT_ONCE - 1:
                await asyncio.sleep(0)  # other requests get a turn
            name = names[n]
            stored, on = known.get(name), held.get(name, ())
            record, change = records.get((base, name)), self._change(base, name)
            row = adapter_views.row(
                base, name, stored, on, record, change, self._on_disk(base, stored, change)
            )
            if wanted is None or wanted == row["state"]:
                yield row

    async def skipped(self, request: web.BaseRequest) -> web.Response:
        """Folders of the stores that are no adapters, with the reason: all counted, the first ones
        shown.
        """
        rows, total = [], 0
        for base, catalog in sorted(self._context.catalogs.items()):
            if catalog is not None and request.query.get("base", base) == base:
                total += catalog.skipped.total
                rows += [
                    {"base": base, "folder": s.key, "code": s.reason.value, "reason": s.why}
                    for s in catalog.skipped.shown
                ]
        return json_answer({"skipped": rows, "total": total})

    async def adapter(self, request: web.BaseRequest) -> web.Response:
        name = request.path.removeprefix(PREFIX)
        check_name(name)
        base = self._context.base(request)
        held = adapter_views.holders(
            w for w in self._context.dispatcher.fleet if w.heartbeat.base == base
        ).get(name, [])
        stored = await self._context.stored(base, name, needed=not held)
        elsewhere = await self._usage_elsewhere(base, name)
        record = self._usage.with_others(elsewhere.records).get((base, name))
        change = self._change(base, name)
        on_disk = self._on_disk(base, stored, change)
        row = adapter_views.row(base, name, stored, held, record, change, on_disk)
        pins = self._reconciler.pins(base)
        pinned_on = self._reconciler.state.pinned.get(base, {}).get(name, ())
        traffic = self._traffic.traffic(base, self._context.dispatcher.clock())
        everywhere = name in pins.wanted(self._reconciler.state)
        return json_answer(
            {
                **row,
                "to_be_pinned": "everywhere" if everywhere else list(pinned_on),
                "preload": name in pins.preload,
                "traffic": {
                    "requests": traffic.counts.get(name, 0) + elsewhere.recent,
                    "span_s": round(traffic.span_s, 1),
                },
            }
        )

    async def explain(self, request: web.BaseRequest) -> web.Response:
        """What each worker would cost a request for `?model=` now, best first, every term in
        milliseconds.
        """
        target = await self._resolver.resolve(request.query.get("model", ""), bytes)
        prompt_tokens = number(request, "prompt_tokens", EXPLAINED_TOKENS, MAX_EXPLAINED_TOKENS)
        routing_request = self._context.routing_request(
            target.base,
            target.adapter,
            target.stored,
            int(prompt_tokens),
            request.headers.get("x-session-id", ""),
        )
        found = self._context.dispatcher.explain(routing_request)
        return json_answer(
            {
                "model": request.query["model"],
                "policy": self._context.dispatcher.policy,
                "queued": self._context.dispatcher.queued(target.base),
                "workers": [candidate_row(c) for c in found],
            }
        )

    def _change(self, base: str, name: str) -> VersionChange | None:
        catalog = self._context.catalogs[base]
        return catalog.versions.change(name) if catalog is not None else None

    def _on_disk(
        self, base: str, stored: StoredAdapter | None, change: VersionChange | None
    ) -> list[str]:
        """The hosts that have the version that is served on disk, as far as known."""
        version = adapter_views.served(stored, change)
        if version is None:
            return []
        return self._context.dispatcher.fleet.on_disk(base, key_of(version))

    def _in_order(self, base: str) -> list[str]:
        known = self._context.known(base)
        kept = self._sorted.get(base)
        if kept is None or kept[0] is not known:
            kept = self._sorted[base] = known, sorted(known)
        return kept[1]
