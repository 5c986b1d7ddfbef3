"""Shell. How a request's body gets in when it did not come with its head: only for handlers that
ask for it (so after the key was checked), in bounded time, at a minimum rate, within a bound for
all unfinished bodies together; compressed bodies are inflated in a thread, up to the same size.
"""

from __future__ import annotations

import asyncio
import zlib
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from shared.errors import BodyTimeout, BodyTooLarge, InvalidRequest, Overloaded, UnsupportedEncoding

WINDOW_S = 10.0
"""A client must have sent its minimum in each of these; a body that stands still ends with one."""
MIN_BYTES_PER_S = 1024
"""Slower than any network that people use; a body of 32 MiB at this rate is caught by the bound for
all bodies together.
"""
INFLATE_STEP_BYTES = 256 << 10
_WBITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """`max_unfinished_bytes`: of all bodies that are being received at a time."""

    max_bytes: int
    max_unfinished_bytes: int
    window_s: float = WINDOW_S
    min_bytes_per_s: int = MIN_BYTES_PER_S


class BodyIntake:
    """Reads bodies. `held_bytes` are those of all that are not complete yet."""

    def __init__(self, limits: BodyLimits) -> None:
        self.limits = limits
        self.held_bytes = 0

    def request_factory(self, loop: asyncio.AbstractEventLoop) -> Any:
        """For aiohttp's server."""

        def make(
            message: Any, payload: Any, protocol: Any, writer: Any, task: Any
        ) -> web.BaseRequest:
            return BoundedRequest(self, message, payload, protocol, writer, task, loop)

        return make

    async def read(self, request: web.BaseRequest) -> bytes:
        """Raises BodyTooLarge, BodyTimeout, Overloaded, UnsupportedEncoding or InvalidRequest."""
        encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("identity", *_WBITS):
            raise UnsupportedEncoding(
                "The request body's Content-Encoding is not known here; send it as it is, or with "
                "gzip or deflate."
            )
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
        return await asyncio.to_thread(inflate, body, _WBITS[encoding], most)

    async def _gather(self, request: web.BaseRequest) -> bytes:
        limits, loop = self.limits, asyncio.get_running_loop()
        if request.headers.get("Expect", "").lower() == "100-continue" and request.transport:
            request.transport.write(CONTINUE)
        body = bytearray()
        try:
            due, least = loop.time() + limits.window_s, 1
            while not request.content.at_eof():
                try:
                    async with asyncio.timeout_at(due):
                        chunk = await request.content.readany()
                except TimeoutError as exc:
                    raise _too_slow(limits) from exc
                body += chunk
                self._hold(len(chunk))
                if len(body) > limits.max_bytes:
                    raise _too_large(limits.max_bytes)
                if loop.time() >= due:
                    raise _too_slow(limits)
                if len(body) >= least:
                    due = loop.time() + limits.window_s
                    least = len(body) + int(limits.window_s * limits.min_bytes_per_s)
            return bytes(body)
        finally:
            self.held_bytes -= len(body)

    def _hold(self, size: int) -> None:
        self.held_bytes += size
        if self.held_bytes > self.limits.max_unfinished_bytes:
            raise Overloaded("Too many large requests are being received.", retry_after_s=1.0)


class BoundedRequest(web.BaseRequest):
    """aiohttp's request, whose body comes in by `BodyIntake`."""

    def __init__(self, intake: BodyIntake, *args: Any) -> None:
        super().__init__(*args, client_max_size=intake.limits.max_bytes)
        self._intake = intake

    async def read(self) -> bytes:
        if self._read_bytes is None:
            self._read_bytes = await self._intake.read(self)
        return self._read_bytes


def inflate(data: bytes, wbits: int, most: int) -> bytes:
    """Raises BodyTooLarge as soon as there is more than `most`, InvalidRequest for broken data."""
    inflater = zlib.decompressobj(wbits)
    if wbits == 15 and len(data) > 0 and data[0] & 0x0F != 8:
        inflater = zlib.decompressobj(-15)  # some clients leave zlib's header out
    found = bytearray()
    try:
        while data and not inflater.eof:
            found += inflater.decompress(data, INFLATE_STEP_BYTES)
            data = inflater.unconsumed_tail
            if len(found) > most:
                raise _too_large(most)
        found += inflater.flush(INFLATE_STEP_BYTES) if not inflater.eof else b""
    except zlib.error as exc:
        raise InvalidRequest("The compressed request body is broken.") from exc
    if not inflater.eof:
        raise InvalidRequest("The compressed request body is not complete.")
    return bytes(found)


def _too_large(most: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request body is larger than {most} bytes.")


def _too_slow(limits: BodyLimits) -> BodyTimeout:
    return BodyTimeout(
        f"The request body came too slowly: less than {limits.min_bytes_per_s} bytes a second."
    )
