"""Shell. One gateway process: its arguments, its signals, its background loops and its end. SIGTERM
drains it.

  python -m gateway CONFIG [--index N] [--run-dir DIR]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
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
from gateway.dispatch.workers.transport import LinkTransport
from gateway.http.server import ConnectionLimits, Server
from gateway.http.tls import Certificate, open_certificate
from gateway.routes import Routes
from gateway.supervisor.port_check import why_not_listening
from shared.config.gateway import GatewayConfig
from shared.config.llm import Settings
from shared.config.settings_file import FollowedConfig, read_settings
from shared.errors import ConfigError, LoraplexError
from shared.link import messages
from shared.link.link_end import PING_S
from shared.link.sockets import SendResult
from shared.link.stream_window import SLOWEST_BYTES_PER_S
from shared.runtime import garbage
from shared.runtime import log as runtime_log
from shared.runtime.owned_folder import MAX_RUN_DIR, MAX_SOCKET_PATH, exclusive
from shared.runtime.process import (
    follow_parent,
    give_large_blocks_back,
    make_private,
    on_reload_signal,
    on_stop_signals,
)
from shared.supervision.client import report_exit_reason, report_to_supervisor
from shared.supervision.messages import (
    CannotStart,
    ConfigRefused,
    FromSupervisor,
    Pulse,
    WorkerEnded,
)

log = logging.getLogger("loraplex.gateway")

TICK_S = PING_S
STALL_S = 2 * TICK_S
MIN_OWN_FILES = 96  # files beside client connections: sockets to workers and stores, state files
PINGS_PER_ALIVE = 2
MUCH_BYTES = int(SLOWEST_BYTES_PER_S * PING_S)
"""A worker hears at once that so much is on its way to it, since pings may come late."""
SHUTDOWN_S = 1.0  # after the drain, handlers that still write get this long
QUIET_S = 1.0  # a connection that was silent for this long can be closed without harm
LOOK_S = 0.05
LAST_WORDS_S = 0.05  # handlers with requests that have just ended get this long to write
GC_THRESHOLD = (50_000, 50, 50)  # with 4,000 streams the default (700) would collect all the time

COLLECT_S = 60.0
"""A full collection empties the lists on which Python keeps freed tuples, 2,000 of each length up
to 20. With these thresholds it would come only after hours, and those lists grow to 5 MB. It takes
1 ms, or 30 ms with 4,000 streams.
"""


async def serve(settings: Settings, config: FollowedConfig, index: int, run_dir: Path) -> int:
    """Runs one gateway process until a signal comes. Returns the exit status."""
    stopping, hurried = asyncio.Event(), asyncio.Event()
    on_stop_signals(lambda sig: stopping.set(), hurried.set)
    asyncio.get_running_loop().set_exception_handler(runtime_log.on_loop_failure)
    async with contextlib.AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(open_gateway(settings, config, index, run_dir))
        stack.callback(_send_farewell, gateway)
        on_reload_signal(gateway.live.ask)
        certificate = open_certificate(settings.gateway.tls)
        http = await stack.enter_async_context(_http(gateway.routes, settings, certificate))
        port = http.port
        gateway.live.listens_at(port)
        _announce(run_dir, index, port, gateway.link)
        log.info(
            "listening",
            extra={
                "url": f"{'https' if certificate else 'http'}://{settings.gateway.host}:{port}",
                "workers_at": gateway.link.control.endpoint,
            },
        )
        garbage.freeze(*GC_THRESHOLD)
        async with asyncio.TaskGroup() as tasks:
            loops = [
                tasks.create_task(_tick(gateway), name="tick"),
                tasks.create_task(_alive(gateway), name="alive"),
                tasks.create_task(garbage.collect_for_ever(COLLECT_S), name="collect"),
                tasks.create_task(_supervised(gateway), name="supervised"),
                *(tasks.create_task(run(), name=name) for name, run in gateway.loops.items()),
                *([tasks.create_task(certificate.run(), name="tls")] if certificate else []),
            ]
            await stopping.wait()
            drain_s = gateway.live.settings.gateway.drain_s
            await _drain(gateway.dispatcher, http, drain_s, hurried)
            await gateway.aggregator.save()
            for loop in loops:
                loop.cancel()
    return 0


@dataclass(frozen=True, slots=True)
class HTTPServer:
    """The listening sockets, and the connections of clients."""

    listening: asyncio.Server
    connections: Server
    port: int

    async def stop_listening(self) -> None:
        await asyncio.sleep(0)  # clients that have connected already are accepted
        self.listening.close()
        self.connections.drain()


@contextlib.asynccontextmanager
async def _http(
    routes: Routes, settings: Settings, certificate: Certificate | None
) -> AsyncIterator[HTTPServer]:
    """Listens at the configured address while it is open. Raises ConfigError if the port is
    taken.
    """
    g = settings.gateway
    http_server = routes.http_server(_connection_limits(g))
    loop = asyncio.get_running_loop()
    try:
        server = await loop.create_server(
            http_server.over_tls(certificate.context) if certificate else http_server,
            g.host,
            g.port,
            backlog=4096,
            reuse_port=g.processes > 1 or None,
        )
    except OSError as exc:
        raise ConfigError(why_not_listening(g, exc)) from exc
    try:
        # connections inherit it, so a client that has vanished is noticed
        for listening in server.sockets:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        yield HTTPServer(server, http_server, server.sockets[0].getsockname()[1])
    finally:
        server.close()
        await asyncio.sleep(0)  # data that has arrived is handled first
        http_server.pre_shutdown()
        await http_server.shutdown(SHUTDOWN_S)


def _connection_limits(g: GatewayConfig) -> ConnectionLimits:
    """The number of client connections is the configured one, or less if this process may open
    fewer files. Some files are kept free for the process itself, since it could do nothing without
    them.
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
    """Regular ticks for the link and the dispatcher.

    If this process (or the machine) was stopped for a while, the workers' heartbeats are still
    unread. So the dispatcher's next tick is left out, and the heartbeats are read before any lease
    expires.
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
    """Tells the workers that this gateway lives. Greets workers that have not opened their data
    connection yet.
    """
    for turn in itertools.count():
        await asyncio.sleep(PING_S)
        for worker in list(gateway.fleet):
            coming_bytes = gateway.link.coming_bytes(worker.peer)
            if turn % PINGS_PER_ALIVE and coming_bytes < MUCH_BYTES:
                continue
            alive = messages.Alive(gateway.name, worker.heartbeat.seq, coming_bytes)
            sent = gateway.link.send_control(worker.peer, messages.encode(alive))
            gateway.fleet.connected(worker, sent is not SendResult.GONE)
            if worker.attached_epoch != worker.heartbeat.epoch:
                gateway.dispatcher.greet(worker)


async def _supervised(gateway: GatewayProcess) -> None:
    """Sends pulses to the supervisor, which prove that this event loop turns. Takes its messages on
    workers, models and config.
    """

    def heard(message: FromSupervisor) -> None:
        match message:
            case WorkerEnded(worker, epoch, reason, killed):
                gateway.dispatcher.worker_ended(worker, epoch, reason, killed)
            case CannotStart(models):
                gateway.dispatcher.cannot_start(models)
            case ConfigRefused(why):
                gateway.live.refused(why)

    await report_to_supervisor(lambda: Pulse(True), heard)


def _send_farewell(gateway: GatewayProcess) -> None:
    message = messages.encode(messages.Farewell(gateway.name))
    for worker in gateway.fleet:
        gateway.link.send_control(worker.peer, message)


async def _drain(
    dispatcher: Dispatcher, http: HTTPServer, drain_s: float, hurried: asyncio.Event
) -> None:
    """New connections are refused, and open ones are still served. Each answer tells its client to
    reconnect elsewhere. If a connection were closed between two requests, the second might be on
    its way already. So connections are closed last, once they have been quiet for QUIET_S.
    `hurried`: nothing is waited for any more.
    """
    log.info("draining", extra={"requests": dispatcher.open_requests})
    dispatcher.drain()
    await http.stop_listening()
    try:
        async with asyncio.timeout(drain_s):
            while dispatcher.open_requests or not http.connections.quiet(QUIET_S):
                if hurried.is_set():
                    break
                await asyncio.sleep(LOOK_S)
    except TimeoutError:
        log.warning("drain timed out", extra={"requests": dispatcher.open_requests})
    dispatcher.abort_all()
    await asyncio.sleep(LAST_WORDS_S)
    dispatcher.close_books()


def _announce(run_dir: Path, index: int, port: int, link: LinkTransport) -> None:
    """Writes the file by which others on this host find this process. It is renamed into place, so
    nobody reads half of it. Raises ConfigError if it cannot be written.
    """
    facts = {
        "pid": os.getpid(),
        "port": port,
        "control": link.control.endpoint,
        "data": link.data.endpoint,
    }
    aside = run_dir / f".g{index}.json"
    try:
        aside.write_bytes(msgspec.json.encode(facts))
        aside.rename(run_dir / f"g{index}.json")
    except OSError as exc:
        raise ConfigError(f"{aside} cannot be written: {exc.strerror}") from exc


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gateway", description="One gateway process.")
    parser.add_argument("config")
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--run-dir", type=Path, default=None)
    args = parser.parse_args(argv)
    follow_parent()
    give_large_blocks_back()
    try:
        settings = read_settings(args.config)
        runtime_log.set_up(f"g{args.index}", settings.gateway.log_level)
        state_dir = Path(settings.gateway.state_dir).expanduser()
        run_dir = args.run_dir or state_dir / "run"
        link = settings.gateway.link
        too_long = len(os.fsencode(run_dir.absolute())) > MAX_RUN_DIR
        if too_long and "ipc" in (link.control, link.data):
            raise ConfigError(
                f"gateway.state_dir: {run_dir} is too long for the sockets in it, because Linux "
                f"allows {MAX_SOCKET_PATH} bytes for the path of one; choose a shorter one"
            )
        for folder in (state_dir, run_dir):
            _make(folder)
        with exclusive(state_dir / f"gateway-{args.index}.lock") as owner:
            if owner is not None:
                raise ConfigError(
                    f"gateway.state_dir: {state_dir} is in use by another gateway (pid {owner}); "
                    "stop that one, or choose another state_dir"
                )
            config = FollowedConfig(
                args.config, settings, lambda: read_settings(args.config, again=True)
            )
            return uvloop.run(serve(settings, config, args.index, run_dir))
    except LoraplexError as exc:
        report_exit_reason(exc.message)
        # the one message a person must see
        print(f"loraplex gateway: {exc.message}", file=sys.stderr)  # noqa: T201
        return 2


def _make(folder: Path) -> None:
    try:
        make_private(folder)
    except OSError as exc:
        raise ConfigError(f"gateway.state_dir: cannot make {folder}: {exc.strerror}") from exc


if __name__ == "__main__":
    sys.exit(main())
