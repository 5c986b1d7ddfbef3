"""Shell. `python -m tests.hostile.fuzz`: mutated requests to a real gateway over TCP, and mutated
messages over the link from a peer that knows its secret, beside honest requests.

    python -m tests.hostile.fuzz [--requests 1000000] [--messages 10000000]

Nothing crashes, hangs, grows, or is answered with an error of ours, and every honest request gets
its own answer. `test_fuzz_processes.py` runs the short form. The order of mutations is random but
the same in every run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import uvloop

from gateway.http.parser import IncompleteRequest, parse
from shared.link import messages
from shared.link.secret import link_secret
from shared.link.sockets import DealerSocket, SendResult, open_context
from tests.harness import Cluster, chat_body, cluster, make_adapter, sim_config
from tests.hostile.attacks import CHAT, HI, KEY, head, post
from tests.hostile.mutation import mutated, mutated_body
from tests.hostile.test_bystanders import rss_mb

CONNECTIONS = 64
REST = b"GET /health HTTP/1.1\r\nHost: x\r\nX: %b\r\n\r\n" % (b"x" * 300)
"""Sent behind a request that waits for more bytes, so that the gateway goes on with it."""
BEGIN_S = 0.3
"""When nothing has come for so long, the client ends its side."""
END_S = 30.0
"""For an answer, and for the gateway to close a connection whose client has ended."""
MOST_GROWTH_MB = 100
MOST_GROWTH_LATE_MB = 25
"""Of the gateway, over the whole run and over its second half."""
BURST = 100
"""Messages between two turns of the loop."""
HONEST_CLIENTS, HONEST_EVERY_S = 4, 0.2
REPORT_S = 60.0
PEER = "peer"
NOBODYS = 1 << 40
"""Stream ids from here on are nobody's. A worker on the link is trusted with the ids of others."""

Progress = Callable[[int], None]


# ---- the cluster, and those who must not notice --------------------------------------------------


@contextlib.asynccontextmanager
async def fuzzed_cluster(folder: Path) -> AsyncIterator[Cluster]:
    keys = folder / "keys"
    keys.write_text(f"{KEY}\n")
    make_adapter(folder / "adapters", "pirate")
    config = sim_config(
        folder / "adapters", sim={"itl_ms": 1}, api_keys_file=str(keys), log_level="warning"
    )
    async with cluster(config, folder) as c:
        c.http.headers["Authorization"] = f"Bearer {KEY}"
        await c.start_worker("w0")
        yield c


@contextlib.asynccontextmanager
async def beside_honest_requests(c: Cluster) -> AsyncIterator[None]:
    """What they ask for is what they get, and the gateway's books are in order at the end."""
    ended = asyncio.Event()

    async def honest(rng: random.Random) -> None:
        while not ended.is_set():
            words, tokens = rng.randint(1, 30), rng.randint(1, 30)
            body = chat_body("sim", " ".join(["word"] * words), max_tokens=tokens)
            async with c.http.post(c.url + CHAT, json=body) as answer:
                usage = (await answer.json())["usage"]
            assert (usage["prompt_tokens"], usage["completion_tokens"]) == (words, tokens)
            await asyncio.sleep(HONEST_EVERY_S)

    assert c.gateway is not None
    before = rss_mb(c.gateway)
    async with asyncio.TaskGroup() as tasks:
        for n in range(HONEST_CLIENTS):
            tasks.create_task(honest(random.Random(n)))
        yield
        ended.set()
    async with asyncio.timeout(END_S):
        while await c.metric("loraplex_worker_load"):
            await asyncio.sleep(0.05)
    assert await c.metric("loraplex_internal_errors_total") == 0
    assert await c.metric("loraplex_reservation_repairs_total") == 0
    assert rss_mb(c.gateway) < before + MOST_GROWTH_MB
    assert "Traceback" not in c.gateway.output() and KEY not in c.gateway.output()


# ---- mutated requests ----------------------------------------------------------------------------


def _request_seeds() -> list[bytes]:
    def other(path: str, **fields: object) -> bytes:
        body = json.dumps({"model": "sim", **fields}).encode()
        return head(f"Content-Length: {len(body)}", path=path) + body

    return [
        post(HI + b',"max_tokens":5,"stream":true'),
        post(HI + b',"max_tokens":3,"priority":1', "x-loraplex-timeout-ms: 9000"),
        post(b'"prompt":["a"],"n":1,"logit_bias":{"5":1}'),
        post(HI + b',"max_tokens":2,"stream":true', "Idempotency-Key: k1", "x-request-id: r1"),
        head("Transfer-Encoding: chunked") + b"2\r\n{}\r\n0\r\n\r\n",
        head(method="GET", path="/v1/models"),
        head(method="GET", path="/v1/models/sim%3Apirate?x=1"),
        head(method="GET", path="/metrics"),
        head(method="GET", path="/admin/usage?since=1&by=key"),
        other("/v1/completions", prompt=[[1, 2], [3]], max_tokens=2, model="sim:pirate"),
        other("/v1/responses", input="hi", max_output_tokens=2, previous_response_id="resp_1"),
        other("/v1/messages", messages=[{"role": "user", "content": "hi"}], max_tokens=2),
        other("/tokenize", prompt="hi"),
        other("/v1/embeddings", input=["a", "b"]),
        post(HI + b',"max_tokens":1') * 2,
    ]


class FuzzConnection(asyncio.Protocol):
    """One connection, on which requests go one after the other for as long as the gateway keeps it
    open. `answered` is set by the end of an answer, or of the connection.
    """

    def __init__(self) -> None:
        self.answer = bytearray()
        self.transport: asyncio.Transport
        self.answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self.answer += data
        if self._is_whole():
            self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wake()

    def ask(self, data: bytes) -> asyncio.Future[None]:
        self.answer.clear()
        self.answered = asyncio.get_running_loop().create_future()
        self.transport.write(data)
        return self.answered

    async def until_closed(self) -> None:
        while not self.transport.is_closing():
            self.answered = asyncio.get_running_loop().create_future()
            await self.answered

    def _wake(self) -> None:
        if not self.answered.done():
            self.answered.set_result(None)

    def _is_whole(self) -> bool:
        begin, found, rest = self.answer.partition(b"\r\n\r\n")
        if not found or begin.startswith(b"HTTP/1.1 100"):
            return False
        lines = begin.lower()
        if b"\r\ntransfer-encoding: chunked" in lines:
            return rest.endswith(b"0\r\n\r\n")
        _, found, length = lines.partition(b"\r\ncontent-length: ")
        return bool(found) and len(rest) >= int(length.partition(b"\r\n")[0])


@dataclass(slots=True)
class HttpFuzz:
    """`seen` counts the answers by status; empty: none came."""

    port: int
    requests: int
    progress: Progress
    seen: Counter[bytes]
    sent: int = 0

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for n in range(CONNECTIONS):
                tasks.create_task(self._client(random.Random(n)))

    async def _client(self, rng: random.Random) -> None:
        seeds, loop = _request_seeds(), asyncio.get_running_loop()
        connection: FuzzConnection | None = None
        while self.sent < self.requests:
            self.sent += 1
            self.progress(self.sent)
            data = rng.choice((mutated, mutated_body))(rng.choice(seeds), rng)
            if connection is None or connection.transport.is_closing():
                _, connection = await loop.create_connection(FuzzConnection, "127.0.0.1", self.port)
            async with asyncio.timeout(END_S):
                await self._ask(connection, data)
        if connection is not None:
            connection.transport.abort()

    async def _ask(self, connection: FuzzConnection, data: bytes) -> None:
        ends = type(parse(data, len(data))) is IncompleteRequest
        answered = connection.ask(data + REST if ends else data)
        await asyncio.wait((answered,), timeout=BEGIN_S)
        if not answered.done() and connection.answer:
            await answered
        if ends or not answered.done():
            if connection.transport.can_write_eof() and not connection.transport.is_closing():
                connection.transport.write_eof()  # the gateway closes as well
            await connection.until_closed()
        answer = bytes(connection.answer)
        status = answer[9:12] if answer.startswith(b"HTTP/1.") else b""
        self.seen[status] += 1
        assert status[:1] != b"5" or status == b"505", (data, answer[:300])


async def fuzz_requests(c: Cluster, requests: int, progress: Progress) -> Counter[bytes]:
    port = urlsplit(c.url).port
    assert port is not None
    fuzz = HttpFuzz(port, requests, progress, Counter())
    async with beside_honest_requests(c):
        await fuzz.run()
    assert min(fuzz.seen[b"200"], fuzz.seen[b"400"]) > requests / 50, fuzz.seen
    return fuzz.seen


# ---- mutated messages ----------------------------------------------------------------------------


class LinkPeer:
    """A worker that is on a channel, and says what no worker says. It serves no model that anybody
    asks for.
    """

    def __init__(self, c: Cluster) -> None:
        state_dir = Path(c.config["gateway"]["state_dir"])
        self._secret = link_secret(None, False, (c.control,), state_dir)
        self._context = open_context()
        self.routing_id = messages.identity(PEER, 1)
        self.welcome: asyncio.Future[messages.Welcome] = asyncio.get_running_loop().create_future()
        self.control = self._connected(c.control, self._control_in)

    def _control_in(self, data: bytes) -> None:
        if messages.is_packet(data) or self.welcome.done():
            return
        message = messages.decode_gateway_control(data)
        if isinstance(message, messages.Welcome):
            self.welcome.set_result(message)

    def _connected(self, endpoint: str, on_message: Callable[[bytes], None]) -> DealerSocket:
        return DealerSocket(
            self._context, endpoint, self.routing_id, on_message, secret=self._secret
        )

    def connect_data(self, endpoint: str) -> DealerSocket:
        return self._connected(endpoint, lambda _: None)

    def close(self) -> None:
        self.control.close(0)
        self._context.destroy(linger=0)

    def heartbeat(self, seq: int) -> messages.Heartbeat:
        return messages.Heartbeat(PEER, 1, seq, "none", messages.WorkerState.JOINING, capacity=8)


def _message_seeds() -> list[bytes]:
    status = 200 << messages.STATUS_SHIFT
    refused = messages.Refused(NOBODYS, "worker_unavailable", "why", True)
    return [
        messages.encode(messages.Step([(NOBODYS + 1, status, b"a", b"")], [])),
        messages.encode(
            messages.Step([(NOBODYS, messages.END, b"b", b"")], [messages.Done(NOBODYS)])
        ),
        messages.encode(messages.Attach(PEER, 1)),
        messages.encode(messages.Step([], [], [refused])),
    ]


async def _sent(socket: DealerSocket, data: bytes) -> None:
    while socket.send(data) is SendResult.FULL:
        await asyncio.sleep(0.001)


async def fuzz_messages(c: Cluster, count: int, progress: Progress) -> None:
    rng, peer = random.Random(17), LinkPeer(c)
    async with asyncio.timeout(END_S):
        while not peer.welcome.done():
            peer.control.send(messages.encode(peer.heartbeat(1)))
            await asyncio.sleep(0.1)
    welcome = peer.welcome.result()
    data, bodies, number = peer.connect_data(welcome.data_endpoint), _message_seeds(), 0
    async with beside_honest_requests(c):
        for n in range(count):
            if n % BURST == 0:
                progress(n)
                await asyncio.sleep(0)
            kind = n % 4
            if kind == 0:
                beat = messages.encode(peer.heartbeat(n + 2))
                await _sent(peer.control, mutated(beat, rng) if n % 8 else beat)
                continue
            body = mutated(rng.choice(bodies), rng)
            number += 1
            packet = messages.encode(messages.DataPacket(welcome.channel, number, 0, body))
            if kind == 1:
                number -= 1
                packet = mutated(packet, rng)
            await _sent(data, packet)
    data.close(0)
    peer.close()
    assert await c.metric("loraplex_undecodable_messages_total") > count / 100


# ---- the long form -------------------------------------------------------------------------------


class Reporter:
    """Says every REPORT_S how far a run is, and whether the gateway grows. Raises AssertionError
    if it grew in the second half.
    """

    def __init__(self, c: Cluster, what: str, count: int) -> None:
        assert c.gateway is not None
        self._gateway, self._what, self._count = c.gateway, what, count
        self._begun = self._said = time.monotonic()
        self._half_mb: float | None = None

    def __call__(self, done: int) -> None:
        if self._half_mb is None and done >= self._count / 2:
            self._half_mb = rss_mb(self._gateway)
        now = time.monotonic()
        if now > self._said + REPORT_S:
            self._said = now
            self._say(done)

    def end(self) -> None:
        self._say(self._count)
        assert self._half_mb is not None
        grown_mb = rss_mb(self._gateway) - self._half_mb
        assert grown_mb < MOST_GROWTH_LATE_MB, f"{grown_mb:.0f} MB more in the second half"

    def _say(self, done: int) -> None:
        per_s = done / (time.monotonic() - self._begun)
        mb = rss_mb(self._gateway)
        print(
            f"{self._what}: {done} of {self._count}, {per_s:.0f} per s, gateway {mb:.0f} MB",
            flush=True,
        )


async def run(requests: int, count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with fuzzed_cluster(Path(folder)) as c:
            if count:
                report = Reporter(c, "messages", count)
                await fuzz_messages(c, count, report)
                report.end()
            if requests:
                report = Reporter(c, "requests", requests)
                seen = await fuzz_requests(c, requests, report)
                report.end()
                statuses = {status.decode() or "none": n for status, n in seen.most_common()}
                print("answers by status:", statuses)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile.fuzz")
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--messages", type=int, default=10_000_000)
    flags = parser.parse_args(arguments)
    uvloop.run(run(flags.requests, flags.messages))
    return 0


if __name__ == "__main__":
    sys.exit(main())
