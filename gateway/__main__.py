"""Shell. Composition root of a gateway process: settings -> objects -> TaskGroup; SIGTERM drains.

python -m gateway CONFIG [--index N] [--run-dir DIR]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import gc
import logging
import os
import random
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import uvloop

from gateway.accounts.keys import read_keys
from gateway.adapters import alias_store
from gateway.adapters.alias_store import AliasStore
from gateway.adapters.aliases import Alias, AliasState, from_config
from gateway.adapters.catalog import Catalog
from gateway.adapters.pins import Pins, PinState
from gateway.adapters.reconciler import Reconciler
from gateway.adapters.resolver import Resolver
from gateway.adapters.rollout import Rollout
from gateway.adapters.usage import AdapterUsage
from gateway.adapters.versions import VersionStage
from gateway.admin.actions import AdminActions
from gateway.admin.adapters import AdapterAdmin
from gateway.admin.aliases import AliasAdmin
from gateway.admin.scope import AdminScope
from gateway.api.generate import GenerationAPI, RequestLimits
from gateway.app import GatewayApp
from gateway.dispatch.admission import Admission, QueueBound
from gateway.dispatch.dispatcher import Dispatcher
from gateway.dispatch.request import InFlightRequest
from gateway.dispatch.transport import LinkTransport
from gateway.fleet.fleet import Fleet
from gateway.routing.registry import make_policy
from gateway.supervisor.endpoints import endpoints
from gateway.supervisor.listening import why_not_listening
from gateway.telemetry.access_log import AccessLog
from gateway.telemetry.aggregation import ProcessAggregator
from gateway.telemetry.prometheus import Metrics
from shared.config.handover import read_settings
from shared.config.llm import LLMConfig, LoraConfig, Settings
from shared.errors import ConfigError, LoraplexError
from shared.link import messages
from shared.runtime import log as runtime_log
from shared.runtime.process import follow_parent, on_stop_signals
from shared.runtime.state_file import StateFile
from shared.stores import open_store

log = logging.getLogger("loraplex.gateway")

TICK_S = 0.2
STALL_S = 1.0
ALIVE_S = 0.5
KEEPALIVE_S = 75.0
SHUTDOWN_S = 1.0  # after the drain, for handlers that are still writing
LAST_WORDS_S = 0.05  # handlers whose requests have just ended still write their answers
GC_THRESHOLD = (50_000, 50, 50)  # with 4,000 streams the default (700) would collect all the time


async def serve(settings: Settings, index: int, run_dir: Path) -> int:
    """One gateway process, until a signal. Returns the exit status."""
    g = settings.gateway
    name = f"g{index}"
    metrics = Metrics(name)
    aggregator = ProcessAggregator(run_dir, index, g.processes, metrics.snapshot)
    earlier = aggregator.earlier()
    if earlier is not None:
        metrics.restore(earlier)
    fleet = Fleet(
        g.lease_s, {m.model_id: m.deployment_config.max_ongoing_requests for m in settings.models}
    )
    admission: Admission[InFlightRequest] = Admission(
        g.max_queued_requests, g.queue_timeout_s, {m.model_id: _bound(m) for m in settings.models}
    )
    links = LinkTransport(endpoints(settings, index, run_dir), settings, name)
    dispatcher = Dispatcher(
        fleet,
        make_policy(g.routing_policy),
        admission,
        links,
        metrics,
        links.welcome,
        random.Random(),
        g.max_concurrent_requests,
        wake_at=lambda when: _wake(dispatcher, when),
        progress_s=g.progress_s or 0.0,
        # above those of this gateway's earlier life, unless it sent a million requests a second
        first_sid=time.time_ns() // 1000,
    )
    links.dispatcher = dispatcher
    metrics.watch(
        fleet, {m.model_id: functools.partial(admission.depth, m.model_id) for m in settings.models}
    )
    stopping = asyncio.Event()
    on_stop_signals(lambda sig: stopping.set())
    async with contextlib.AsyncExitStack() as stack:
        catalogs = await stack.enter_async_context(_catalogs(settings))
        limits = RequestLimits(g.max_body_bytes, g.slow_reader_bytes, g.request_timeout_s)
        access = AccessLog(name, g.log_level)
        stack.callback(access.flush)
        usage = AdapterUsage()
        reconciler = Reconciler(
            fleet,
            dispatcher.send_command,
            catalogs,
            _pins(settings),
            _pin_file(settings),
            usage,
            g.catalog_refresh_s,
        )
        alias_store = AliasStore(_aliases(settings), _alias_file(settings), metrics)
        resolver = Resolver(catalogs, alias_store, fleet)
        scope, stores = (
            AdminScope(dispatcher, catalogs),
            {m.model_id: m.adapters_path or "" for m in settings.models},
        )
        admin = AdapterAdmin(
            scope, AdminActions(scope, stores, reconciler, usage), reconciler, usage, resolver
        )
        aliases = AliasAdmin(alias_store, resolver, catalogs, fleet, dispatcher.send_command)
        generation = GenerationAPI(
            dispatcher, resolver, metrics, read_keys(g), limits, access, usage
        )
        api = GatewayApp(
            dispatcher, catalogs, resolver, metrics, generation, admin, aliases, aggregator
        )
        listed = [c for c in catalogs.values() if c is not None]
        rollouts = [
            Rollout(c.base, c.versions, fleet, dispatcher.send_command, metrics) for c in listed
        ]
        metrics.watch_versions(
            {c.base: functools.partial(c.versions.count, VersionStage.REFUSED) for c in listed}
        )
        await stack.enter_async_context(aggregator.open())
        async with _http(api, settings) as port:
            _announce(run_dir, index, port, links)
            log.info(
                "listening",
                extra={"url": f"http://{g.host}:{port}", "workers_at": links.control.endpoint},
            )
            gc.collect()
            gc.freeze()
            gc.set_threshold(*GC_THRESHOLD)
            async with asyncio.TaskGroup() as tasks:
                loops = [
                    tasks.create_task(_tick(dispatcher), name="tick"),
                    tasks.create_task(aggregator.run(), name="count"),
                    tasks.create_task(_alive(fleet, links, dispatcher, name), name="alive"),
                    tasks.create_task(reconciler.follow(), name="pins"),
                    tasks.create_task(reconciler.look_up(), name="look up pins"),
                    tasks.create_task(reconciler.run(), name="reconciler"),
                    tasks.create_task(alias_store.run(), name="aliases"),
                    *(tasks.create_task(c.run(), name=f"catalog {c.base}") for c in listed),
                    *(tasks.create_task(r.run(), name=f"rollout {r.base}") for r in rollouts),
                ]
                await stopping.wait()
                await _drain(dispatcher, g.drain_s)
                await aggregator.save()
                for loop in loops:
                    loop.cancel()
    for worker in fleet:
        links.send_control(
            messages.identity(worker.id, worker.beat.epoch),
            messages.encode(messages.Farewell(name)),
        )
    links.close()
    return 0


def _bound(model: LLMConfig) -> QueueBound:
    config = model.deployment_config
    pressure = config.backpressure_config
    return QueueBound(
        config.max_queued_requests, pressure.status_code == 429, pressure.retry_after_s
    )


@contextlib.asynccontextmanager
async def _catalogs(settings: Settings) -> AsyncIterator[dict[str, Catalog | None]]:
    async with contextlib.AsyncExitStack() as stack:
        catalogs: dict[str, Catalog | None] = {}
        for model in settings.models:
            catalogs[model.model_id] = None
            if model.adapters_path is not None and model.lora_config is not None:
                store = await stack.enter_async_context(
                    open_store(model.adapters_path, msgspec.structs.asdict(model.lora_config.store))
                )
                catalogs[model.model_id] = Catalog(
                    model.model_id, store, settings.gateway.catalog_refresh_s
                )
        yield catalogs


def _pin_file(settings: Settings) -> StateFile[PinState]:
    return StateFile(Path(settings.gateway.state_dir).expanduser() / "pins.json", PinState)


def _pins(settings: Settings) -> dict[str, Pins]:
    found = {}
    for model in settings.models:
        lora = model.lora_config or LoraConfig()
        found[model.model_id] = Pins(model.model_id, lora.pin, lora.preload, model.max_loras)
    return found


def _alias_file(settings: Settings) -> StateFile[AliasState]:
    return StateFile(Path(settings.gateway.state_dir).expanduser() / alias_store.FILE, AliasState)


def _aliases(settings: Settings) -> dict[str, dict[str, Alias]]:
    return {
        m.model_id: {name: from_config(c) for name, c in m.lora_config.alias_configs.items()}
        for m in settings.models
        if m.lora_config is not None
    }


@contextlib.asynccontextmanager
async def _http(api: GatewayApp, settings: Settings) -> AsyncIterator[int]:
    """Listens; yields the port. Raises ConfigError if it is taken."""
    g = settings.gateway
    # Without handler_cancellation aiohttp lets a handler run on after its client has left, and the
    # engine would go on generating.
    http_server = api.http_server(
        access_log=None, handler_cancellation=True, keepalive_timeout=KEEPALIVE_S
    )
    loop = asyncio.get_running_loop()
    try:
        server = await loop.create_server(
            http_server, g.host, g.port, backlog=4096, reuse_port=g.processes > 1 or None
        )
    except OSError as exc:
        raise ConfigError(why_not_listening(g, exc)) from exc
    try:
        # connections inherit it: a client that vanished without a word is noticed
        for listening in server.sockets:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await asyncio.sleep(0)  # what came before is handled
        http_server.pre_shutdown()
        await http_server.shutdown(SHUTDOWN_S)


async def _tick(dispatcher: Dispatcher) -> None:
    """If this process stood still (stopped, or its machine), the workers' beats lie unread: they
    are read first, one tick is left out.
    """
    waited = False
    while True:
        before = dispatcher.clock()
        await asyncio.sleep(TICK_S)
        waited = not waited and dispatcher.clock() - before > STALL_S
        if not waited:
            dispatcher.tick()


def _wake(dispatcher: Dispatcher, when: float) -> None:
    """Besides the regular ticks: the policy wants to be asked again at `when`."""
    asyncio.get_running_loop().call_later(max(0.0, when - dispatcher.clock()), dispatcher.tick)


async def _alive(fleet: Fleet, links: LinkTransport, dispatcher: Dispatcher, name: str) -> None:
    """Tells the workers that this gateway lives, and greets those that have not attached yet."""
    message = messages.encode(messages.Alive(name))
    while True:
        await asyncio.sleep(ALIVE_S)
        for worker in list(fleet):
            links.send_control(messages.identity(worker.id, worker.beat.epoch), message)
            if worker.attached_epoch != worker.beat.epoch:
                dispatcher.greet(worker)


async def _drain(dispatcher: Dispatcher, drain_s: float) -> None:
    log.info("draining", extra={"requests": dispatcher.open_requests})
    dispatcher.drain()
    try:
        async with asyncio.timeout(drain_s):
            await dispatcher.idle.wait()
    except TimeoutError:
        log.warning("drain timed out", extra={"requests": dispatcher.open_requests})
        dispatcher.abort_all()
    await asyncio.sleep(LAST_WORDS_S)


def _announce(run_dir: Path, index: int, port: int, links: LinkTransport) -> None:
    """What others on this host need to find this process: written aside and renamed, so that a
    reader sees all or nothing.
    """
    facts = {
        "pid": os.getpid(),
        "port": port,
        "control": links.control.endpoint,
        "data": links.data.endpoint,
    }
    aside = run_dir / f".g{index}.json"
    aside.write_bytes(msgspec.json.encode(facts))
    aside.rename(run_dir / f"g{index}.json")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gateway", description="One gateway process.")
    parser.add_argument("config")
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--run-dir", type=Path, default=None)
    args = parser.parse_args(argv)
    follow_parent()
    try:
        settings = read_settings(args.config)
        runtime_log.set_up(f"g{args.index}", settings.gateway.log_level)
        run_dir = args.run_dir or Path(settings.gateway.state_dir).expanduser() / "run"
        try:
            run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as exc:
            raise ConfigError(f"gateway.state_dir: cannot make {run_dir}: {exc.strerror}") from exc
        return uvloop.run(serve(settings, args.index, run_dir))
    except LoraplexError as exc:
        print(f"loraplex gateway: {exc.message}", file=sys.stderr)  # noqa: T201 - the one message a person must see
        return 2


if __name__ == "__main__":
    sys.exit(main())
