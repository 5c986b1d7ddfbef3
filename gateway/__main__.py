"""Shell. One gateway process: its arguments, its signals, its loops and its end. SIGTERM drains.

python -m gateway CONFIG [--index N] [--run-dir DIR]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import resource
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import uvloop

from gateway.app import GatewayProcess, open_gateway
from gateway.dispatch.dispatcher import Dispatcher
from gateway.dispatch.transport import LinkTransport
from gateway.http.server import ConnectionLimits, Server
from gateway.http.tls import Certificate, open_certificate
from gateway.routes import Routes
from gateway.supervisor.listening import why_not_listening
from shared.config.gateway import GatewayConfig
from shared.config.llm import Settings
from shared.config.settings_file import read_settings
from shared.errors import ConfigError, LoraplexError
from shared.link import messages
from shared.link.endpoint import PING_S
from shared.runtime import log as runtime_log
from shared.runtime.owned_folder import exclusive
from shared.runtime.process import follow_parent, make_private, on_stop_signals
from shared.supervision.client import report_to_supervisor, say_last_words
from shared.supervision.messages import FromSupervisor, Pulse, Verdicts, WorkerEnded

log = logging.getLogger("loraplex.gateway")

TICK_S = PING_S
STALL_S = 2 * TICK_S
MIN_OWN_FILES = 96  # sockets to workers and stores, files of state; beside those of connections
ALIVE_S = 0.5
SHUTDOWN_S = 1.0  # after the drain, for handlers that are still writing
QUIET_S = 1.0  # a connection that was silent so long is closed without harm, while draining
LOOK_S = 0.05
LAST_WORDS_S = 0.05  # for handlers whose requests have just ended
GC_THRESHOLD = (50_000, 50, 50)  # with 4,000 streams the default (700) would collect all the time


async def serve(settings: Settings, index: int, run_dir: Path) -> int:
    """One gateway process, until a signal. Returns the exit status."""
    stopping = asyncio.Event()
    on_stop_signals(lambda sig: stopping.set())
    asyncio.get_running_loop().set_exception_handler(runtime_log.on_loop_failure)
    async with contextlib.AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(open_gateway(settings, index, run_dir))
        stack.callback(_say_farewell, gateway)
        certificate = open_certificate(settings.gateway.tls)
        http = await stack.enter_async_context(_http(gateway.routes, settings, certificate))
        port = http.port
        _announce(run_dir, index, port, gateway.link)
        log.info(
            "listening",
            extra={
                "url": f"{'https' if certificate else 'http'}://{settings.gateway.host}:{port}",
                "workers_at": gateway.link.control.endpoint,
            },
        )
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLD)
        async with asyncio.TaskGroup() as tasks:
            loops = [
                tasks.create_task(_tick(gateway), name="tick"),
                tasks.create_task(_alive(gateway), name="alive"),
                tasks.create_task(_supervised(gateway), name="supervised"),
                *(tasks.create_task(run(), name=name) for name, run in gateway.loops.items()),
                *([tasks.create_task(certificate.run(), name="tls")] if certificate else []),
            ]
            await stopping.wait()
            await _drain(gateway.dispatcher, http, settings.gateway.drain_s)
            await gateway.aggregator.save()
            for loop in loops:
                loop.cancel()
    return 0


@dataclass(frozen=True, slots=True)
class HTTPServer:
    """Where clients connect, and the connections that they have."""

    listening: asyncio.Server
    connections: Server
    port: int

    async def stop_listening(self) -> None:
        await asyncio.sleep(0)  # whoever has connected already gets in
        self.listening.close()
        self.connections.drain()


@contextlib.asynccontextmanager
async def _http(
    routes: Routes, settings: Settings, certificate: Certificate | None
) -> AsyncIterator[HTTPServer]:
    """Listens. Raises ConfigError if the port is taken."""
    g = settings.gateway
    http_server = routes.http_server(_connection_limits(g))
    loop = asyncio.get_running_loop()
    try:
        server = await loop.create_server(
            http_server,
            g.host,
            g.port,
            backlog=4096,
            reuse_port=g.processes > 1 or None,
            ssl=certificate.context if certificate else None,
            ssl_handshake_timeout=g.http.header_timeout_s if certificate else None,
        )
    except OSError as exc:
        raise ConfigError(why_not_listening(g, exc)) from exc
    try:
        # connections inherit it: a client that vanished without a word is noticed
        for listening in server.sockets:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        yield HTTPServer(server, http_server, server.sockets[0].getsockname()[1])
    finally:
        server.close()
        await asyncio.sleep(0)  # what came before is handled
        http_server.pre_shutdown()
        await http_server.shutdown(SHUTDOWN_S)


def _connection_limits(g: GatewayConfig) -> ConnectionLimits:
    """As many connections as are configured and this process has file descriptors for, less those
    that it needs itself: beyond that nobody could connect any more.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        wanted = g.http.max_connections + MIN_OWN_FILES
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(wanted, hard)), hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    most = max(1, min(g.http.max_connections, soft - max(MIN_OWN_FILES, soft // 4)))
    return ConnectionLimits(
        g.http.idle_timeout_s,
        g.http.header_timeout_s,
        most,
        g.http.max_connections_per_client or max(1, most * 3 // 4),
    )


async def _tick(gateway: GatewayProcess) -> None:
    """Regular ticks. After this process (or its machine) stood still, the workers' heartbeats lie
    unread: one tick is left out, so that they are read first.
    """
    waited = False
    dispatcher = gateway.dispatcher
    while True:
        before = dispatcher.clock()
        await asyncio.sleep(TICK_S)
        gateway.link.tick()
        waited = not waited and dispatcher.clock() - before > STALL_S
        if not waited:
            dispatcher.tick()


async def _alive(gateway: GatewayProcess) -> None:
    """Tells the workers that this gateway lives, and greets those that have not attached yet."""
    message = messages.encode(messages.Alive(gateway.name))
    while True:
        await asyncio.sleep(ALIVE_S)
        for worker in list(gateway.fleet):
            gateway.link.send_control(messages.identity(worker.id, worker.beat.epoch), message)
            if worker.attached_epoch != worker.beat.epoch:
                gateway.dispatcher.greet(worker)


async def _supervised(gateway: GatewayProcess) -> None:
    """Shows `serve` that this loop turns, and hears from it what became of workers and models."""

    def heard(message: FromSupervisor) -> None:
        match message:
            case WorkerEnded(worker, epoch, reason):
                gateway.dispatcher.worker_ended(worker, epoch, reason)
            case Verdicts(models):
                gateway.dispatcher.cannot_start(models)

    await report_to_supervisor(lambda: Pulse(True), heard)


def _say_farewell(gateway: GatewayProcess) -> None:
    message = messages.encode(messages.Farewell(gateway.name))
    for worker in gateway.fleet:
        gateway.link.send_control(messages.identity(worker.id, worker.beat.epoch), message)


async def _drain(dispatcher: Dispatcher, http: HTTPServer, drain_s: float) -> None:
    """Nobody new gets in. Clients that have a connection are served on, and each answer tells them
    to take their next request elsewhere; one that is cut off between two requests may have sent the
    second, so those that are quiet are closed last.
    """
    log.info("draining", extra={"requests": dispatcher.open_requests})
    dispatcher.drain()
    await http.stop_listening()
    try:
        async with asyncio.timeout(drain_s):
            while dispatcher.open_requests or not http.connections.quiet(QUIET_S):  # noqa: ASYNC110
                await asyncio.sleep(LOOK_S)
    except TimeoutError:
        log.warning("drain timed out", extra={"requests": dispatcher.open_requests})
    dispatcher.abort_all()
    await asyncio.sleep(LAST_WORDS_S)


def _announce(run_dir: Path, index: int, port: int, link: LinkTransport) -> None:
    """What others on this host need to find this process: written aside and renamed, so that a
    reader sees all or nothing.
    """
    facts = {
        "pid": os.getpid(),
        "port": port,
        "control": link.control.endpoint,
        "data": link.data.endpoint,
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
        state_dir = Path(settings.gateway.state_dir).expanduser()
        run_dir = args.run_dir or state_dir / "run"
        for folder in (state_dir, run_dir):
            _make(folder)
        with exclusive(state_dir / f"gateway-{args.index}.lock") as owner:
            if owner is not None:
                raise ConfigError(
                    f"gateway.state_dir: {state_dir} is in use by another gateway (pid {owner}); "
                    "stop that one, or choose another state_dir"
                )
            return uvloop.run(serve(settings, args.index, run_dir))
    except LoraplexError as exc:
        say_last_words(exc.message)
        print(f"loraplex gateway: {exc.message}", file=sys.stderr)  # noqa: T201 - the one message a person must see
        return 2


def _make(folder: Path) -> None:
    try:
        make_private(folder)
    except OSError as exc:
        raise ConfigError(f"gateway.state_dir: cannot make {folder}: {exc.strerror}") from exc


if __name__ == "__main__":
    sys.exit(main())
