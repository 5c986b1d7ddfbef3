"""Shell. The factory of one gateway process: it makes the objects from the settings, and the routes
from the objects. `__main__.py` runs them.
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
from typing import TypeAlias

import msgspec

from gateway.accounts.keys import Keys
from gateway.accounts.ledger import Ledger
from gateway.accounts.limiter import Limiter
from gateway.accounts.shared_limits import SharedLimits
from gateway.adapters import alias_store
from gateway.adapters.alias_store import AliasStore
from gateway.adapters.aliases import AliasState
from gateway.adapters.catalog import Catalog
from gateway.adapters.handover import AdapterHandovers
from gateway.adapters.pins import PinState
from gateway.adapters.reconciler import Reconciler
from gateway.adapters.resolver import Resolver
from gateway.adapters.usage import AdapterUsage
from gateway.adapters.version_rollout import VersionRollout
from gateway.adapters.versions import VersionStage
from gateway.admin.actions import AdminActions
from gateway.admin.adapters import AdapterAdmin
from gateway.admin.advise import AdviseAdmin
from gateway.admin.aliases import AliasAdmin
from gateway.admin.autoscale import ScalingAdmin
from gateway.admin.context import AdminContext
from gateway.admin.history import HistoryAdmin
from gateway.admin.live_feed import LiveFeedAdmin, LiveSnapshot
from gateway.admin.operator_api import OperatorAPI
from gateway.admin.usage import UsageAdmin
from gateway.admin.workers import WorkerAdmin
from gateway.api.accounting import Accounting
from gateway.api.deadlines import Deadlines
from gateway.api.services import GenerationServices
from gateway.batches.batch_api import BatchAPI
from gateway.batches.runner import BatchRunner
from gateway.batches.store import BatchStore
from gateway.dispatch.deadly.requests import DeadlyRequests
from gateway.dispatch.dispatcher import Dispatcher
from gateway.dispatch.queue.admission import Admission
from gateway.dispatch.request import InFlightRequest
from gateway.dispatch.settings import TimeAndChance
from gateway.dispatch.workers.transport import LinkTransport
from gateway.fleet.fleet import Fleet
from gateway.http.browser_policy import BrowserPolicy
from gateway.reload import (
    Configurable,
    LiveSettings,
    configured_aliases,
    configured_pins,
    dispatch_settings,
    most_requests,
    queue_bounds,
    request_limits,
)
from gateway.routes import Routes
from gateway.routing.registry import make_policy
from gateway.supervisor.autoscaling.reports import ModelStatus
from gateway.supervisor.autoscaling.scaling_client import ScalingClient
from gateway.supervisor.link_addresses import is_only_gateway, link_addresses
from gateway.telemetry.access_log import AccessLog
from gateway.telemetry.aggregation import ProcessAggregator
from gateway.telemetry.fleet_sampler import FleetSampler
from gateway.telemetry.prometheus import GaugeSources, Metrics
from gateway.telemetry.traces import Traces
from shared.config.llm import Settings
from shared.config.settings_file import FollowedConfig
from shared.link.link_end import SUSPECT_S
from shared.runtime.state_file import StateFile
from shared.stores import open_store

LATE_HEARTBEATS = 3
"""A worker gets no new requests once its heartbeats are late by this many intervals."""
LIMITS_FILE = "limits.v2"  # a new name for each new meaning of its numbers
"""The file in the run folder with the limits that all gateway processes of the machine share."""
DEADLY_FILE = "deadly.v1"
"""Likewise the file with what they know of requests that workers died of."""

Catalogs = Mapping[str, Catalog | None]
"""Base model -> its catalog. None: it has no adapter store."""


Loop: TypeAlias = Callable[[], Coroutine[object, object, None]]
"""A coroutine function that runs for as long as the gateway serves."""


@dataclass(frozen=True, slots=True)
class GatewayProcess:
    """The objects of one gateway process. `loops` are coroutines, by name, that run as long as it
    serves.
    """

    name: str
    fleet: Fleet
    link: LinkTransport
    dispatcher: Dispatcher
    routes: Routes
    aggregator: ProcessAggregator
    live: LiveSettings
    loops: Mapping[str, Loop]


@contextlib.asynccontextmanager
async def open_gateway(
    settings: Settings, config: FollowedConfig, index: int, run_dir: Path
) -> AsyncIterator[GatewayProcess]:
    """A gateway process with its link bound and its stores connected. It does not listen for
    clients yet. `config` is followed while it runs.

    Raises ConfigError, LinkError or StoreUnavailable.
    """
    async with contextlib.AsyncExitStack() as stack:
        core = await stack.enter_async_context(_open_core(settings, index, run_dir))
        fleet, dispatcher, metrics = core.fleet, core.dispatcher, core.metrics
        scaling_client = _scaling_client(settings, run_dir, index, dispatcher)
        metrics.watch_scaling(lambda: dispatcher.scaling, lambda: dispatcher.from_zero)
        aliases = AliasStore(configured_aliases(settings), _alias_file(settings), metrics)
        table = SharedLimits(run_dir / LIMITS_FILE, index)
        stack.callback(table.close)
        ledger = _ledger(settings)
        stack.push_async_callback(ledger.close)
        limiter = Limiter(table)
        stack.callback(limiter.flush)
        accounting = Accounting(limiter, ledger, metrics)
        services = _services(settings, core, aliases, accounting)
        stack.callback(services.access.flush)
        if services.traces is not None:
            stack.callback(services.traces.close)
            metrics.gen_ai = True
        reconciler = _reconciler(settings, dispatcher, core.catalogs, services.usage)
        dispatcher.warm_with(reconciler.wanted_on)
        browsers = BrowserPolicy(settings.gateway)
        operators = _operators(settings, services, core, aliases, reconciler, scaling_client)
        batch_store = BatchStore(_state_dir(settings) / "batches")
        batches = BatchAPI(batch_store, services.keys)
        routes = Routes(services, core.catalogs, operators, core.aggregator, browsers, batches)
        parts = Configurable(
            services, core.admission, aliases, reconciler, browsers, routes.configure
        )
        live = LiveSettings(settings, config, parts)
        await stack.enter_async_context(core.aggregator.open(operators.history.answer))
        loops = core.loops() | _service_loops(services, reconciler, aliases)
        loops |= {
            "supervisor": scaling_client.run,
            "config": live.run,
            "advisor": operators.advise.run,
        }
        if index == 0:
            # The processes of a machine share the batch files, so only one of them runs batches.
            loops["batches"] = BatchRunner(batch_store, services).run
        yield GatewayProcess(
            core.name, fleet, core.link, dispatcher, routes, core.aggregator, live, loops
        )


def _service_loops(
    services: GenerationServices, reconciler: Reconciler, aliases: AliasStore
) -> dict[str, Loop]:
    accounting = services.accounting
    return {
        "pins": reconciler.follow,
        "look up pins": reconciler.look_up,
        "reconciler": reconciler.run,
        "aliases": aliases.run,
        "keys": services.keys.run,
        "limits": accounting.limiter.run,
        "usage": functools.partial(
            accounting.ledger.run,
            lambda: accounting.note_progress(services.dispatcher.each_open()),
        ),
    }


@dataclass(frozen=True, slots=True)
class _Core:
    """The parts that know the workers and the adapters, with the link between them."""

    name: str
    catalogs: Catalogs
    fleet: Fleet
    admission: Admission[InFlightRequest]
    gauge_sources: GaugeSources
    metrics: Metrics
    aggregator: ProcessAggregator
    link: LinkTransport
    dispatcher: Dispatcher

    def loops(self) -> dict[str, Loop]:
        metrics, send_command = self.metrics, self.dispatcher.send_command
        loops: dict[str, Loop] = {
            "count": self.aggregator.run,
            "recorder": FleetSampler(metrics.recorder, self.gauge_sources, time.monotonic).run,
        }
        for c in _listed(self.catalogs):
            loops[f"catalog {c.base}"] = c.run
            rollout = VersionRollout(c.base, c.versions, self.fleet, send_command, metrics)
            loops[f"rollout {c.base}"] = rollout.run
        return loops


@contextlib.asynccontextmanager
async def _open_core(settings: Settings, index: int, run_dir: Path) -> AsyncIterator[_Core]:
    name = f"g{index}"
    async with _catalogs(settings) as catalogs, contextlib.AsyncExitStack() as stack:
        fleet, admission = _fleet(settings), _admission(settings)
        gauge_sources = _gauge_sources(settings, fleet, admission, catalogs)
        metrics = Metrics(name, gauge_sources, clock=time.monotonic)
        aggregator = _aggregator(settings, index, run_dir, metrics)
        link = LinkTransport(link_addresses(settings, index, run_dir), settings, name, metrics)
        alone = is_only_gateway(settings)
        deadly = DeadlyRequests(run_dir / DEADLY_FILE, alone=alone, now=time.monotonic())
        stack.callback(deadly.close)
        dispatcher = Dispatcher(
            fleet,
            make_policy(settings.gateway.routing_policy),
            admission,
            link,
            metrics,
            dispatch_settings(settings),
            TimeAndChance(time.monotonic, random.Random(), _call_at),
            deadly,
        )
        with link.open(dispatcher.inbox):
            yield _Core(
                name,
                catalogs,
                fleet,
                admission,
                gauge_sources,
                metrics,
                aggregator,
                link,
                dispatcher,
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
    g = settings.gateway
    silent_s = max(SUSPECT_S, LATE_HEARTBEATS * g.heartbeat_s)
    return Fleet(g.lease_s, most_requests(settings), silent_s=silent_s, hang_s=g.hang_s)


def _admission(settings: Settings) -> Admission[InFlightRequest]:
    g = settings.gateway
    return Admission(g.max_queued_requests, g.queue_timeout_s, queue_bounds(settings))


def _gauge_sources(
    settings: Settings, fleet: Fleet, admission: Admission[InFlightRequest], catalogs: Catalogs
) -> GaugeSources:
    queued = {m.model_id: functools.partial(admission.depth, m.model_id) for m in settings.models}
    demand = {
        m.model_id: functools.partial(_demand, admission, m.model_id) for m in settings.models
    }
    refused = {
        c.base: functools.partial(c.versions.count, VersionStage.REFUSED) for c in _listed(catalogs)
    }
    skipped = {c.base: functools.partial(_skipped, c) for c in _listed(catalogs)}
    return GaugeSources(fleet, queued, demand, refused, skipped, lambda: len(asyncio.all_tasks()))


def _demand(admission: Admission[InFlightRequest], base: str) -> int:
    return admission.demand(base, time.monotonic())


def _skipped(catalog: Catalog) -> dict[str, int]:
    return {reason.value: count for reason, count in catalog.skipped.counts}


def _aggregator(
    settings: Settings, index: int, run_dir: Path, metrics: Metrics
) -> ProcessAggregator:
    """After a restart, `metrics` go on from the counts that this process had saved."""
    aggregator = ProcessAggregator(run_dir, index, settings.gateway.processes, metrics.snapshot)
    earlier = aggregator.earlier()
    if earlier is not None:
        metrics.restore(earlier)
    return aggregator


def _call_at(when: float, call: Callable[[], None]) -> None:
    """Calls at a time on time.monotonic. The event loop's own clock may be a different one."""
    asyncio.get_running_loop().call_later(max(0.0, when - time.monotonic()), call)


def _scaling_client(
    settings: Settings, run_dir: Path, index: int, dispatcher: Dispatcher
) -> ScalingClient:
    """The connection to the supervisor. Only the first process hands adapters over, so that each is
    loaded once.
    """
    handovers = AdapterHandovers(dispatcher.fleet, dispatcher.send_command) if index == 0 else None
    bases = [m.model_id for m in settings.models]

    def on_status(models: Mapping[str, ModelStatus]) -> None:
        dispatcher.on_scaling(models)
        if handovers is not None:
            handovers.on_scaling(models)

    client = ScalingClient(run_dir, f"g{index}", lambda: dispatcher.loads(bases), on_status)
    if not client.has_supervisor:
        dispatcher.started_elsewhere(m.model_id for m in settings.models if not m.least_workers)
    dispatcher.on_nobody_serves = client.nudge
    return client


def _services(
    settings: Settings, core: _Core, aliases: AliasStore, accounting: Accounting
) -> GenerationServices:
    g, dispatcher, loop = settings.gateway, core.dispatcher, asyncio.get_running_loop()
    return GenerationServices(
        dispatcher,
        Resolver(core.catalogs, aliases, dispatcher.fleet),
        accounting.metrics,
        Keys(g),
        accounting,
        request_limits(settings),
        AccessLog(core.name, g.log_level),
        AdapterUsage(),
        loop,
        Deadlines(loop),
        Traces(g.traces, core.name) if g.traces.endpoint is not None else None,
    )


def _reconciler(
    settings: Settings, dispatcher: Dispatcher, catalogs: Catalogs, usage: AdapterUsage
) -> Reconciler:
    return Reconciler(
        dispatcher.fleet,
        dispatcher.send_command,
        catalogs,
        configured_pins(settings),
        StateFile(_state_dir(settings) / "pins.json", PinState),
        usage,
        settings.gateway.catalog_refresh_s,
    )


def _operators(
    settings: Settings,
    services: GenerationServices,
    core: _Core,
    aliases: AliasStore,
    reconciler: Reconciler,
    scaling_client: ScalingClient,
) -> OperatorAPI:
    dispatcher, resolver, usage = services.dispatcher, services.resolver, services.usage
    catalogs = core.catalogs
    admin_context = AdminContext(dispatcher, catalogs)
    stores = {m.model_id: m.adapters_path or "" for m in settings.models}
    actions = AdminActions(admin_context, stores, reconciler, usage)
    recorder = services.metrics.recorder
    bases = [m.model_id for m in settings.models]
    ask_others = core.aggregator.ask_others
    history = HistoryAdmin(dispatcher, recorder, core.name, ask_others, bases, usage)
    scaling = ScalingAdmin(dispatcher, scaling_client, bases, history.queued_elsewhere)
    return OperatorAPI(
        AdapterAdmin(
            admin_context,
            actions,
            reconciler,
            usage,
            resolver,
            recorder.traffic,
            history.usage_elsewhere,
        ),
        AliasAdmin(aliases, resolver, catalogs, dispatcher.fleet, dispatcher.send_command),
        scaling,
        UsageAdmin(services.accounting.ledger),
        WorkerAdmin(dispatcher, bases),
        history,
        LiveFeedAdmin(
            dispatcher,
            LiveSnapshot(
                dispatcher,
                recorder,
                scaling,
                core.name,
                history.news if settings.gateway.processes > 1 else None,
            ),
            services.keys,
            services.accounting.limiter,
            services.metrics,
        ),
        AdviseAdmin(dispatcher, recorder.traffic, bases, settings.gateway.processes),
    )


def _ledger(settings: Settings) -> Ledger:
    months = settings.gateway.usage_months
    return Ledger(_state_dir(settings) / "usage" if months else None, months)


def _state_dir(settings: Settings) -> Path:
    return Path(settings.gateway.state_dir).expanduser()


def _alias_file(settings: Settings) -> StateFile[AliasState]:
    return StateFile(_state_dir(settings) / alias_store.FILE, AliasState)
