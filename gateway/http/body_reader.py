"""Shell. Reads request bodies that did not arrive together with their head.

A body is read only when a handler asks for it, so the key was checked before. It must come within
bounded time and at a minimum rate, and one bound holds for all unfinished bodies together, of which
some is kept for other tenants. A compressed body is inflated in a thread, and its inflated size has
the same bound. A body counts until its handler has ended, or has given it to what counts it itself.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, cast

import brotli
from aiohttp import HttpVersion11, web
from backports import zstd

from gateway.http.turns import Turns
from shared.errors import BodyTimeout, BodyTooLarge, InvalidRequest, Overloaded, UnsupportedEncoding
from shared.held_bytes import HeldBytes

P = ParamSpec("P")
T = TypeVar("T")

WINDOW_S = 10.0
"""A client must send the minimum number of bytes in each window of this length. Else its request
ends.
"""
MIN_BYTES_PER_S = 1024
"""Slower than any network in use. A large body may take long at this rate. The bound for all
unfinished bodies together limits how many can do so.
"""
TOO_MANY_BODIES = "Too many large requests are being received."
INFLATE_STEP_BYTES = 256 << 10
READ_STEP_BYTES = 16 << 10
"""What follows a member within one step is copied, so a step is short."""
MAX_MEMBERS = 10_000
"""A decoder of zstd takes 9 us to make. So those of one body take a thread about as long as 32 MiB
of one member, which is 0.1 s. 32 MiB of the shortest frames would take 40 s.
"""
GZIP_WBITS = 31
ENCODINGS = ("gzip", "x-gzip", "deflate", "br", "zstd")
NAMED_ENCODINGS = "gzip, deflate, br, zstd"
_ZSTD: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 23}
"""8 MiB of memory, which RFC 8878 asks every decoder to have. Brotli needs 16 MiB at most."""
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """`max_bytes` bounds one body, `max_unfinished_bytes` all bodies that are being received at a
    time.
    """

    max_bytes: int
    max_unfinished_bytes: int
    window_s: float = WINDOW_S
    min_bytes_per_s: int = MIN_BYTES_PER_S


class BodyReader:
    """`held` are the bodies that are not complete yet, or are looked at."""

    def __init__(self, limits: BodyLimits) -> None:
        self.limits = limits
        self.held = HeldBytes()
        self.turns = Turns()

    @property
    def held_bytes(self) -> int:
        return self.held.total

    def request_factory(self, loop: asyncio.AbstractEventLoop) -> Any:
        """The request factory that aiohttp's server takes."""

        def make(
            message: Any, payload: Any, protocol: Any, writer: Any, task: Any
        ) -> web.BaseRequest:
            return BoundedRequest(self, message, payload, protocol, writer, task, loop)

        return make

    async def read(self, request: BoundedRequest) -> bytes:
        """The whole body, inflated.

        Raises BodyTooLarge, BodyTimeout, Overloaded, UnsupportedEncoding or InvalidRequest.
        """
        encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("identity", *ENCODINGS):
            unknown = UnsupportedEncoding(
                "The request body's Content-Encoding is not known here; send it as it is, or with "
                f"one of {NAMED_ENCODINGS}."
            )
            unknown.headers = {"Accept-Encoding": NAMED_ENCODINGS}
            raise unknown
        most = self.limits.max_bytes
        if (request.content_length or 0) > most:
            raise _too_large(most)
        content = request.content
        try:
            if content.is_eof():
                body = content.read_nowait()  # it came with its head: nothing to wait for
            else:
                body = await self._gather(request)
        except web.RequestPayloadError as exc:
            raise InvalidRequest(
                "The request body could not be read; is its framing right?"
            ) from exc
        if len(body) > most:
            raise _too_large(most)
        if encoding == "identity":
            return body
        request.hold(len(body))
        return await request.aside(inflate, body, encoding, most)

    async def _gather(self, request: BoundedRequest) -> bytes:
        limits, loop = self.limits, asyncio.get_running_loop()
        expects = request.headers.get("Expect", "").lower() == "100-continue"
        # a client of HTTP/1.0 would take it for the answer (RFC 9110, 10.1.1)
        if expects and request.version >= HttpVersion11 and request.transport:
            request.transport.write(CONTINUE)
        body = bytearray()
        due, least = loop.time() + limits.window_s, 1
        while not request.content.at_eof():
            try:
                async with asyncio.timeout_at(due):
                    chunk = await request.content.readany()
            except TimeoutError as exc:
                raise _too_slow(limits) from exc
            body += chunk
            request.hold(len(body))
            if len(body) > limits.max_bytes:
                raise _too_large(limits.max_bytes)
            if loop.time() >= due:
                raise _too_slow(limits)
            if len(body) >= least:
                due = loop.time() + limits.window_s
                least = len(body) + int(limits.window_s * limits.min_bytes_per_s)
        return bytes(body)


class BoundedRequest(web.BaseRequest):
    """aiohttp's request, with a body that BodyReader reads. `tenant` is known once the key was
    checked.
    """

    def __init__(self, intake: BodyReader, *args: Any) -> None:
        super().__init__(*args, client_max_size=intake.limits.max_bytes)
        self._intake = intake
        self._held = 0
        self.tenant = ""

    @property
    def path(self) -> str:
        """The path without a slash at its end: with one, it means the same."""
        return self.rel_url.path.rstrip("/") or "/"

    async def read(self) -> bytes:
        if self._read_bytes is None:
            body = await self._intake.read(self)
            self.hold(len(body))
            self._read_bytes = body
        return self._read_bytes

    async def aside(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Calls in a thread when it is the tenant's turn."""
        return await self._intake.turns.run(self.tenant, call, *args, **kwargs)

    def hold(self, size: int) -> None:
        """So much of the body is held now. Raises Overloaded if it is too much."""
        held, most = self._intake.held, self._intake.limits.max_unfinished_bytes
        held.add(self.tenant, size - self._held)
        self._held = size
        if held.beyond(self.tenant, most):
            raise Overloaded(TOO_MANY_BODIES, retry_after_s=1.0)

    def let_go(self) -> None:
        """The body counts no longer, and is not kept here: aiohttp's requests are in reference
        cycles, and live on for a while. Idempotent.
        """
        self._intake.held.add(self.tenant, -self._held)
        self._held, self._read_bytes = 0, b""


async def aside(
    request: web.BaseRequest, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """Calls in a thread when it is the turn of the request's tenant. Requests come from
    BodyReader's factory.
    """
    return await cast(BoundedRequest, request).aside(call, *args, **kwargs)


def inflate(data: bytes, encoding: str, most: int) -> bytes:
    """The inflated data. `encoding` is one of ENCODINGS. With gzip and zstd the data may be several
    members, which stand for their contents in a row (RFC 1952, 2.2; RFC 8878, 3.1).

    Raises BodyTooLarge as soon as it exceeds `most` bytes, and InvalidRequest if `data` is not
    whole, goes on after its end or has more than MAX_MEMBERS.
    """
    found = bytearray()
    pieces = {"br": _brotli_pieces, "zstd": _zstd_pieces, "deflate": _deflate_pieces}
    try:
        for piece in pieces.get(encoding, _gzip_pieces)(data):
            found += piece
            if len(found) > most:
                raise _too_large(most)
    except (zlib.error, brotli.error, zstd.ZstdError) as exc:
        raise InvalidRequest(
            "The compressed request body is broken, or goes on after its end."
        ) from exc
    return bytes(found)


def _gzip_pieces(data: bytes) -> Iterator[bytes]:
    return _member_pieces(data, lambda rest: _zlib_stream(rest, GZIP_WBITS))


def _zstd_pieces(data: bytes) -> Iterator[bytes]:
    return _member_pieces(data, _zstd_frame)


def _member_pieces(
    data: bytes, pieces_of_one: Callable[[memoryview], Generator[bytes, None, int]]
) -> Iterator[bytes]:
    """`pieces_of_one` yields the pieces of the first member and returns its length."""
    rest = memoryview(data)
    for _ in range(MAX_MEMBERS):
        rest = rest[(yield from pieces_of_one(rest)) :]
        if not rest:
            return
    raise InvalidRequest(
        f"The compressed request body has more than {MAX_MEMBERS} members; compress it as one."
    )


def _deflate_pieces(data: bytes) -> Iterator[bytes]:
    bare = len(data) > 0 and data[0] & 0x0F != 8  # some clients leave zlib's header out
    length = yield from _zlib_stream(memoryview(data), -15 if bare else 15)
    if length < len(data):
        raise InvalidRequest("The compressed request body goes on after its end.")


def _zlib_stream(data: memoryview, wbits: int) -> Generator[bytes, None, int]:
    decoder, taken = zlib.decompressobj(wbits), 0
    while not decoder.eof:
        step = data[taken : taken + READ_STEP_BYTES]
        piece = decoder.decompress(step, INFLATE_STEP_BYTES)
        # at the end the one may hold what the other does
        left = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
        taken += len(step) - len(left)
        yield piece
        _check_end(ended=decoder.eof or bool(step) or bool(piece))
    return taken


def _zstd_frame(data: memoryview) -> Generator[bytes, None, int]:
    decoder, taken = zstd.ZstdDecompressor(options=_ZSTD), 0
    while not decoder.eof:
        step = data[taken : taken + READ_STEP_BYTES] if decoder.needs_input else b""
        _check_end(ended=bool(step) or not decoder.needs_input)
        taken += len(step)
        yield decoder.decompress(step, INFLATE_STEP_BYTES)
    return taken - len(decoder.unused_data)


def _brotli_pieces(data: bytes) -> Iterator[bytes]:
    """Brotli itself calls bytes behind the end broken."""
    decoder = brotli.Decompressor()
    piece = decoder.process(data, output_buffer_limit=INFLATE_STEP_BYTES)
    while piece:
        yield piece
        piece = decoder.process(b"", output_buffer_limit=INFLATE_STEP_BYTES)
    _check_end(ended=decoder.is_finished())


def _check_end(*, ended: bool) -> None:
    if not ended:
        raise InvalidRequest("The compressed request body is not complete.")


def _too_large(most: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request body is larger than {most} bytes.")


def _too_slow(limits: BodyLimits) -> BodyTimeout:
    return BodyTimeout(
        f"The request body came too slowly: less than {limits.min_bytes_per_s} bytes a second."
    )
