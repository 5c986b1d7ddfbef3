"""Shell. The last answer of a connection reaches a client that is still sending, over real TCP. A
server that closes at once has its kernel reset the connection, and the client's kernel then throws
the answer away.
"""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import pytest

from gateway.http import connection as connection_module
from gateway.http.connection import LINGER_S, Connection
from gateway.http.server import ConnectionLimits
from gateway.http.tls import Certificate
from tests.integration.http.test_http_limits import QUICK, head
from tests.integration.http.test_http_server import (
    WAIT_S,
    Client,
    client_of,
    post,
    serving,
)
from tests.integration.http.test_tls import make_certificate

PIECE, PIECES = b"\0" * 100_000, 80
"""More than both kernels hold together, so a client that is not read blocks."""


async def sends_all_then_reads(client: Client) -> bytes:
    """The status line. Raises ConnectionError if the server has reset the connection."""
    async with asyncio.timeout(WAIT_S):
        for _ in range(PIECES):
            client.send(PIECE)
            await client.writer.drain()
        return (await client.reader.readuntil(b"\r\n\r\n")).partition(b"\r\n")[0]


@pytest.mark.parametrize(
    "request_head",
    [
        head("Content-Length: abc"),
        head("Content-Length: 5", "Content-Length: 8000000"),
        head("Content-Length: 8000000", "Transfer-Encoding: chunked"),
        head("Bad Header: x", "Content-Length: 8000000"),
        head("Content-Length: 8000000", method="P@ST"),
        head("Content-Length: 8000000").replace(b"HTTP/1.1", b"HTTP/3.0"),
        head("Transfer-Encoding: rot13"),
        head("Transfer-Encoding: chunked") + b"5\r\nhello\r\nZZ\r\n",
        head("Transfer-Encoding: chunked").replace(b"HTTP/1.1", b"HTTP/1.0"),
    ],
)
async def test_a_client_that_sends_on_after_a_malformed_head_reads_its_refusal(
    request_head: bytes,
) -> None:
    async with serving() as served, client_of(served) as client:
        client.send(request_head)
        assert await sends_all_then_reads(client) == b"HTTP/1.1 400 Bad Request"


async def test_over_tls_as_well(tmp_path: Path) -> None:
    make_certificate(tmp_path, "x")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    trusting = ssl.create_default_context(cafile=certificate)
    trusting.check_hostname = False
    async with serving() as served:
        listener = await asyncio.get_running_loop().create_server(
            served.http_server.over_tls(Certificate(certificate, key).context), "127.0.0.1", 0
        )
        port = listener.sockets[0].getsockname()[1]
        client = Client(*await asyncio.open_connection("127.0.0.1", port, ssl=trusting))
        client.send(head("Content-Length: abc"))
        assert await sends_all_then_reads(client) == b"HTTP/1.1 400 Bad Request"
        client.writer.close()
        listener.close()


async def test_a_client_that_sends_on_after_its_time_was_over_reads_408() -> None:
    async with serving(limits=QUICK) as served, client_of(served) as client:
        client.send(head("Content-Length: 1000") + b"{")
        assert await client.begins() == b"HTTP/1.1 408"
        assert await sends_all_then_reads(client) == b" Request Timeout"


async def test_small_bodies_that_there_is_no_room_for_are_refused_readably() -> None:
    async with (
        serving(unfinished_bytes=80_000) as served,
        client_of(served) as first,
        client_of(served) as second,
    ):
        first.send(head("Content-Length: 60000") + b" " * 50_000)
        await served.until_held(50_000)
        second.send(head("Content-Length: 60000") + b" " * 50_000)
        assert await second.begins() == b"HTTP/1.1 503"
        assert await sends_all_then_reads(second) == b" Service Unavailable"


async def test_requests_behind_the_last_one_do_not_cost_its_answer() -> None:
    async with serving() as served, client_of(served) as client:
        client.send(post())
        (await served.next()).answer(b"", keep_alive=False)
        assert await sends_all_then_reads(client) == b"HTTP/1.1 200 OK"


async def test_nor_behind_one_that_aiohttp_answered() -> None:
    async with serving() as served, client_of(served) as client:
        served.refuse, served.hold = True, asyncio.Event()
        client.send(post(more=b"Connection: close\r\n"))
        await served.until_held(1)
        served.hold.set()
        assert await sends_all_then_reads(client) == b"HTTP/1.1 200 OK"


async def test_a_connection_whose_client_never_closes_is_closed_after_a_while() -> None:
    async with serving() as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        served.refuse = True
        writer.write(post(more=b"Connection: close\r\n"))
        async with asyncio.timeout(WAIT_S):
            await reader.readuntil(b"{}")
        (connection,) = served.http_server.open_connections
        # it may make room for another one, and nobody waits for it when the gateway leaves
        assert connection.waits and connection.quiet_since(asyncio.get_running_loop().time())
        async with asyncio.timeout(LINGER_S + WAIT_S):
            while served.http_server.open_connections:
                await asyncio.sleep(0.05)
        writer.close()


@pytest.mark.parametrize("refuse", [False, True], ids=["fast path", "aiohttp"])
async def test_a_slow_reader_gets_the_whole_of_a_last_answer(
    refuse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "LINGER_S", 0.1)
    whole = 20_000_000
    limits = ConnectionLimits(idle_timeout_s=WAIT_S, header_timeout_s=0.2)
    async with (
        serving(limits=limits, most_bytes=2 * whole, unfinished_bytes=4 * whole) as served,
        client_of(served) as client,
    ):
        served.refuse = refuse
        transport = client.reads_nothing()
        if refuse:
            client.send(post(b"x" * whole, more=b"Connection: close\r\n"))
        else:
            client.send(post())
            (await served.next()).answer(b"x" * whole, keep_alive=False)
        (connection,) = served.http_server.open_connections
        assert isinstance(connection, Connection)
        async with asyncio.timeout(WAIT_S):
            while not connection._unsent:
                await asyncio.sleep(0.01)
        await asyncio.sleep(1.0)  # many checks of it, the answer still unread
        transport.resume_reading()
        _, body = await client.answer()
        assert len(body) >= whole
