"""Shell. Workers behind a proxy that resets, stalls, delays and swallows what their TCP connections
carry. Every answer has exactly its expected text, and nothing is left anywhere.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench.chaos.link_proxy import CONTROL, DATA, DOWN, UP, LinkProxy, link_proxy
from tests.harness import Cluster, chat_body, cluster, sim_config
from worker.session import REOPEN_S, UNHEARD_S

END_S = 60.0
TOKENS = 60
ITL_MS = 15
LANES = 24
NOTICE_S = 1.0
"""A worker whose data does not pass gets no new requests after this time."""
SIZE_BYTES = 4_000_000
SLACK_S = 2.0  # time that a busy test machine adds
ALL_WAYS = [(UP,), (DOWN,), (UP, DOWN)]


@dataclass
class Answer:
    """`text` is all content of the stream; `whole`: it ended with a reason and [DONE], no error."""

    text: str
    whole: bool
    error: str
    worker: str
    asked: float
    longest_gap_s: float

    def due(self, tokens: int) -> bool:
        """Whether the answer has its expected text, or a beginning of it and an honest error."""
        head = re.match(r"\[base=sim adapter=- digest=[0-9a-f-]+\]", self.text)
        text = (head.group() if head else "") + "".join(f" w{i}" for i in range(tokens - 1))
        return self.text == text if self.whole else bool(self.error) and text.startswith(self.text)


async def ask(c: Cluster, tokens: int = TOKENS) -> Answer:
    answer = Answer("", False, "", "", time.monotonic(), 0.0)
    body = chat_body("sim", max_tokens=tokens, stream=True)
    reason = done = False
    last = answer.asked
    async with c.http.post(c.url + "/v1/chat/completions", json=body) as reply:
        answer.worker = reply.headers.get("x-loraplex-worker", "")
        assert reply.status == 200, await reply.text()
        async for line in reply.content:
            if not line.startswith(b"data: "):
                continue
            now = time.monotonic()
            answer.longest_gap_s, last = max(answer.longest_gap_s, now - last), now
            if line == b"data: [DONE]\n":
                assert not done, "ended twice"
                done = True
                continue
            assert not done, "something after the end"
            event = json.loads(line[6:])
            if "error" in event:
                answer.error = event["error"]["message"]
                continue
            (choice,) = event["choices"]
            answer.text += choice["delta"].get("content") or ""
            reason = reason or choice["finish_reason"] is not None
    answer.whole = reason and done and not answer.error
    return answer


class Lanes:
    """Clients that each send one request after the other, until `finish`."""

    def __init__(self, c: Cluster, lanes: int = LANES, tokens: int = TOKENS) -> None:
        self.answers: list[Answer] = []
        self._c, self._tokens, self._ending = c, tokens, False
        self._lanes = lanes

    async def __aenter__(self) -> Lanes:
        self._tasks = [asyncio.create_task(self._lane()) for _ in range(self._lanes)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _lane(self) -> None:
        while not self._ending:
            self.answers.append(await ask(self._c, self._tokens))

    async def answered(self, more: int) -> None:
        """Waits until so many more answers have ended."""
        due = len(self.answers) + more
        async with asyncio.timeout(END_S):
            while len(self.answers) < due:
                for task in self._tasks:
                    if task.done():
                        task.result()  # anything that is no answer ends the test
                await asyncio.sleep(0.02)

    async def finish(self) -> list[Answer]:
        self._ending = True
        async with asyncio.timeout(END_S):
            await asyncio.gather(*self._tasks)
        return self.answers


@asynccontextmanager
async def proxy_of(c: Cluster) -> AsyncIterator[LinkProxy]:
    """A proxy before the gateway, by which the workers join that are started from now on."""
    facts = json.loads((c.folder / "run" / "g0.json").read_text())
    ports = [int(facts[kind].rpartition(":")[2]) for kind in (CONTROL, DATA)]
    async with link_proxy(*ports) as proxy:
        c.control = proxy.control
        yield proxy


@asynccontextmanager
async def behind_proxies(
    c: Cluster, names: Sequence[str], beside: Sequence[str] = ()
) -> AsyncIterator[dict[str, LinkProxy]]:
    """Workers with a proxy each, and others without one."""
    direct = c.control
    async with AsyncExitStack() as stack:
        proxies = {}
        for name in names:
            proxies[name] = await stack.enter_async_context(proxy_of(c))
            await c.start_worker(name)
        c.control = direct
        for name in beside:
            await c.start_worker(name)
        yield proxies


def tcp_config(adapters: Path, lease_s: float = 3.0) -> dict[str, object]:
    link = {
        "control": "tcp://127.0.0.1:0",
        "data": "tcp://127.0.0.1:0",
        "peer": "off",
        "insecure": True,  # the proxy reads which port is the data socket's
    }
    return sim_config(adapters, sim={"itl_ms": ITL_MS}, lease_s=lease_s, link=link)


async def serving(c: Cluster, workers: int) -> None:
    """Waits until so many workers get requests."""
    async with asyncio.timeout(END_S):
        while (await c.get("/ready"))[1]["workers"]["sim"] != workers:
            await asyncio.sleep(0.02)


async def nothing_left(c: Cluster, *workers: str) -> None:
    async with asyncio.timeout(END_S):
        for worker in workers:
            while await c.metric("loraplex_worker_load", worker=worker) != 0:
                await asyncio.sleep(0.02)
        while await c.metric("loraplex_queue_depth") != 0:
            await asyncio.sleep(0.02)


def check_all_whole(answers: Sequence[Answer], tokens: int = TOKENS) -> None:
    wrong = [a for a in answers if not a.due(tokens)]
    assert not wrong, wrong[:2]
    failed = [a for a in answers if not a.whole]
    assert not failed, (len(failed), len(answers), failed[:2])


async def test_while_connections_are_reset_again_and_again_every_answer_is_whole(
    tmp_path: Path, adapters: Path
) -> None:
    async with (
        cluster(tcp_config(adapters), tmp_path) as c,
        behind_proxies(c, ["w0"]) as proxies,
        Lanes(c) as lanes,
    ):
        for kind, way in itertools.product((DATA, CONTROL), (UP, DOWN)):
            proxies["w0"].delay_s[kind, way] = 0.01
        for kinds in ((DATA,), (CONTROL,), (DATA, CONTROL)) * 3:
            await lanes.answered(LANES // 2)
            async with asyncio.timeout(END_S):
                while not proxies["w0"].reset(*kinds):
                    await asyncio.sleep(0.02)
        check_all_whole(await lanes.finish())
        await nothing_left(c, "w0")
        assert await c.metric("loraplex_link_gaps_total") > 0


async def test_bytes_that_vanish_from_a_connection_cost_time_and_no_token(
    tmp_path: Path, adapters: Path
) -> None:
    async with (
        cluster(tcp_config(adapters), tmp_path) as c,
        behind_proxies(c, ["w0"]) as proxies,
        Lanes(c) as lanes,
    ):
        for kind, way in itertools.product((DATA, CONTROL), (UP, DOWN)):
            for swallowed in (1, 1000):
                await lanes.answered(LANES // 2)
                proxies["w0"].swallow_bytes[kind, way] = swallowed
        await lanes.answered(LANES)
        check_all_whole(await lanes.finish())
        await nothing_left(c, "w0")


@pytest.mark.parametrize("kind", [DATA, CONTROL])
async def test_one_connection_that_stalls_is_noticed_within_a_second_and_its_streams_go_on(
    tmp_path: Path, adapters: Path, kind: str
) -> None:
    async with (
        cluster(tcp_config(adapters), tmp_path) as c,
        behind_proxies(c, ["w0"], ["w1"]) as proxies,
        Lanes(c) as lanes,
    ):
        for ways in ALL_WAYS:
            if (kind, ways) == (CONTROL, (DOWN,)):
                continue  # a Welcome could not pass; nothing else that matters is sent there
            await lanes.answered(LANES)
            stalled = time.monotonic()
            proxies["w0"].stall([kind], ways)
            await serving(c, 1)
            noticed = time.monotonic()
            assert noticed - stalled < NOTICE_S + SLACK_S
            await lanes.answered(2 * LANES)
            released = time.monotonic()
            proxies["w0"].flow()
            late = [a for a in lanes.answers if noticed < a.asked < released]
            assert late and {a.worker for a in late} == {"w1"}
            await serving(c, 2)
        answers = await lanes.finish()
        check_all_whole(answers)
        assert max(a.longest_gap_s for a in answers) < NOTICE_S + SLACK_S
        await nothing_left(c, "w0", "w1")


async def test_a_large_body_arrives_by_connections_that_take_seconds_for_it(
    tmp_path: Path, adapters: Path
) -> None:
    async with (
        cluster(tcp_config(adapters), tmp_path) as c,
        behind_proxies(c, ["w0"]) as proxies,
    ):
        slow = SIZE_BYTES / (2 * REOPEN_S)
        proxies["w0"].bytes_per_s = {(DATA, DOWN): slow, (CONTROL, DOWN): slow}
        body = chat_body("sim", "x" * SIZE_BYTES, max_tokens=TOKENS)
        async with asyncio.timeout(END_S):
            assert (await c.post("/v1/chat/completions", body))[0] == 200
        await nothing_left(c, "w0")


@pytest.mark.parametrize(
    ("kind", "way", "after_bytes", "most_s"),
    [
        (DATA, UP, 64, 5.0),  # in ZeroMQ's handshake
        (DATA, DOWN, 64, 5.0),
        (CONTROL, UP, 600, 5.0),  # after the welcome; what the gateway says still comes
        (CONTROL, DOWN, 150, UNHEARD_S + 15.0),  # before it: the gateway may not be up yet
    ],
)
async def test_a_worker_joins_although_its_first_connection_dies_without_a_word(
    tmp_path: Path, adapters: Path, kind: str, way: str, after_bytes: int, most_s: float
) -> None:
    async with cluster(tcp_config(adapters), tmp_path) as c, proxy_of(c) as proxy:
        proxy.dies_after_bytes[kind, way] = after_bytes
        await c.start_worker("w0", serving=False)
        async with asyncio.timeout(most_s + SLACK_S):
            while (await c.get("/ready"))[0] != 200:
                await asyncio.sleep(0.02)
        assert not proxy.dies_after_bytes, "it died"
        check_all_whole([await ask(c)])


async def test_a_data_connection_that_never_opens_is_told_of(
    tmp_path: Path, adapters: Path
) -> None:
    async with cluster(tcp_config(adapters), tmp_path) as c, proxy_of(c) as proxy:
        proxy.stall([DATA])
        worker = await c.start_worker("w0", serving=False)
        assert c.gateway is not None
        async with asyncio.timeout(END_S):
            for process in (worker, c.gateway):
                while "data connection does not carry" not in process.output():
                    await asyncio.sleep(0.02)


async def test_when_nothing_passes_at_all_each_stream_ends_honestly_and_the_worker_comes_back(
    tmp_path: Path, adapters: Path
) -> None:
    async with (
        cluster(tcp_config(adapters, lease_s=1.0), tmp_path) as c,
        behind_proxies(c, ["w0"], ["w1"]) as proxies,
        Lanes(c) as lanes,
    ):
        await lanes.answered(LANES)
        proxies["w0"].stall([DATA, CONTROL])
        async with asyncio.timeout(END_S):
            while await c.metric("loraplex_worker_up", worker="w0") != 0:
                await asyncio.sleep(0.02)
        await lanes.answered(2 * LANES)
        proxies["w0"].flow()
        await serving(c, 2)
        begun = time.monotonic()
        await lanes.answered(2 * LANES)
        answers = await lanes.finish()
        assert all(a.due(TOKENS) for a in answers)
        check_all_whole([a for a in answers if a.asked > begun])
        await nothing_left(c, "w0", "w1")


async def test_a_worker_that_drains_delivers_its_last_tokens_whichever_connection_is_slower(
    tmp_path: Path, adapters: Path
) -> None:
    async with (
        cluster(tcp_config(adapters), tmp_path) as c,
        behind_proxies(c, ["slow-data", "slow-control", "stalled-data"], ["w1"]) as proxies,
        Lanes(c) as lanes,
    ):
        proxies["slow-data"].delay_s[DATA, UP] = 0.05
        proxies["slow-control"].delay_s[CONTROL, UP] = 0.05
        for name, proxy in proxies.items():
            await lanes.answered(LANES)
            if name == "stalled-data":
                proxy.stall([DATA])
            c.workers[name].signal(signal.SIGTERM)
            assert await c.workers[name].wait() == 0
        await lanes.answered(LANES)
        check_all_whole(await lanes.finish())
        await nothing_left(c, "w1")
