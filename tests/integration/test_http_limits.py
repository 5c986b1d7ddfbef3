"""Shell. What one client can make a listener hold, over real TCP: silence, slowness, bodies that
never end or grow when they are unpacked, and connections without number.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import zlib
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from gateway.http.bodies import answer
from gateway.http.intake import inflate
from gateway.http.server import MAX_GATHERED_BYTES, ConnectionLimits
from shared.errors import BodyTooLarge, InvalidRequest, LoraplexError
from tests.integration.test_http_server import (
    PATH,
    WAIT_S,
    Client,
    Served,
    client_of,
    post,
    serving,
)

SOON_S = 0.4
QUICK = ConnectionLimits(idle_timeout_s=60.0, header_timeout_s=SOON_S)


def head(*lines: str, method: str = "POST", path: str = PATH) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *lines, "", ""]).encode()


@contextlib.asynccontextmanager
async def answering(served: Served) -> AsyncIterator[Served]:
    """The handler turns errors into answers, as the gateway's routes do."""
    handle = served.handle

    async def guarded(request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await handle(request)
        except LoraplexError as exc:
            status, headers, body = answer(exc, "r")
            return web.Response(status=status, headers=headers, body=body)

    served.handle = guarded  # type: ignore[method-assign]
    yield served


async def status_of(client: Client) -> int:
    async with asyncio.timeout(WAIT_S):
        return int((await client.reader.readuntil(b"\r\n\r\n"))[9:12])


@pytest.mark.parametrize(
    "beginning",
    [
        b"",
        b"POST /v1",
        head()[:-2],
        b"PUT /x HTTP/1.1\r\nHost: x\r\n",  # not of the fast path's grammar
        head("Transfer-Encoding: chunked")[:-2],
        head("Content-Length: 1000") + b"{",
    ],
    ids=["silent", "line", "head", "other method", "chunked head", "small body"],
)
async def test_a_connection_that_stops_in_the_middle_of_a_request_is_closed(
    beginning: bytes,
) -> None:
    async with serving(limits=QUICK) as served, client_of(served) as client:
        client.send(beginning)
        rest = await client.ended()
        assert rest == b"" or rest.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(
    "framing", ["Content-Length: 200000", "Transfer-Encoding: chunked"], ids=["length", "chunked"]
)
async def test_a_body_that_stands_still_is_given_up_and_what_was_held_of_it_is_free(
    framing: str,
) -> None:
    async with serving(window_s=SOON_S) as served, answering(served), client_of(served) as client:
        client.send(head(framing) + b"5\r\nhello\r\n")
        assert await status_of(client) == 408
        assert served.intake.held_bytes == 0


async def test_a_body_that_drips_is_given_up_though_it_never_stands_still() -> None:
    async with serving(window_s=SOON_S) as served, answering(served), client_of(served) as client:
        client.send(head("Content-Length: 200000"))

        async def drip() -> None:
            while True:
                client.send(b" ")
                await asyncio.sleep(SOON_S / 10)

        dripping = asyncio.create_task(drip())
        assert await status_of(client) == 408
        dripping.cancel()


async def test_all_unfinished_bodies_together_are_bounded() -> None:
    async with (
        serving(unfinished_bytes=300_000) as served,
        answering(served),
        client_of(served) as first,
        client_of(served) as second,
    ):
        first.send(head("Content-Length: 250000") + b" " * 200_000)
        async with asyncio.timeout(WAIT_S):
            while served.intake.held_bytes < 200_000:
                await asyncio.sleep(0.01)
        second.send(head("Content-Length: 250000") + b" " * 200_000)
        assert await status_of(second) == 503
        first.send(b" " * 50_000)
        assert await status_of(first) == 200
        assert served.intake.held_bytes == 0


async def test_a_large_body_is_not_gathered_before_its_handler_asks_for_it() -> None:
    async with serving() as served, client_of(served) as client:
        asked = asyncio.Event()

        async def refuse(request: web.BaseRequest) -> web.StreamResponse:
            asked.set()
            return web.Response(status=401)

        served.handle = refuse  # type: ignore[method-assign]
        client.send(head("Content-Length: 900000") + b" " * (MAX_GATHERED_BYTES + 1))
        assert await status_of(client) == 401 and asked.is_set()
        assert served.intake.held_bytes == 0
        assert all(not c._unread for c in served.http_server.open_connections)


async def test_silent_connections_make_room_and_requests_under_way_do_not() -> None:
    limits = ConnectionLimits(60.0, 60.0, max_connections=4, max_per_client=100)
    async with contextlib.AsyncExitStack() as stack:
        served = await stack.enter_async_context(serving(limits=limits))
        busy = await stack.enter_async_context(client_of(served))
        busy.send(post())
        pending = await served.next()
        silent = [await stack.enter_async_context(client_of(served)) for _ in range(10)]
        assert await silent[0].ended() == b""
        late = await stack.enter_async_context(client_of(served))
        late.send(post(b"late"))
        other = await served.next()
        other.answer(b"yes")
        assert (await late.answer())[1] == b"yes"
        pending.answer(b"still here")
        assert (await busy.answer())[1] == b"still here"
        assert len(served.http_server.open_connections) <= 4


async def test_one_client_address_has_a_bounded_number_of_connections() -> None:
    limits = ConnectionLimits(60.0, 60.0, max_connections=100, max_per_client=3)
    async with contextlib.AsyncExitStack() as stack:
        served = await stack.enter_async_context(serving(limits=limits))
        kept = [await stack.enter_async_context(client_of(served)) for _ in range(3)]
        for client in kept:
            client.send(post())
            (await served.next()).answer(b"ok")
            await client.answer()
        over = await stack.enter_async_context(client_of(served))
        with contextlib.suppress(ConnectionResetError):
            assert await over.ended() == b""
        assert len(served.http_server.open_connections) == 3


async def test_headers_without_end_are_cut_off() -> None:
    async with serving(limits=ConnectionLimits(60.0, 60.0)) as served, client_of(served) as client:
        client.send(b"PUT /x HTTP/1.1\r\nHost: x\r\n")
        with contextlib.suppress(ConnectionError):
            for n in range(120):
                client.send(b"X-%d: %b\r\n" % (n, b"a" * 4000))
                await client.writer.drain()
        rest = b""
        with contextlib.suppress(ConnectionError):
            rest = await client.ended()
        assert rest == b"" or rest.startswith(b"HTTP/1.1 4")


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "raw deflate"])
async def test_a_compressed_body_is_inflated(encoding: str) -> None:
    body = b"x" * 300_000
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = {
        "gzip": gzip.compress(body),
        "deflate": zlib.compress(body),
        "raw deflate": deflater.compress(body) + deflater.flush(),
    }[encoding]
    async with serving() as served, client_of(served) as client:
        name = encoding.removeprefix("raw ")
        client.send(head(f"Content-Encoding: {name}", f"Content-Length: {len(data)}") + data)
        assert (await client.answer())[1] == b"aiohttp:" + body


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "identity, deflate", "x"])
async def test_other_encodings_are_415_and_the_answer_names_those_that_are_read(
    encoding: str,
) -> None:
    async with serving() as served, answering(served), client_of(served) as client:
        client.send(head(f"Content-Encoding: {encoding}", "Content-Length: 2") + b"{}")
        top, _ = await client.answer()
        assert top.startswith(b"HTTP/1.1 415 ") and b"Accept-Encoding: gzip, deflate" in top


def test_a_bomb_is_too_large_as_soon_as_it_is_larger_than_a_body_may_be() -> None:
    bomb = zlib.compress(b"\0" * (64 << 20))
    with pytest.raises(BodyTooLarge):
        inflate(bomb, 15, 1 << 20)
    with pytest.raises(InvalidRequest):
        inflate(bomb[:1000], 15, 64 << 20)
    with pytest.raises(InvalidRequest):
        inflate(b"no zlib at all", 31, 1 << 20)
