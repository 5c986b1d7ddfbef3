"""Shell. An engine that costs almost nothing. It answers at once, and then moves all streams of one
pace together, as an engine's step does.

    python -m bench.gateways.mock_engine http PORT
    python -m bench.gateways.mock_engine worker CONFIG --gateway ENDPOINT [--gateway ...]
        [--workers N]

As `http` it is the OpenAI server behind the gateways that speak HTTP. As `worker` it takes the
place of the engine under this project's own agent. Both send the same tokens at the same pace. The
request's `seed` sets the pace in whole milliseconds between tokens (0: as fast as possible),
because every gateway passes that field on.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import uvloop

import worker.__main__
from shared.adapters.identity import AdapterRef
from shared.config.settings_file import read_settings
from shared.link.token_ids import pack
from shared.runtime import log as runtime_log
from shared.runtime.process import follow_parent
from worker.engine.base import (
    EngineFacts,
    EngineRequest,
    EngineStats,
    Loaded,
    Reply,
    Storing,
    Swap,
    Swapped,
)
from worker.engine.hang_detection import EngineSigns
from worker.engine.sim.answers import StreamOptions

CAPACITY = 100_000
SLOTS = 4_096
MAX_RANK = 512
TOKENS = tuple(b" tok%04d" % number for number in range(4_096))
TOKEN_BYTES = len(TOKENS[0])
DONE = b"data: [DONE]\n\n"
BACKLOG = 4_096
GC_THRESHOLD = (50_000, 50, 50)
MODELS = (
    b'{"object":"list","data":[{"id":"base","object":"model","created":1,'
    b'"owned_by":"bench","max_model_len":8192}]}'
)


_ABSENT = msgspec.Raw()


class MockRequest(msgspec.Struct):
    model: str = "base"
    stream: bool | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    seed: int | None = None
    messages: msgspec.Raw = _ABSENT
    stream_options: StreamOptions | None = None


_decode = msgspec.json.Decoder(MockRequest).decode


class MockAnswer:
    """The answer to one request, in vLLM's OpenAI shape. Whatever repeats is made once."""

    __slots__ = (
        "_after",
        "_before",
        "_head",
        "_last",
        "_usage",
        "pace_s",
        "sent",
        "stream",
        "tokens",
    )

    def __init__(self, body: bytes, number: int) -> None:
        """Raises msgspec.MsgspecError for a body that cannot be read."""
        request = _decode(body)
        self.tokens = min(request.max_completion_tokens or request.max_tokens or 16, len(TOKENS))
        self.stream = bool(request.stream)
        self.pace_s = (request.seed or 0) / 1e3
        self.sent = 0
        chat = bool(bytes(request.messages))
        kind = (b"chat.completion" if chat else b"text_completion") + (
            b".chunk" if chat and self.stream else b""
        )
        self._head = b'{"id":"chatcmpl-%032x","object":"%b","created":%d,"model":%b,"choices":[' % (
            number,
            kind,
            int(time.time()),
            msgspec.json.encode(request.model),
        )
        self._before = (
            b"data: "
            + self._head
            + (b'{"index":0,"delta":{"content":"' if chat else b'{"index":0,"text":"')
        )
        close = b'"},' if chat else b'",'
        self._after = close + b'"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'
        self._last = close + b'"logprobs":null,"finish_reason":"length","stop_reason":null}]}\n\n'
        wants_usage = request.stream_options is not None and request.stream_options.include_usage
        self._usage = (
            b"data: " + self._head + b'],"usage":' + self._counts() + b"}\n\n"
            if wants_usage
            else b""
        )

    def next(self) -> tuple[bytes, bool]:
        """The events of the next token, and whether it is the last."""
        number = self.sent
        self.sent = number + 1
        if self.sent >= self.tokens:
            return self._opening(number) + self._before + TOKENS[
                number
            ] + self._last + self._usage + DONE, True
        if number:
            return b"%b%b%b" % (self._before, TOKENS[number], self._after), False
        return self._opening(number) + self._before + TOKENS[number] + self._after, False

    def whole(self) -> bytes:
        text = b"".join(TOKENS[: self.tokens])
        return (
            self._head + b'{"index":0,"message":{"role":"assistant","content":"%b","refusal":null,'
            b'"tool_calls":[]},"logprobs":null,'
            % text
            + b'"finish_reason":"length","stop_reason":null}],"usage":'
            + self._counts()
            + b"}"
        )

    def _opening(self, number: int) -> bytes:
        """A chat begins with an event that names the role."""
        if number or b'"delta"' not in self._before:
            return b""
        return (
            self._before.replace(b'{"content":"', b'{"role":"assistant","content":"') + self._after
        )

    def _counts(self) -> bytes:
        return b'{"prompt_tokens":128,"completion_tokens":%d,"total_tokens":%d}' % (
            self.tokens,
            128 + self.tokens,
        )


class MockStream(Protocol):
    """One answer on its way. `step` sends the next token and says whether it was the last."""

    answer: MockAnswer

    def step(self) -> bool: ...


class Lockstep:
    """Moves all streams of one pace together. Its clock does not drift."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._groups: dict[float, dict[MockStream, None]] = {}

    def begin(self, stream: MockStream) -> bool:
        """Sends the first token at once. True if it was the last."""
        if stream.step():
            return True
        pace_s = stream.answer.pace_s
        group = self._groups.setdefault(pace_s, {})
        if not group:
            self._arm(pace_s, self._loop.time() + pace_s)
        group[stream] = None
        return False

    def leave(self, stream: MockStream) -> None:
        self._groups.get(stream.answer.pace_s, {}).pop(stream, None)

    def _arm(self, pace_s: float, when: float) -> None:
        if pace_s:
            self._loop.call_at(when, self._step, pace_s, when)
        else:
            self._loop.call_soon(self._step, pace_s, when)

    def _step(self, pace_s: float, when: float) -> None:
        group = self._groups[pace_s]
        for stream in [s for s in group if s.step()]:
            group.pop(stream, None)
        if group:
            self._arm(pace_s, max(when + pace_s, self._loop.time()))


# ---- behind gateways that speak HTTP -------------------------------------------------------------


class HttpStream:
    """Writes one answer's events to its connection, each in a chunk of its own, at most one write
    per step.
    """

    __slots__ = ("_frame", "_transport", "answer", "ended")

    def __init__(
        self, answer: MockAnswer, transport: asyncio.WriteTransport, ended: Callable[[], None]
    ) -> None:
        self.answer, self._transport, self.ended = answer, transport, ended

    def step(self) -> bool:
        if self._transport.is_closing():
            return True
        data, last = self.answer.next()
        chunk = b"%x\r\n%b\r\n" % (len(data), data)
        if self.answer.sent == 1:
            chunk = (
                b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; "
                b"charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk
            )
        self._transport.write(chunk + b"0\r\n\r\n" if last else chunk)
        if last:
            self.ended()
        return last


class HttpConnection(asyncio.Protocol):
    """Reads one request at a time: the next one once the one before has been answered."""

    def __init__(self, lockstep: Lockstep) -> None:
        self._lockstep = lockstep
        self._data = b""
        self._stream: HttpStream | None = None
        self._transport: asyncio.WriteTransport
        self._number = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport) or hasattr(transport, "write")
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        if self._stream is not None:
            self._lockstep.leave(self._stream)

    def data_received(self, data: bytes) -> None:
        self._data += data
        if self._stream is None:
            self._read()

    def _read(self) -> None:
        head_end = self._data.find(b"\r\n\r\n")
        if head_end < 0:
            return
        head = self._data[:head_end].lower()
        length_at = head.find(b"\r\ncontent-length:")
        length = int(head[length_at + 17 :].split(b"\r\n", 1)[0]) if length_at >= 0 else 0
        end = head_end + 4 + length
        if len(self._data) < end:
            if b"\r\nexpect: 100-continue" in head:
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            return
        body, self._data = self._data[head_end + 4 : end], self._data[end:]
        self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        if not head.startswith(b"post /") or b"/completions" not in head.split(b"\r\n", 1)[0]:
            self._write(MODELS if b"/models" in head[:40] else b"{}")
            return
        self._number += 1
        try:
            answer = MockAnswer(body, self._number)
        except msgspec.MsgspecError as error:
            self._write(b'{"error":{"message":"%b"}}' % str(error).encode(), b"400 Bad Request")
            return
        if not answer.stream:
            self._write(answer.whole())
            return
        self._stream = HttpStream(answer, self._transport, self._ended)
        self._lockstep.begin(self._stream)

    def _ended(self) -> None:
        self._stream = None
        if self._data:
            self._read()

    def _write(self, body: bytes, status: bytes = b"200 OK") -> None:
        self._transport.write(
            b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
            % (status, len(body), body)
        )
        if self._data:
            self._read()


async def serve_http(port: int) -> None:
    lockstep = Lockstep()
    server = await asyncio.get_running_loop().create_server(
        lambda: HttpConnection(lockstep), "127.0.0.1", port, backlog=BACKLOG
    )
    _tune()
    await server.serve_forever()


# ---- under this project's own agent --------------------------------------------------------------


class ReplyStream:
    """Hands one answer's events to the agent."""

    __slots__ = ("_reply", "answer", "ended")

    def __init__(self, answer: MockAnswer, reply: Reply, ended: asyncio.Future[None]) -> None:
        self.answer, self._reply, self.ended = answer, reply, ended

    def step(self) -> bool:
        data, last = self.answer.next()
        sent = self._reply.output_tokens = self.answer.sent
        if sent == 1:
            self._reply.head(200, True, data, last, pack((sent,)))
        else:
            self._reply.more(data, last, pack((sent,)))
        if last and not self.ended.done():
            self.ended.set_result(None)
        return last


class MockEngine:
    """Implements `worker.engine.base.Engine`. Loads take no time."""

    stage = "starting"

    def __init__(self, lockstep: Lockstep) -> None:
        self._lockstep = lockstep
        self._number = 0

    async def start(self) -> EngineFacts:
        return EngineFacts("mock", CAPACITY, SLOTS, MAX_RANK)

    async def serve(self, call: EngineRequest, reply: Reply) -> None:
        self._number += 1
        try:
            answer = MockAnswer(call.body, self._number)
        except msgspec.MsgspecError as error:
            reply.head(400, False, b'{"error":{"message":"%b"}}' % str(error).encode(), True)
            return
        reply.prompt_tokens, reply.output_tokens = 128, answer.tokens
        if not answer.stream:
            reply.head(200, False, answer.whole(), True)
            return
        stream = ReplyStream(answer, reply, asyncio.get_running_loop().create_future())
        if self._lockstep.begin(stream):
            return
        try:
            await stream.ended
        finally:
            self._lockstep.leave(stream)

    def read_ahead(self, ref: AdapterRef, int_id: int, folder: Path) -> None: ...
    def forget(self, int_id: int) -> None: ...
    async def prepare(self, adapter: Loaded) -> None: ...
    async def swap(self, swap: Swap) -> Swapped:
        return Swapped()

    def stores(self, answer_id: str) -> Storing:
        return Storing.NOT

    def copies(self) -> Iterator[tuple[str, bytes]]:
        return iter(())

    def keep_copy(self, answer_id: str, copy: bytes) -> None:
        return None

    def stats(self) -> EngineStats:
        return EngineStats()

    def signs(self) -> EngineSigns:
        return EngineSigns()

    async def ping(self) -> None: ...
    def died(self, callback: Callable[[str], None]) -> None: ...
    def broken(self) -> None: ...
    async def stop(self) -> None: ...


async def serve_workers(config: str, gateways: Sequence[str], workers: int) -> None:
    """So many workers in this one process, until it is killed: the worker's own composition, with
    this engine in the place of its own.
    """
    settings = read_settings(config)
    runtime_log.set_up("mock", "warning")
    lockstep = Lockstep()
    async with asyncio.TaskGroup() as tasks:
        for number in range(workers):
            mine = worker.__main__.worker_settings(settings, None, f"mock{number}", list(gateways))
            tasks.create_task(
                worker.__main__.serve(mine, lambda *_: MockEngine(lockstep)), name=mine.worker
            )
        _tune()


def _tune() -> None:
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLD)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gateways.mock_engine")
    kinds = parser.add_subparsers(dest="kind", required=True)
    http = kinds.add_parser("http")
    http.add_argument("port", type=int)
    link = kinds.add_parser("worker")
    link.add_argument("config")
    link.add_argument("--gateway", action="append", required=True)
    link.add_argument("--workers", type=int, default=1)
    flags = parser.parse_args()
    follow_parent()
    uvloop.run(
        serve_http(flags.port)
        if flags.kind == "http"
        else serve_workers(flags.config, flags.gateway, flags.workers)
    )


if __name__ == "__main__":
    main()
