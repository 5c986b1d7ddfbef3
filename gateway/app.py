"""Shell. The factory of a gateway process: settings -> objects -> routes. What the process does
with them (its signals, its loops, its end) is in __main__.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from gateway.accounts.keys import Keys
from gateway.accounts.ledger import Ledger
from gateway.accounts.limiter import Limiter
from gateway.accounts.shared_table import SharedTable
from gateway.adapters import alias_store
from gateway.adapters.alias_store import AliasStore
from gateway.adapters.aliases import Alias, AliasState, from_config
from gateway.adapters.catalog import Catalog
from gateway.adapters.moves import AdapterMoves
from gateway.adapters.pins import Pins, PinState
from gateway.adapters.reconciler import Reconciler
from gateway.adapters.resolver import Resolver
from gateway.adapters.rollout import Rollout
from gateway.adapters.usage import AdapterUsage
from gateway.adapters.versions import VersionStage
from gateway.admin.actions import AdminActions
from gateway.admin.adapters import AdapterAdmin
from gateway.admin.aliases import AliasAdmin
from gateway.admin.autoscale import ScalingAdmin
from gateway.admin.live import LiveAdmin
from gateway.admin.requests import RequestAdmin
from gateway.admin.scope import AdminScope
from gateway.admin.usage import UsageAdmin
from gateway.admin.workers import WorkerAdmin
from gateway.api.accounting import Accounting
from gateway.api.exchange import GenerationServices, RequestLimits
from gateway.api.schema import Bounds
from gateway.dispatch.dispatcher import Dispatcher
from gateway.dispatch.journal import JournalBounds
from gateway.dispatch.queue.admission import Admission, QueueBound
from gateway.dispatch.request import InFlightRequest
from gateway.dispatch.settings import DispatchSettings, TimeAndChance
from gateway.dispatch.transport import LinkTransport
from gateway.fleet.fleet import Fleet
from gateway.http.browsers import BrowserPolicy
from gateway.routes import Routes
from gateway.routing.registry import make_policy
from gateway.supervisor.autoscaling.reports import ModelStatus
from gateway.supervisor.endpoints import endpoints
from gateway.supervisor.load_link import LoadLink
from gateway.telemetry.access_log import AccessLog
from gateway.telemetry.aggregation import ProcessAggregator
from gateway.telemetry.prometheus import Metrics, Watched
from gateway.telemetry.sampling import FleetSampler
from shared.config.llm import LLMConfig, LoraConfig, Settings
from shared.link.endpoint import SUSPECT_S
from shared.runtime.state_file import StateFile
from shared.stores import open_store

LATE_BEATS = 3
"""A worker whose heartbeats are this many intervals late gets no new requests."""
LIMITS_FILE = "limits"
"""In the run folder: what all gateway processes of the machine count together."""

Catalogs = Mapping[str, Catalog | None]
"""By base model; None where it has no adapter store."""


@dataclass(frozen=True, slots=True)
class GatewayProcess:
    """The objects of one gateway process. `loops` run, by name, for as long as it serves."""

    name: str
    fleet: Fleet
    link: LinkTransport
    dispatcher: Dispatcher
    routes: Routes
    aggregator: ProcessAggregator
    loops: Mapping[str, Callable[[], Coroutine[object, object, None]]]


@contextlib.asynccontextmanager
async def open_gateway(
    settings: Settings, index: int, run_dir: Path
) -> AsyncIterator[GatewayProcess]:
    """Bound to its workers' sockets and connected to its stores; it listens to no client yet.

    Raises ConfigError, LinkError or StoreUnavailable where that cannot be.
    """
    name = f"g{index}"
    async with contextlib.AsyncExitStack() as stack:
        catalogs = await stack.enter_async_context(_catalogs(settings))
        fleet, admission = _fleet(settings), _admission(settings)
        watched = _watched(settings, fleet, admission, catalogs)
        metrics = Metrics(name, watched, clock=time.monotonic)
        aggregator = _aggregator(settings, index, run_dir, metrics)
        link = LinkTransport(endpoints(settings, index, run_dir), settings, name, metrics)
        dispatcher = Dispatcher(
            fleet,
            make_policy(settings.gateway.routing_policy),
            admission,
            link,
            metrics,
            _dispatch_settings(settings),
            TimeAndChance(time.monotonic, random.Random(), _call_at),
        )
        stack.enter_context(link.open(dispatcher))
        load_link = _load_link(settings, run_dir, index, dispatcher)
        metrics.watch_scaling(lambda: dispatcher.scaling)
        aliases = AliasStore(_aliases(settings), _alias_file(settings), metrics)
        table = stack.enter_context(contextlib.closing(SharedTable(run_dir / LIMITS_FILE, index)))
        ledger = _ledger(settings)
        stack.push_async_callback(ledger.close)
        accounting = Accounting(Limiter(table), ledger, metrics)
        services = _services(settings, name, dispatcher, catalogs, aliases, accounting)
        stack.callback(services.access.flush)
        reconciler = _reconciler(settings, dispatcher, catalogs, services.usage)
        rollouts = [
            Rollout(c.base, c.versions, fleet, dispatcher.send_command, metrics)
            for c in _listed(catalogs)
        ]
        await stack.enter_async_context(aggregator.open())
        yield GatewayProcess(
            name,
            fleet,
            link,
            dispatcher,
            _routes(settings, services, catalogs, aliases, reconciler, aggregator, load_link),
            aggregator,
            {
                "count": aggregator.run,
                "supervisor": load_link.run,
                "pins": reconciler.follow,
                "look up pins": reconciler.look_up,
                "reconciler": reconciler.run,
                "aliases": aliases.run,
                "keys": services.keys.run,
                "usage": ledger.run,
                "recorder": FleetSampler(metrics.recorder, watched, time.monotonic).run,
                **{f"catalog {c.base}": c.run for c in _listed(catalogs)},
                **{f"rollout {r.base}": r.run for r in rollouts},
            },
        )


@contextlib.asynccontextmanager
async def _catalogs(settings: Settings) -> AsyncIterator[Catalogs]:
    async with contextlib.AsyncExitStack() as stack:
        catalogs: dict[str, Catalog | None] = {}
        for model in settings.models:
            catalogs[model.model_id] = None
            if model.adapters_path is not None and model.lora_config is not None:
                store = await stack.enter_async_context(
                    open_store(model.adapters_path, msgspec.structs.asdict(model.lora_config.store))
                )
                catalogs[model.model_id] = Catalog(
                    model.model_id,
                    store,
                    settings.gateway.catalog_refresh_s,
                    settings.gateway.adapter_settle_s,
                )
        yield catalogs


def _listed(catalogs: Catalogs) -> list[Catalog]:
    return [c for c in catalogs.values() if c is not None]


def _fleet(settings: Settings) -> Fleet:
    most = {m.model_id: m.deployment_config.max_ongoing_requests for m in settings.models}
    g = settings.gateway
    return Fleet(g.lease_s, most, silent_s=max(SUSPECT_S, LATE_BEATS * g.heartbeat_s))


def _admission(settings: Settings) -> Admission[InFlightRequest]:
    g = settings.gateway
    bounds = {m.model_id: _bound(m) for m in settings.models}
    return Admission(g.max_queued_requests, g.queue_timeout_s, bounds)


def _bound(model: LLMConfig) -> QueueBound:
    config = model.deployment_config
    pressure = config.backpressure_config
    return QueueBound(
        config.max_queued_requests, pressure.status_code == 429, pressure.retry_after_s
    )


def _watched(
    settings: Settings, fleet: Fleet, admission: Admission[InFlightRequest], catalogs: Catalogs
) -> Watched:
    queued = {m.model_id: functools.partial(admission.depth, m.model_id) for m in settings.models}
    refused = {
        c.base: functools.partial(c.versions.count, VersionStage.REFUSED) for c in _listed(catalogs)
    }
    skipped = {c.base: functools.partial(_skipped, c) for c in _listed(catalogs)}
    return Watched(fleet, queued, refused, skipped)


def _skipped(catalog: Catalog) -> dict[str, int]:
    return {reason.value: count for reason, count in catalog.skipped.counts}


def _aggregator(
    settings: Settings, index: int, run_dir: Path, metrics: Metrics
) -> ProcessAggregator:
    """`metrics` go on from where an earlier life of this process has stopped."""
    aggregator = ProcessAggregator(run_dir, index, settings.gateway.processes, metrics.snapshot)
    earlier = aggregator.earlier()
    if earlier is not None:
        metrics.restore(earlier)
    return aggregator


def _dispatch_settings(settings: Settings) -> DispatchSettings:
    g = settings.gateway
    journals = JournalBounds(g.resume_max_tokens, g.resume_max_bytes)
    return DispatchSettings(g.max_concurrent_requests, g.progress_s or 0.0, journals)


def _call_at(when: float, call: Callable[[], None]) -> None:
    """`when` is on time.monotonic; the loop's own clock may be another one."""
    asyncio.get_running_loop().call_later(max(0.0, when - time.monotonic()), call)


def _load_link(settings: Settings, run_dir: Path, index: int, dispatcher: Dispatcher) -> LoadLink:
    """To the supervisor. Moves of adapters are asked for by the first process alone."""
    moves = AdapterMoves(dispatcher.fleet, dispatcher.send_command) if index == 0 else None
    bases = [m.model_id for m in settings.models]

    def on_status(models: Mapping[str, ModelStatus]) -> None:
        dispatcher.on_scaling(models)
        if moves is not None:
            moves.on_scaling(models)

    link = LoadLink(run_dir, f"g{index}", lambda: dispatcher.loads(bases), on_status)
    dispatcher.on_nobody_serves = link.nudge
    return link


def _services(
    settings: Settings,
    name: str,
    dispatcher: Dispatcher,
    catalogs: Catalogs,
    aliases: AliasStore,
    accounting: Accounting,
) -> GenerationServices:
    g = settings.gateway
    return GenerationServices(
        dispatcher,
        Resolver(catalogs, aliases, dispatcher.fleet),
        accounting.metrics,
        Keys(g),
        accounting,
        RequestLimits(
            g.max_body_bytes,
            g.slow_reader_bytes,
            g.request_timeout_s,
            g.resume,
            Bounds(**msgspec.structs.asdict(g.bounds)),
            g.http.max_unfinished_body_bytes,
        ),
        AccessLog(name, g.log_level),
        AdapterUsage(),
        asyncio.get_running_loop(),
    )


def _reconciler(
    settings: Settings, dispatcher: Dispatcher, catalogs: Catalogs, usage: AdapterUsage
) -> Reconciler:
    pins = {}
    for model in settings.models:
        lora = model.lora_config or LoraConfig()
        pins[model.model_id] = Pins(model.model_id, lora.pin, lora.preload, model.max_loras)
    return Reconciler(
        dispatcher.fleet,
        dispatcher.send_command,
        catalogs,
        pins,
        StateFile(_state_dir(settings) / "pins.json", PinState),
        usage,
        settings.gateway.catalog_refresh_s,
    )


def _routes(
    settings: Settings,
    services: GenerationServices,
    catalogs: Catalogs,
    aliases: AliasStore,
    reconciler: Reconciler,
    aggregator: ProcessAggregator,
    load_link: LoadLink,
) -> Routes:
    dispatcher, resolver, usage = services.dispatcher, services.resolver, services.usage
    scope = AdminScope(dispatcher, catalogs)
    stores = {m.model_id: m.adapters_path or "" for m in settings.models}
    actions = AdminActions(scope, stores, reconciler, usage)
    recorder = services.metrics.recorder
    scaling = ScalingAdmin(dispatcher, load_link, [m.model_id for m in settings.models])
    return Routes(
        services,
        catalogs,
        AdapterAdmin(scope, actions, reconciler, usage, resolver),
        AliasAdmin(aliases, resolver, catalogs, dispatcher.fleet, dispatcher.send_command),
        aggregator,
        scaling,
        UsageAdmin(services.accounting.ledger),
        WorkerAdmin(dispatcher, [m.model_id for m in settings.models]),
        BrowserPolicy(settings.gateway),
        RequestAdmin(recorder, services.access.process),
        LiveAdmin(dispatcher, recorder, scaling, services.keys),
    )


def _ledger(settings: Settings) -> Ledger:
    months = settings.gateway.usage_months
    return Ledger(_state_dir(settings) / "usage" if months else None, months)


def _state_dir(settings: Settings) -> Path:
    return Path(settings.gateway.state_dir).expanduser()


def _alias_file(settings: Settings) -> StateFile[AliasState]:
    return StateFile(_state_dir(settings) / alias_store.FILE, AliasState)


def _aliases(settings: Settings) -> dict[str, dict[str, Alias]]:
    return {
        m.model_id: {name: from_config(c) for name, c in m.lora_config.alias_configs.items()}
        for m in settings.models
        if m.lora_config is not None
    }
