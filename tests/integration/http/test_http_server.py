"""Shell. Client connections over real TCP. The fast path answers simple requests, and aiohttp all
others, on one connection and in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest
from aiohttp import web

from gateway.http.body_reader import BodyLimits, BodyReader
from gateway.http.connection import PendingAnswer
from gateway.http.parser import SimpleRequest
from gateway.http.server import ConnectionLimits, Server

PATH = "/v1/completions"
WAIT_S = 60.0
RECEIVE_BYTES = 1 << 16


@dataclass
class FastPathRequest:
    """A request on the fast path, until the test answers it."""

    request: SimpleRequest
    transport: asyncio.WriteTransport
    answered: Callable[[bool], None]
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    def cancel(self) -> None:
        self.cancelled.set()

    def answer(self, text: bytes, keep_alive: bool = True) -> None:
        self.transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nX-Path: fast\r\n\r\n%b" % (len(text), text)
        )
        self.answered(keep_alive)


@dataclass
class Served:
    """A server on a port. `on_fast_path` holds the requests that came by the fast path. With
    `refuse` they go to aiohttp instead.
    """

    http_server: Server
    port: int
    intake: BodyReader
    on_fast_path: asyncio.Queue[FastPathRequest] = field(default_factory=asyncio.Queue)
    aiohttp_path: list[str] = field(default_factory=list)
    hold: asyncio.Event | None = None
    begun: int = 0
    waiting: int = 0
    refuse: bool = False

    def fast_path(
        self,
        request: SimpleRequest,
        transport: asyncio.WriteTransport,
        answered: Callable[[bool], None],
    ) -> PendingAnswer | None:
        if self.refuse:
            return None
        pending = FastPathRequest(request, transport, answered)
        self.on_fast_path.put_nowait(pending)
        return pending

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.begun += 1
        body = await request.read()
        if self.hold is not None:
            self.waiting += 1
            await self.hold.wait()
        self.aiohttp_path.append(f"{request.method} {request.path}")
        return web.Response(body=b"aiohttp:" + body)

    async def until_held(self, size_bytes: int) -> None:
        """Until so much of unfinished bodies has come."""
        async with asyncio.timeout(WAIT_S):
            while self.intake.held_bytes < size_bytes:
                await asyncio.sleep(0.01)

    async def next(self) -> FastPathRequest:
        return await asyncio.wait_for(self.on_fast_path.get(), WAIT_S)


@contextlib.asynccontextmanager
async def serving(
    *,
    keepalive_s: float = 60.0,
    most_bytes: int = 1 << 20,
    unfinished_bytes: int = 1 << 24,
    window_s: float = 10.0,
    limits: ConnectionLimits | None = None,
) -> AsyncIterator[Served]:
    served: Served
    intake = BodyReader(BodyLimits(most_bytes, unfinished_bytes, window_s=window_s))
    http_server = Server(
        lambda request: served.handle(request),
        fast_path=lambda *a: served.fast_path(*a),
        paths=frozenset({PATH}),
        intake=intake,
        limits=limits or ConnectionLimits(keepalive_s, keepalive_s),
    )
    runner = web.ServerRunner(http_server, shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    served = Served(http_server, runner.addresses[0][1], intake)
    try:
        yield served
    finally:
        await runner.cleanup()


@dataclass
class Client:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def reads_nothing(self) -> asyncio.Transport:
        """It stops reading. Its socket takes little more, while those of some machines hold tens of
        megabytes.
        """
        transport = self.writer.transport
        assert isinstance(transport, asyncio.Transport)
        transport.pause_reading()
        own: socket.socket = transport.get_extra_info("socket")
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        return transport

    async def begins(self) -> bytes:
        """The version and status of the next answer."""
        async with asyncio.timeout(WAIT_S):
            return await self.reader.readexactly(len(b"HTTP/1.1 200"))

    async def answer(self) -> tuple[bytes, bytes]:
        """(head, body) of the next answer."""
        async with asyncio.timeout(WAIT_S):
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = next(
                int(line.split(b":")[1])
                for line in head.split(b"\r\n")
                if line.lower().startswith(b"content-length:")
            )
            return head, await self.reader.readexactly(length)

    async def ended(self) -> bytes:
        """Everything that is left until the server closes."""
        async with asyncio.timeout(WAIT_S):
            return await self.reader.read()


@contextlib.asynccontextmanager
async def client_of(served: Served, address: str = "127.0.0.1") -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", served.port, local_addr=(address, 0)
    )
    try:
        yield Client(reader, writer)
    finally:
        writer.close()


def post(body: bytes = b"{}", path: str = PATH, more: bytes = b"") -> bytes:
    return b"POST %b HTTP/1.1\r\nHost: x\r\n%bContent-Length: %d\r\n\r\n%b" % (
        path.encode(),
        more,
        len(body),
        body,
    )


async def test_requests_of_one_connection_go_either_way_and_back() -> None:
    async with serving() as served, client_of(served) as client:
        for nth in range(3):
            client.send(post(b"%d" % nth))
            pending = await served.next()
            assert pending.request.body == b"%d" % nth
            pending.answer(b"answer %d" % nth)
            assert (await client.answer())[1] == b"answer %d" % nth
            client.send(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await client.answer())[1] == b"aiohttp:"
        assert (
            served.aiohttp_path == ["GET /health"] * 3 and len(served.http_server.connections) == 1
        )


@pytest.mark.parametrize("cut", [1, 5, 20, 60, -1])
async def test_a_request_that_comes_in_pieces_is_answered_once_it_is_whole(cut: int) -> None:
    async with serving() as served, client_of(served) as client:
        data = post(b'{"model": "m"}')
        client.send(data[:cut])
        await client.writer.drain()
        assert served.on_fast_path.empty()
        client.send(data[cut:])
        pending = await served.next()
        assert pending.request.body == b'{"model": "m"}'
        pending.answer(b"ok")
        assert (await client.answer())[1] == b"ok"


async def test_a_body_of_many_pieces_arrives_whole() -> None:
    async with serving() as served, client_of(served) as client:
        body = bytes(range(256)) * 200
        whole = post(body)
        for at in range(0, len(whole), 10_000):
            client.send(whole[at : at + 10_000])
            await client.writer.drain()
            await asyncio.sleep(0)
        pending = await served.next()
        assert pending.request.body == body and not served.aiohttp_path
        pending.answer(b"ok")
        await client.answer()


async def test_what_aiohttp_has_to_read_it_reads_from_the_first_byte_on() -> None:
    chunked = (
        b"POST %b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
        % PATH.encode()
    )
    async with serving(most_bytes=1000) as served, client_of(served) as client:
        client.send(post(b"1"))
        (await served.next()).answer(b"1")
        await client.answer()
        client.send(chunked[:70])
        client.send(chunked[70:])
        assert (await client.answer())[1] == b"aiohttp:abc"
        client.send(post(b"y"))  # it stays there
        assert (await client.answer())[1] == b"aiohttp:y"
    async with serving() as served, client_of(served) as client:
        client.send(post(b"x" * 300_000))
        assert (await client.answer())[1] == b"aiohttp:" + b"x" * 300_000


async def test_a_request_that_the_fast_path_gives_back_is_aiohttps_and_the_next_one_is_not() -> (
    None
):
    async with serving() as served, client_of(served) as client:
        served.refuse = True
        client.send(post(b"1"))
        assert (await client.answer())[1] == b"aiohttp:1"
        served.refuse = False
        client.send(post(b"2"))
        (await served.next()).answer(b"2")
        assert (await client.answer())[1] == b"2"


async def test_requests_that_come_before_the_answer_are_answered_after_it_in_order() -> None:
    async with serving() as served, client_of(served) as client:
        client.send(post(b"1"))
        first = await served.next()
        client.send(post(b"2"))
        client.send(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        await client.writer.drain()
        first.answer(b"one")
        assert (await client.answer())[1] == b"one"
        if served.on_fast_path.empty():  # both came in one piece: aiohttp's
            assert (await client.answer())[1] == b"aiohttp:2"
        else:
            (await served.next()).answer(b"two")
            assert (await client.answer())[1] == b"two"
        assert (await client.answer())[1] == b"aiohttp:"


async def test_requests_in_one_piece_are_all_answered() -> None:
    async with serving() as served, client_of(served) as client:
        client.send(post(b"1") + post(b"2") + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert [(await client.answer())[1] for _ in range(3)] == [
            b"aiohttp:1",
            b"aiohttp:2",
            b"aiohttp:",
        ]


async def test_a_request_behind_one_that_aiohttp_still_answers_waits_for_it() -> None:
    async with serving() as served, client_of(served) as client:
        served.hold = asyncio.Event()
        client.send(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(WAIT_S):
            while not served.http_server.connections:
                await asyncio.sleep(0.005)
        client.send(post(b"1"))
        await client.writer.drain()
        served.hold.set()
        assert [(await client.answer())[1] for _ in range(2)] == [b"aiohttp:", b"aiohttp:1"]


@pytest.mark.parametrize(("version", "told"), [("1.1", b"HTTP/1.1 100"), ("1.0", b"")])
async def test_only_a_client_that_knows_it_is_told_to_go_on(version: str, told: bytes) -> None:
    async with serving() as served, client_of(served) as client:
        lines = f"POST {PATH} HTTP/{version}\r\nHost: x\r\nExpect: 100-continue"
        client.send(f"{lines}\r\nContent-Length: 2\r\n\r\n".encode())
        if told:
            assert await client.begins() == told
            await client.reader.readuntil(b"\r\n\r\n")
        else:
            async with asyncio.timeout(WAIT_S):
                while not served.begun:
                    await asyncio.sleep(0.01)
        client.send(b"{}")
        assert await client.begins() == f"HTTP/{version} 200".encode()


async def test_a_client_that_leaves_cancels_its_request() -> None:
    async with serving() as served:
        async with client_of(served) as client:
            client.send(post())
            pending = await served.next()
        await asyncio.wait_for(pending.cancelled.wait(), WAIT_S)
        assert not served.http_server.connections


async def test_an_answer_that_ends_the_connection_ends_it() -> None:
    async with serving() as served, client_of(served) as client:
        client.send(post())
        (await served.next()).answer(b"bye", keep_alive=False)
        assert (await client.answer())[1] == b"bye" and await client.ended() == b""


async def test_a_connection_that_rests_is_closed_and_one_that_is_answered_is_not() -> None:
    async with (
        serving(keepalive_s=0.3) as served,
        client_of(served) as idle,
        client_of(served) as busy,
        client_of(served) as cut_short,
    ):
        busy.send(post())
        cut_short.send(post()[:10])
        pending = await served.next()
        assert await idle.ended() == b""
        assert (await cut_short.ended()).startswith(b"HTTP/1.1 408 ")
        pending.answer(b"late")
        assert (await busy.answer())[1] == b"late"
        assert await busy.ended() == b""


async def test_aiohttps_idle_timer_does_not_end_a_request_of_the_short_way() -> None:
    async with (
        serving(keepalive_s=0.3) as served,
        client_of(served) as client,
        client_of(served) as other,
    ):
        client.send(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        await client.answer()
        client.send(post())
        pending = await served.next()
        assert await other.ended() == b""  # as long as an idle connection lasts
        await asyncio.sleep(0.3)  # the clock itself is what is tested
        assert not pending.cancelled.is_set()
        pending.answer(b"still here")
        assert (await client.answer())[1] == b"still here"


async def test_a_shutdown_closes_idle_connections_at_once_and_lets_a_request_end() -> None:
    async with serving() as served, client_of(served) as idle, client_of(served) as busy:
        busy.send(post())
        pending = await served.next()
        served.http_server.pre_shutdown()
        assert await idle.ended() == b"" and not pending.cancelled.is_set()
        pending.answer(b"last")
        assert (await busy.answer())[1] == b"last" and await busy.ended() == b""


async def test_after_a_shutdown_nobody_is_connected() -> None:
    async with serving() as served, client_of(served) as client:
        client.send(post())
        pending = await served.next()
        await served.http_server.shutdown(0.1)
        await asyncio.wait_for(pending.cancelled.wait(), WAIT_S)
        with contextlib.suppress(ConnectionError):
            assert await client.ended() == b""
        assert not served.http_server.connections


async def test_garbage_gets_aiohttps_400() -> None:
    async with serving() as served, client_of(served) as client:
        client.send(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n")
        head = await client.ended()
        assert head.startswith((b"HTTP/1.0 400 ", b"HTTP/1.1 400 "))
