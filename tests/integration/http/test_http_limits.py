"""Shell. What one client can make a listener hold, over real TCP: silence, slowness, bodies that
never end or that grow when they are decompressed, and many connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import itertools
import json
import time
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Callable

import brotli
import pytest
from aiohttp import web
from backports import zstd

from gateway.http.body_reader import MAX_MEMBERS, BoundedRequest, inflate
from gateway.http.connection import MAX_GATHERED_BYTES
from gateway.http.json_responses import answer
from gateway.http.response import AlreadySent
from gateway.http.server import ConnectionLimits
from shared.errors import BodyTooLarge, InvalidRequest, LoraplexError
from tests.integration.http.test_http_server import (
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


def error_in(answered: bytes) -> dict[str, str]:
    """Of an answer in HTTP/1.1 whose body is the one error object."""
    lines, _, body = answered.partition(b"\r\n\r\n")
    assert lines.startswith(b"HTTP/1.1 ") and b"application/json" in lines, answered
    assert b"\r\nDate: " in lines
    error: dict[str, str] = json.loads(body)["error"]
    assert {*error} == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    "lines",
    [
        ["Cookie: s=" + "a" * 12_000],
        ["X-Token: " + "a" * 60_000],
        [f"X-{n}: {'a' * 7000}" for n in range(8)],
        [f"X-{n:04}: {'a' * 24}" for n in range(1000)],
    ],
    ids=["cookie", "token", "many", "short"],
)
async def test_headers_of_sixty_kilobytes_are_served(lines: list[str]) -> None:
    async with serving() as served, client_of(served) as client:
        client.send(head("Content-Length: 2", *lines) + b"{}")
        assert await status_of(client) == 200


@pytest.mark.parametrize("lines", [1, 1000], ids=["one", "many"])
async def test_headers_without_end_are_431_in_the_one_shape(lines: int) -> None:
    async with serving() as served, client_of(served) as client:
        long = [f"X-{n}: {'a' * (2_000_000 // lines)}" for n in range(lines)]
        client.send(head("Content-Length: 2", *long) + b"{}")
        assert error_in(await client.ended())["code"] == "headers_too_large"


async def test_more_headers_than_anybody_needs_are_431_in_the_one_shape() -> None:
    async with serving() as served, client_of(served) as client:
        client.send(head("Content-Length: 2", *(f"X-{n}: a" for n in range(5000))) + b"{}")
        assert error_in(await client.ended())["code"] == "headers_too_large"


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\r\n\r\n",
        head("Content-Length: abc"),
        head("a b: c"),
    ],
    ids=["version", "TLS", "length", "name"],
)
async def test_what_is_no_http_is_a_400_in_the_one_shape(sent: bytes) -> None:
    async with serving() as served, client_of(served) as client:
        client.send(sent)
        assert error_in(await client.ended())["code"] == "invalid_request"


async def test_a_request_that_is_too_slow_is_a_408_in_the_one_shape() -> None:
    async with serving(limits=QUICK) as served, client_of(served) as client:
        client.send(head()[:-2])
        assert error_in(await client.ended())["code"] == "body_timeout"


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
        await served.until_held(200_000)
        second.send(head("Content-Length: 250000") + b" " * 200_000)
        assert await status_of(second) == 503
        first.send(b" " * 50_000)
        assert await status_of(first) == 200
        assert served.intake.held_bytes == 0


async def test_unfinished_bodies_of_one_tenant_leave_room_for_another_s() -> None:
    async with (
        serving(unfinished_bytes=300_000) as served,
        client_of(served) as first,
        client_of(served) as second,
        client_of(served) as other,
    ):
        plain = served.handle

        async def of_tenant(request: web.BaseRequest) -> web.StreamResponse:
            assert isinstance(request, BoundedRequest)
            request.tenant = request.path.rpartition("/")[2]
            return await plain(request)

        served.handle = of_tenant  # type: ignore[method-assign]
        async with answering(served):
            unfinished = b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n"
            first.send(unfinished % 250_000 + b" " * 200_000)
            async with asyncio.timeout(WAIT_S):
                while served.intake.held_bytes < 200_000:
                    await asyncio.sleep(0.01)
            second.send(unfinished % 80_000 + b" " * 80_000)
            assert await status_of(second) == 503
            other.send(unfinished.replace(b"/a", b"/b") % 80_000 + b" " * 80_000)
            assert await status_of(other) == 200


async def test_small_bodies_that_are_gathered_before_the_key_is_looked_at_count_with_them() -> None:
    part = head("Content-Length: 60000") + b" " * 50_000
    async with (
        serving(unfinished_bytes=80_000) as served,
        client_of(served) as first,
        client_of(served) as second,
    ):
        first.send(part)
        await served.until_held(50_000)
        second.send(part)
        assert await status_of(second) == 503
        first.send(b" " * 10_000)
        (await served.next()).answer(b"ok")
        assert (await first.answer())[1] == b"ok"
        await second.ended()
        async with asyncio.timeout(WAIT_S):
            while served.intake.held_bytes:
                await asyncio.sleep(0.01)


async def test_unfinished_bodies_of_one_client_without_a_key_leave_room_for_another() -> None:
    part = head("Content-Length: 60000") + b" " * 45_000
    async with contextlib.AsyncExitStack() as stack:
        served = await stack.enter_async_context(serving(unfinished_bytes=500_000))
        for _ in range(20):
            flooding = await stack.enter_async_context(client_of(served))
            flooding.send(part)
        intake, connections = served.intake, served.http_server.open_connections
        async with asyncio.timeout(WAIT_S):
            while len(connections) > 11 or intake.held_bytes < 400_000:
                await asyncio.sleep(0.01)
        honest = await stack.enter_async_context(client_of(served, "127.0.0.2"))
        before = intake.held_bytes
        honest.send(part)
        async with asyncio.timeout(WAIT_S):
            while intake.held_bytes < before + 45_000:
                await asyncio.sleep(0.01)
        honest.send(b" " * 15_000)
        (await served.next()).answer(b"ok")
        assert (await honest.answer())[1] == b"ok"


async def test_what_is_sent_behind_a_request_that_is_being_answered_counts_with_them() -> None:
    async with contextlib.AsyncExitStack() as stack:
        served = await stack.enter_async_context(serving(unfinished_bytes=300_000))
        clients = [await stack.enter_async_context(client_of(served)) for _ in range(8)]
        for client in clients:
            client.send(post())
            await served.next()
            client.send(b" " * 100_000)
        async with asyncio.timeout(WAIT_S):
            while len(served.http_server.open_connections) == len(clients):
                await asyncio.sleep(0.01)
        assert served.intake.held_bytes <= 300_000


async def test_unfinished_heads_count_as_much_as_they_take() -> None:
    part = head(*(f"X-{n}: {n}" for n in range(1000)), method="PUT")[:-2]
    async with contextlib.AsyncExitStack() as stack:
        served = await stack.enter_async_context(serving(unfinished_bytes=100 * len(part)))
        clients = [await stack.enter_async_context(client_of(served)) for _ in range(8)]
        for client in clients:
            client.send(part)
        assert await clients[-1].begins() == b"HTTP/1.1 503"
        assert 50 * len(part) <= served.intake.held_bytes <= 100 * len(part)
        clients[0].send(b"\r\n")
        assert (await clients[0].answer())[1] == b"aiohttp:"
    async with asyncio.timeout(WAIT_S):
        while served.intake.held_bytes:
            await asyncio.sleep(0.01)


CHUNKED = head("Transfer-Encoding: chunked") + b"2\r\n{}\r\n0\r\n\r\n"
"""It is aiohttp's, and so is all that follows it."""


async def test_nor_does_what_is_sent_behind_a_request_that_aiohttp_answers() -> None:
    async with contextlib.AsyncExitStack() as stack:
        served = await stack.enter_async_context(serving(unfinished_bytes=300_000))
        served.hold = asyncio.Event()
        clients = [await stack.enter_async_context(client_of(served)) for _ in range(8)]
        for client in clients:
            client.send(CHUNKED)
        async with asyncio.timeout(WAIT_S):
            while served.waiting < len(clients):
                await asyncio.sleep(0.01)
        for client in clients:
            client.send(head("Content-Length: 100000") + b" " * 100_000)
        async with asyncio.timeout(WAIT_S):
            while len(served.http_server.open_connections) == len(clients):
                await asyncio.sleep(0.01)
        assert 100_000 <= served.intake.held_bytes <= 300_000
        served.hold.set()
        async with asyncio.timeout(WAIT_S):
            while served.intake.held_bytes:
                await asyncio.sleep(0.01)


async def test_heads_behind_a_request_are_not_parsed_before_it_is_nearly_their_turn() -> None:
    count = 30
    heads = head(*(f"X-{n}: {n}" for n in range(1000)), method="GET") * count
    async with serving() as served, client_of(served) as client:
        served.hold = asyncio.Event()
        client.send(CHUNKED)
        async with asyncio.timeout(WAIT_S):
            while not served.waiting:
                await asyncio.sleep(0.01)
        tracemalloc.start()
        client.send(heads)
        await served.until_held(10_000)
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert held < 4 * len(heads)  # 25 times as much if they were
        served.hold.set()
        for _ in range(1 + count):
            assert (await client.answer())[1].startswith(b"aiohttp:")


@pytest.mark.parametrize(
    "line", [b"X: " + b"x" * 50_000 + b"\r\n", b"X: x\r\n"], ids=["of long lines", "of short"]
)
async def test_a_head_behind_a_request_that_aiohttp_answers_is_bounded_as_any_other(
    line: bytes,
) -> None:
    async with serving(unfinished_bytes=100_000) as served, client_of(served) as client:
        served.hold = asyncio.Event()
        client.send(CHUNKED)
        async with asyncio.timeout(WAIT_S):
            while not served.waiting:
                await asyncio.sleep(0.01)
            client.send(head(method="GET")[:-2])
            with pytest.raises(ConnectionError):
                for _ in range(1000):
                    client.send(line)
                    await client.writer.drain()
                    await asyncio.sleep(0)
                await client.ended()
        async with asyncio.timeout(WAIT_S):
            while served.intake.held_bytes:
                await asyncio.sleep(0.01)


async def test_a_head_that_begins_behind_a_request_and_stops_is_closed() -> None:
    limits = ConnectionLimits(idle_timeout_s=WAIT_S, header_timeout_s=SOON_S)
    async with serving(limits=limits) as served, client_of(served) as client:
        served.hold = asyncio.Event()
        client.send(CHUNKED)
        async with asyncio.timeout(WAIT_S):
            while not served.waiting:
                await asyncio.sleep(0.01)
        client.send(head(method="GET")[:-2])
        await served.until_held(100)
        await asyncio.sleep(2 * SOON_S)  # the answer before it takes longer than a head may
        served.hold.set()
        assert (await client.answer())[1] == b"aiohttp:{}"
        client.send(b"X: x\r\n")
        assert (await client.ended()).startswith(b"HTTP/1.1 408 ")


async def test_who_holds_nothing_is_not_cut_off_for_what_others_of_its_address_hold() -> None:
    async with contextlib.AsyncExitStack() as stack:
        served = await stack.enter_async_context(serving(unfinished_bytes=300_000))
        part = head("Content-Length: 60000") + b" " * 45_000
        for held in range(1, 5):
            holding = await stack.enter_async_context(client_of(served))
            holding.send(part)
            await served.until_held(held * 45_000)
        with_key = await stack.enter_async_context(client_of(served, "127.0.0.2"))
        with_key.send(head("Content-Length: 100000") + b" " * 95_000)
        await served.until_held(275_000)
        honest = await stack.enter_async_context(client_of(served))
        honest.send(head(method="GET"))
        assert (await honest.answer())[1] == b"aiohttp:"


async def test_requests_behind_a_body_that_came_late_are_all_answered() -> None:
    async with serving() as served, client_of(served) as client:
        client.send(CHUNKED[:-5])
        async with asyncio.timeout(WAIT_S):
            while not served.begun:
                await asyncio.sleep(0.01)
        client.send(CHUNKED[-5:] + head(method="GET") * 40)  # aiohttp alone stops behind the 31st
        for _ in range(41):
            assert (await client.answer())[1].startswith(b"aiohttp:")


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


async def test_inflated_bodies_are_bounded_together_until_their_handlers_have_ended() -> None:
    body = gzip.compress(bytes(200_000))
    request = head("Content-Encoding: gzip", f"Content-Length: {len(body)}") + body
    async with (
        serving(unfinished_bytes=300_000) as served,
        answering(served),
        client_of(served) as first,
        client_of(served) as second,
    ):
        served.hold = asyncio.Event()
        first.send(request)
        await served.until_held(200_000)
        second.send(request)
        assert await status_of(second) == 503
        served.hold.set()
        assert await status_of(first) == 200
        assert served.intake.held_bytes == 0


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "raw deflate", "br", "zstd"])
async def test_a_compressed_body_is_inflated(encoding: str) -> None:
    body = b"x" * 300_000
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = {
        "gzip": gzip.compress(body),
        "deflate": zlib.compress(body),
        "raw deflate": deflater.compress(body) + deflater.flush(),
        "br": brotli.compress(body),
        "zstd": zstd.compress(body),
    }[encoding]
    async with serving() as served, client_of(served) as client:
        name = encoding.removeprefix("raw ")
        client.send(head(f"Content-Encoding: {name}", f"Content-Length: {len(data)}") + data)
        assert (await client.answer())[1] == b"aiohttp:" + body


@pytest.mark.parametrize("encoding", ["compress", "gzip, gzip", "identity, deflate", "x"])
async def test_other_encodings_are_415_and_the_answer_names_those_that_are_read(
    encoding: str,
) -> None:
    async with serving() as served, answering(served), client_of(served) as client:
        client.send(head(f"Content-Encoding: {encoding}", "Content-Length: 2") + b"{}")
        top, _ = await client.answer()
        assert (
            top.startswith(b"HTTP/1.1 415 ") and b"Accept-Encoding: gzip, deflate, br, zstd" in top
        )


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "br": brotli.compress,
    "zstd": zstd.compress,
}


@pytest.mark.parametrize("encoding", COMPRESS)
def test_a_bomb_is_too_large_as_soon_as_it_is_larger_than_a_body_may_be(encoding: str) -> None:
    bomb = COMPRESS[encoding](b"\0" * (64 << 20))
    tracemalloc.start()
    with pytest.raises(BodyTooLarge):
        inflate(bomb, encoding, 1 << 20)
    _, most_held = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most_held < 4 << 20
    with pytest.raises(InvalidRequest, match="complete"):
        inflate(bomb[:-5], encoding, 65 << 20)
    with pytest.raises(InvalidRequest):
        inflate(b"no such thing at all", encoding, 1 << 20)


@pytest.mark.parametrize("encoding", COMPRESS)
def test_what_follows_a_compressed_body_is_not_left_out_in_silence(encoding: str) -> None:
    compress = COMPRESS[encoding]
    one_member = [compress(b"}")] if encoding in ("deflate", "br") else []
    for rest in (*one_member, b"rest of it", bytes(100)):
        with pytest.raises(InvalidRequest, match="after its end"):
            inflate(compress(b"{") + rest, encoding, 1 << 20)


SKIPPED = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
"""A frame of zstd that is to be skipped, as pzstd writes them."""
PARTS = (b"", b'{"a": ', b"", b"x" * 700_000, bytes(range(256)) * 80, b"}", b"")
"""The contents of several members; more than one step reads, and more than a step inflates."""
MEMBERS: dict[str, list[bytes]] = {
    "gzip": [gzip.compress(part) for part in PARTS],
    "x-gzip": [gzip.compress(part, 0) for part in PARTS],
    "zstd": [SKIPPED, *(zstd.compress(part) for part in PARTS), SKIPPED],
}


@pytest.mark.parametrize("encoding", MEMBERS)
async def test_a_body_of_several_members_is_their_contents_in_a_row(encoding: str) -> None:
    data = b"".join(MEMBERS[encoding])
    async with serving() as served, client_of(served) as client:
        client.send(head(f"Content-Encoding: {encoding}", f"Content-Length: {len(data)}") + data)
        assert (await client.answer())[1] == b"aiohttp:" + b"".join(PARTS)


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_members_that_are_cut_at_any_byte_but_an_end_are_not_complete(encoding: str) -> None:
    members = MEMBERS[encoding]
    data, ends = b"".join(members), {*itertools.accumulate(map(len, members))}
    for length in range(len(data)):
        if length in ends:
            assert b"".join(PARTS).startswith(inflate(data[:length], encoding, 1 << 20))
        else:
            with pytest.raises(InvalidRequest, match="complete"):
                inflate(data[:length], encoding, 1 << 20)


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_the_members_of_a_body_have_one_bound_together(encoding: str) -> None:
    member = COMPRESS[encoding](bytes(1 << 20))
    assert len(inflate(member * 4, encoding, 4 << 20)) == 4 << 20
    tracemalloc.start()
    with pytest.raises(BodyTooLarge):
        inflate(member * 64, encoding, 4 << 20)
    _, most_held = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most_held < 10 << 20


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_a_body_of_nothing_but_tiny_members_has_a_bound_of_its_own(encoding: str) -> None:
    member = COMPRESS[encoding](b"")
    assert inflate(member * MAX_MEMBERS, encoding, 1) == b""
    begun = time.thread_time()
    with pytest.raises(InvalidRequest, match=f"more than {MAX_MEMBERS} members"):
        inflate(member * (MAX_MEMBERS * 100), encoding, 1)
    assert time.thread_time() - begun < 1.0  # it takes 0.1 s


def test_a_window_that_takes_more_memory_than_every_decoder_has_is_refused() -> None:
    options: dict[int, int] = {
        zstd.CompressionParameter.window_log: 27,
        zstd.CompressionParameter.content_size_flag: 0,
    }
    compressor = zstd.ZstdCompressor(options=options)
    data = compressor.compress(b"x" * (1 << 20)) + compressor.flush()
    with pytest.raises(InvalidRequest, match="broken"):
        inflate(data, "zstd", 64 << 20)


LARGE = b"x" * (64 << 20)
"""More than the two sockets of a connection hold, wherever the tests run."""


@contextlib.asynccontextmanager
async def large_answers(
    served: Served, client: Client, path: str
) -> AsyncIterator[asyncio.Queue[None]]:
    """The client asks for a large answer and reads nothing of it. Yields a queue that gets an item
    for each further request that is begun.
    """
    begun: asyncio.Queue[None] = asyncio.Queue()

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        begun.put_nowait(None)
        assert request.transport is not None
        request.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(LARGE))
        request.transport.write(LARGE)
        return AlreadySent(request, 200, True)

    served.handle, served.refuse = handle, path == "aiohttp"  # type: ignore[method-assign]
    transport = client.reads_nothing()
    client.send(post())
    if path == "fast":
        (await served.next()).answer(LARGE)
    else:
        await asyncio.wait_for(begun.get(), WAIT_S)
    yield begun
    if not transport.is_closing():
        transport.resume_reading()
        for _ in range(2):
            assert len((await client.answer())[1]) == len(LARGE)
        assert begun.qsize() == 1


def waiting_requests(served: Served) -> int:
    (connection,) = served.http_server.open_connections
    inner = connection._aiohttp
    return len(connection._unread) or (len(inner._messages) if inner is not None else 0)


@pytest.mark.parametrize("path", ["fast", "aiohttp"])
async def test_no_request_is_begun_while_its_client_reads_no_answer(path: str) -> None:
    async with (
        serving() as served,
        client_of(served) as client,
        large_answers(served, client, path) as begun,
    ):
        client.send(post())
        async with asyncio.timeout(WAIT_S):
            while begun.empty() and served.on_fast_path.empty() and not waiting_requests(served):
                await asyncio.sleep(0.01)
        assert begun.empty() and served.on_fast_path.empty()
        served.refuse = True


@pytest.mark.parametrize("path", ["fast", "aiohttp"])
async def test_a_client_that_reads_nothing_of_a_whole_answer_is_cut_off(path: str) -> None:
    limits = ConnectionLimits(idle_timeout_s=SOON_S, header_timeout_s=60.0)
    async with (
        serving(limits=limits) as served,
        client_of(served) as client,
        large_answers(served, client, path),
    ):
        async with asyncio.timeout(WAIT_S):
            while served.http_server.open_connections:
                await asyncio.sleep(0.01)
        client.writer.transport.abort()
