"""Shell. A gateway process without its sockets: production's objects, and clients and one worker
played in the same process. So what the gateway itself does for a request is counted, and nothing
else: no system calls, no engine, no load test.

As a script it measures the checkout on PYTHONPATH, which may be another one than its own. Each line
on stdin is a Measurement in JSON, and each line on stdout its Cost.

    PYTHONPATH=CHECKOUT python bench/gateways/in_process.py
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from hashlib import sha256
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import uvloop

from gateway.accounts.account import AccountLimits
from gateway.app import GatewayProcess, open_gateway
from gateway.http.connection import Connection
from gateway.http.server import ConnectionLimits
from shared.adapters.identity import CONFIG_FILE, WEIGHTS_FILE
from shared.config.settings_file import FollowedConfig, read_settings
from shared.link import messages
from shared.link.sockets import SendResult
from shared.link.token_ids import pack

KEY = "a-key-of-the-benchmark"
PLENTY = 1_000_000_000
EVENT = (
    b'data: {"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion.chunk",'
    b'"created":1764400000,"model":"base:tuned","choices":[{"index":0,"delta":{"content":" token"},'
    b'"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'
)
LAST_EVENT = EVENT + b"data: [DONE]\n\n"
WHOLE = b'{"id":"chatcmpl-0123456789abcdef","choices":[{"message":{"content":"%b"}}]}' % (
    b"w " * 64
)
PROMPT_WORDS = 200
HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:8000\r\n"
    b"Accept-Encoding: gzip, deflate\r\nConnection: keep-alive\r\nAccept: application/json\r\n"
    b"Content-Type: application/json\r\nUser-Agent: OpenAI/Python 2.8.1\r\n"
    b"X-Stainless-Lang: python\r\nX-Stainless-OS: Linux\r\nX-Stainless-Async: async:asyncio\r\n"
    b"Authorization: Bearer %b\r\nContent-Length: %%d\r\n\r\n" % KEY.encode()
)
"""As OpenAI's Python client writes it."""
PEER = messages.identity("w0", 1)
SLOTS = 8
COUNTED = ("gateway.", "shared.", "aiohttp.", "enum", "collections")
"""Modules. The event loop is not among them: production's is written in C."""
GC_THRESHOLD = (50_000, 50, 50)  # as in gateway/__main__.py


class Measurement(msgspec.Struct, frozen=True):
    """So many `rounds`, in each of which every one of `clients` gets one answer. `tokens` 0: the
    answer is sent whole; else it is a stream of so many frames, one for each token, and all streams
    move in one step. `limited`: with keys, all limits, and the ledger. `counted`: calls and
    instructions are counted instead of time.
    """

    clients: int = 64
    rounds: int = 10
    tokens: int = 0
    adapter: bool = True
    limited: bool = False
    counted: bool = False


class Cost(msgspec.Struct, frozen=True):
    """Of one answer. `calls` are calls of Python functions, by `module:function`; `c_calls` those
    of functions written in C; `instructions` those of Python's bytecode.
    """

    cpu_us: float = 0.0
    calls: dict[str, float] = {}
    c_calls: float = 0.0
    instructions: float = 0.0

    @property
    def all_calls(self) -> float:
        return sum(self.calls.values())


# ---- what is played ------------------------------------------------------------------------------


class PlayedSocket:
    """Takes every message."""

    endpoint = "played"

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def send(self, peer: bytes, data: bytes) -> SendResult:
        self.sent.append(data)
        return SendResult.OK

    def close(self) -> None:
        return None


class PlayedTransport:
    """A client that reads at once. Its methods are written in C, as uvloop's are."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.write = self.written.append
        self.get_write_buffer_size = int
        self.is_closing = self.can_write_eof = bool
        self.pause_reading = self.resume_reading = self.close = self.abort = bool

    def get_extra_info(self, name: str) -> tuple[str, int]:
        return "127.0.0.1", 1


class PlayedGateway:
    """The gateway process with its clients and its worker."""

    def __init__(self, gateway: GatewayProcess) -> None:
        self._gateway = gateway
        self._control, self._data = PlayedSocket(), PlayedSocket()
        link = gateway.link
        link.control.close()
        link.data.close()
        link.control, link.data = self._control, self._data  # type: ignore[assignment]
        self._server = gateway.routes.http_server(ConnectionLimits(75.0))
        self._clients: list[tuple[Connection, PlayedTransport]] = []
        self._channel = self._number = self._acked = 0

    async def join(self) -> None:
        """The worker comes, with the adapter in a slot."""
        catalog = self._gateway.routes._catalogs["base"]
        assert catalog is not None
        digest = (await catalog.latest("tuned")).digest
        held = (messages.AdapterState("tuned", digest, messages.Tier.GPU),)
        serving = messages.WorkerState.SERVING
        beat = messages.Heartbeat(
            "w0", 1, 1, "base", serving, 4096, SLOTS, adapters=held, tasks=("generate",)
        )
        self._gateway.dispatcher.inbox.on_control(PEER, messages.encode(beat))
        welcome = messages.decode_gateway_control(self._control.sent[-1])
        assert type(welcome) is messages.Welcome
        self._channel = welcome.channel
        self.arrive([self.packet(messages.Attach("w0", 1))])
        self.requests()

    def connect(self, clients: int) -> None:
        for _ in range(clients):
            connection, transport = self._server(), PlayedTransport()
            connection.connection_made(transport)  # type: ignore[arg-type]
            self._clients.append((connection, transport))

    def leave(self) -> None:
        """All clients leave, and their connections have no timer any more."""
        for connection, _ in self._clients:
            connection.connection_lost(None)

    def packet(self, message: messages.WorkerData) -> bytes:
        self._number += 1
        body = messages.encode(message)
        return messages.encode(
            messages.DataPacket(self._channel, self._number, self._acked, memoryview(body))
        )

    def arrive(self, packets: Sequence[bytes]) -> None:
        """The worker's packets arrive."""
        arrive = self._gateway.link._data_in
        for packet in packets:
            arrive(PEER, packet)

    def ask(self, request: bytes) -> None:
        """Every client sends the request."""
        for connection, _ in self._clients:
            connection.data_received(request)

    def requests(self) -> list[int]:
        """The stream ids of the requests that have come to the worker since the last call."""
        packets = [messages.decode_packet(data) for data in self._data.sent]
        self._data.sent.clear()
        bodies = [p for p in packets if type(p) is messages.DataPacket]
        self._acked += len(bodies)
        found = [messages.decode_gateway_data(p.body) for p in bodies]
        return [m.sid for m in found if type(m) is messages.Generate]

    def answers(self, sids: Sequence[int], tokens: int) -> list[bytes]:
        """The packets with all answers. See Measurement."""
        status, done = 200 << messages.STATUS_SHIFT, [messages.Done(sid, 256, 64) for sid in sids]
        if not tokens:
            flags = status | messages.END
            step = messages.Step([(sid, flags, WHOLE, b"") for sid in sids], done)
            return [self.packet(step)]
        heads = messages.Step([(sid, status | messages.SSE, EVENT, pack((1,))) for sid in sids])
        packets = [self.packet(heads)]
        for token in range(2, tokens):
            frames = [(sid, 0, EVENT, pack((token,))) for sid in sids]
            packets.append(self.packet(messages.Step(frames)))
        ends = [(sid, messages.END, LAST_EVENT, pack((tokens,))) for sid in sids]
        return [*packets, self.packet(messages.Step(ends, done))]

    def check(self, answers: int) -> None:
        """All clients have got so many answers since the last call. They forget them."""
        for _, transport in self._clients:
            text = b"".join(transport.written)
            assert text.count(b"HTTP/1.1 200 OK\r\n") == answers, text[:1000]
            assert text.endswith((b"}}]}", b"\r\n0\r\n\r\n")), text[-1000:]
            transport.written.clear()


@contextlib.asynccontextmanager
async def played_gateway(folder: Path, limited: bool = False) -> AsyncIterator[PlayedGateway]:
    """`folder`: an empty one. `limited`: see Measurement."""
    (folder / "adapters" / "tuned").mkdir(parents=True)
    for part in (CONFIG_FILE, WEIGHTS_FILE):
        (folder / "adapters" / "tuned" / part).write_text("{}")
    model = {
        "model_loading_config": {"model_id": "base"},
        "llm_engine": "sim",
        "lora_config": {"dynamic_lora_loading_path": str(folder / "adapters")},
        "deployment_config": {"max_ongoing_requests": 4096},
    }
    options: dict[str, Any] = {"state_dir": str(folder / "state")}
    if limited:
        limits = dict.fromkeys(AccountLimits.__struct_fields__, PLENTY)
        entry = {"name": "one", "sha256": sha256(KEY.encode()).hexdigest(), "limits": limits}
        (folder / "keys.yaml").write_text(json.dumps({"keys": [entry]}))
        options["keys_file"] = str(folder / "keys.yaml")
    else:
        options["usage_months"] = 0
    file, run_dir = folder / "config.yaml", folder / "state" / "run"
    file.write_text(json.dumps({"llm_configs": [model], "gateway": options}))  # JSON is YAML
    run_dir.mkdir(parents=True)
    settings = read_settings(str(file))
    config = FollowedConfig(str(file), settings, lambda: settings)
    async with open_gateway(settings, config, 0, run_dir) as process:
        gateway = PlayedGateway(process)
        # the only one of the gateway's loops that makes a request cheaper
        keeps_lock = asyncio.create_task(process.loops["limits"]())
        await asyncio.sleep(0)
        try:
            yield gateway
        finally:
            keeps_lock.cancel()
            gateway.leave()


# ---- what is measured ----------------------------------------------------------------------------


class CPUTime:
    """The CPU time of this process while it is entered."""

    def __init__(self) -> None:
        self.spent_s = 0.0

    def __enter__(self) -> None:
        self._began = time.process_time()

    def __exit__(self, *_: object) -> None:
        self.spent_s += time.process_time() - self._began


class CallCount:
    """What this thread calls and executes in the modules COUNTED while it is entered."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.c_calls = self.instructions = 0

    def __enter__(self) -> None:
        sys.settrace(self._follow)
        sys.setprofile(self._note)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        sys.settrace(None)

    def _follow(self, frame: FrameType, event: str, _: object) -> Any:
        if not _counts(frame):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._execute

    def _execute(self, frame: FrameType, event: str, _: object) -> Any:
        self.instructions += event == "opcode"
        return self._execute

    def _note(self, frame: FrameType, event: str, _: object) -> None:
        if not _counts(frame):
            return
        if event == "call":
            name = f"{frame.f_globals['__name__']}:{frame.f_code.co_qualname}"
            self.calls[name] += 1
        elif event == "c_call":
            self.c_calls += 1


def _counts(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).startswith(COUNTED)


async def measure(wanted: Measurement, gateway: PlayedGateway) -> Cost:
    time_spent, count = CPUTime(), CallCount()
    meter = count if wanted.counted else time_spent
    request = _request(wanted)
    for _ in range(wanted.rounds):
        with meter:
            gateway.ask(request)
        packets = gateway.answers(gateway.requests(), wanted.tokens)
        with meter:
            gateway.arrive(packets)
            await asyncio.sleep(0)  # what was put off to the loop's next turn
        gateway.check(1)
    answers = wanted.rounds * wanted.clients
    return Cost(
        time_spent.spent_s / answers * 1e6,
        {name: calls / answers for name, calls in count.calls.items()},
        count.c_calls / answers,
        count.instructions / answers,
    )


def _request(wanted: Measurement) -> bytes:
    said = {"role": "user", "content": "word " * PROMPT_WORDS}
    body = json.dumps(
        {
            "messages": [said],
            "model": "base:tuned" if wanted.adapter else "base",
            "max_tokens": wanted.tokens or 64,
            "stream": bool(wanted.tokens),
        }
    ).encode()
    return HEAD % len(body) + body


class MeasuredGateways:
    """The gateways that were measured, each with all of its clients. They stay open."""

    def __init__(self, stack: contextlib.AsyncExitStack) -> None:
        self._stack = stack
        self._open: dict[tuple[bool, int], PlayedGateway] = {}

    async def cost(self, wanted: Measurement) -> Cost:
        of = (wanted.limited, wanted.clients)
        if of not in self._open:
            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
            gateway = await self._stack.enter_async_context(
                played_gateway(folder, limited=wanted.limited)
            )
            await gateway.join()
            gateway.connect(wanted.clients)
            self._open[of] = gateway
        return await measure(wanted, self._open[of])


async def serve() -> None:
    async with contextlib.AsyncExitStack() as stack:
        gateways = MeasuredGateways(stack)
        gc.set_threshold(*GC_THRESHOLD)
        for line in sys.stdin:
            cost = await gateways.cost(msgspec.json.decode(line, type=Measurement))
            print(msgspec.json.encode(cost).decode(), flush=True)


if __name__ == "__main__":
    # the access log is written as ever, to nobody
    with open(os.devnull, "w") as nobody, contextlib.redirect_stderr(nobody):
        uvloop.run(serve())
