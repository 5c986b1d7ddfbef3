"""A request that has ended is freed at once, without the garbage collector."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from pathlib import Path

from gateway.accounts.keys import Keys
from gateway.accounts.ledger import Ledger
from gateway.accounts.limiter import Limiter
from gateway.accounts.shared_limits import SharedLimits
from gateway.adapters.resolver import Resolver
from gateway.adapters.usage import AdapterUsage
from gateway.api.accounting import Accounting
from gateway.api.deadlines import Deadlines
from gateway.api.generate import GenerationAPI
from gateway.api.services import GenerationServices, RequestLimits
from gateway.dispatch.dispatcher import Dispatcher
from gateway.dispatch.queue.admission import Admission
from gateway.dispatch.request import InFlightRequest
from gateway.dispatch.settings import DispatchSettings, TimeAndChance
from gateway.fleet.fleet import Fleet
from gateway.http.body_reader import BodyLimits, BodyReader
from gateway.http.browser_policy import BrowserPolicy
from gateway.http.connection import Connection
from gateway.http.server import ConnectionLimits, Server
from gateway.routing.registry import make_policy
from gateway.telemetry.access_log import AccessLog
from gateway.telemetry.prometheus import Metrics
from shared.config.gateway import GatewayConfig
from shared.link import messages
from shared.link.sockets import SendResult

PATH = "/v1/completions"
BODY = b'{"model":"base","prompt":"hello","stream":%b}'
REQUEST = (
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: "
    b"application/json\r\nContent-Length: %d\r\n\r\n%b"
)
TIMES = 50


class Wires:
    def send_data(self, peer: bytes, data: bytes) -> SendResult:
        return SendResult.OK

    def welcome(self, peer: bytes) -> messages.Welcome:
        return messages.Welcome("g0", "x", 3.0, 0.1)

    def forget(self, peer: bytes) -> None:
        pass

    def send_control(self, peer: bytes, data: bytes) -> SendResult:
        return SendResult.OK


class Written(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.text = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.text += data

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return False


class NoAliases:
    def of(self, base: str) -> dict[str, str]:
        return {}


async def never(request: object) -> object:
    raise AssertionError("a plain request went to aiohttp")


def services_in(
    folder: Path,
    settings: DispatchSettings | None = None,
    admission: Admission[InFlightRequest] | None = None,
) -> GenerationServices:
    """Those of a gateway with the base model `base`, whose workers hear nothing."""
    loop, metrics, fleet = asyncio.get_running_loop(), Metrics(), Fleet(3.0, {})
    dispatcher = Dispatcher(
        fleet,
        make_policy("expected-ttft"),
        Admission(100, 60.0) if admission is None else admission,
        Wires(),
        metrics,
        settings or DispatchSettings(100),
        TimeAndChance(time.monotonic, random.Random(1)),
    )
    return GenerationServices(
        dispatcher,
        Resolver({"base": None}, NoAliases(), fleet),  # type: ignore[dict-item, arg-type]
        metrics,
        Keys(),
        Accounting(Limiter(SharedLimits(folder / "limits", 0)), Ledger(), metrics),
        RequestLimits(1 << 20, 1 << 20, 600.0),
        AccessLog("g0", "error"),
        AdapterUsage(),
        loop,
        Deadlines(loop),
    )


async def test_a_request_that_has_ended_leaves_nothing_for_the_collector(tmp_path: Path) -> None:
    services = services_in(tmp_path, DispatchSettings(100, keepalive_s=5.0))
    dispatcher = services.dispatcher
    generation = GenerationAPI(services, BrowserPolicy(GatewayConfig(host="0.0.0.0")))
    http_server = Server(
        never,
        fast_path=generation.fast_path,
        paths=frozenset({PATH}),
        intake=BodyReader(BodyLimits(1 << 20, 1 << 20)),
        limits=ConnectionLimits(75.0),
    )
    peer = messages.identity("w0", 1)
    heartbeat = messages.Heartbeat(
        "w0", 1, 1, "base", messages.WorkerState.SERVING, capacity=8, slots=2
    )
    dispatcher.inbox.on_control(peer, messages.encode(heartbeat))
    dispatcher.inbox.on_data(peer, messages.encode(messages.Attach("w0", 1)))
    connection, written = Connection(http_server), Written()
    connection.connection_made(written)

    async def ask(stream: bool) -> None:
        body = BODY % (b"true" if stream else b"false")
        connection.data_received(REQUEST % (len(body), body))
        [sid] = (request.sid for request in dispatcher._streams)
        status, done = (
            200 << messages.STATUS_SHIFT,
            messages.Done(sid, 10, 64, 0.0, 0.0, messages.Tier.GPU),
        )
        if stream:
            dispatcher.inbox.on_data(
                peer,
                messages.encode(
                    messages.Step([(sid, status | messages.SSE, b"data: {}\n\n", b"")], [])
                ),
            )
            dispatcher.inbox.on_data(
                peer,
                messages.encode(
                    messages.Step([(sid, messages.END, b"data: [DONE]\n\n", b"")], [done])
                ),
            )
        else:
            dispatcher.inbox.on_data(
                peer,
                messages.encode(messages.Step([(sid, status | messages.END, b"{}", b"")], [done])),
            )
        await asyncio.sleep(0)  # what was put off to the loop's next turn

    for stream in (False, True):
        for _ in range(TIMES):  # whatever is made once
            await ask(stream)
        gc.collect()
        gc.disable()
        try:
            for _ in range(TIMES):
                await ask(stream)
            assert gc.collect() < TIMES, "each request left a cycle"
        finally:
            gc.enable()
    assert written.text.count(b"HTTP/1.1 200 OK") == 4 * TIMES
    connection.connection_lost(None)
