"""Shell. Processes stand still for longer than their lease and then go on. Every client gets an
end, and only its own answer.
"""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import Sequence
from pathlib import Path

import aiohttp

from tests.harness import Cluster, chat_body, cluster, make_adapter, sim_config
from tests.loop_meter import HOLD_ENV

END_S = 60.0
TOKENS = 300
STREAMS = WHOLE = 40
WORDS = re.compile(r'"content":"((?:[^"\\]|\\.)*)"')


async def stream(c: Cluster, model: str = "sim", tokens: int = TOKENS) -> bytes:
    """All bytes that the client got."""
    async with c.http.post(
        c.url + "/v1/chat/completions", json=chat_body(model, max_tokens=tokens, stream=True)
    ) as answer:
        assert answer.status == 200
        return await answer.content.read()


async def whole_until_cut(c: Cluster, model: str) -> None:
    try:
        await c.chat(model, max_tokens=TOKENS // 2)
    except aiohttp.ClientError:
        return


def words(raw: bytes) -> list[str]:
    """The tokens of a stream, without its label."""
    text = "".join(WORDS.findall(raw.decode()))
    return text[text.index("]") + 1 :].split()


def check_whole_or_failed(raws: Sequence[bytes], tokens: int = TOKENS) -> int:
    """Returns how many failed. No stream has a hole, and each ends once."""
    failed = 0
    for raw in raws:
        assert raw.endswith(b"data: [DONE]\n\n") and raw.count(b"[DONE]") == 1, raw[-300:]
        got = words(raw)
        assert got == [f"w{i}" for i in range(len(got))]
        if b'"error"' in raw:
            failed += 1
        else:
            assert len(got) == tokens - 1, len(got)
    return failed


async def until(c: Cluster, name: str, value: float, **labels: str) -> None:
    async with asyncio.timeout(END_S):
        while await c.metric(name, **labels) != value:
            await asyncio.sleep(0.02)


async def quiet(c: Cluster, *workers: str) -> None:
    """Nothing is left: in the queue, in the gateway's books, or on a worker, as the worker itself
    says.
    """
    for worker in workers:
        await until(c, "loraplex_worker_up", 1, worker=worker)
        await until(c, "loraplex_worker_load", 0, worker=worker)
    await until(c, "loraplex_queue_depth", 0)


async def test_when_a_worker_stands_still_past_its_lease_every_request_ends_and_nothing_is_left(
    tmp_path: Path, adapters: Path
) -> None:
    async with cluster(sim_config(adapters, sim={"itl_ms": 15}, progress_s=0.5), tmp_path) as c:
        for name in ("w0", "w1"):
            await c.start_worker(name)
        streams = [asyncio.create_task(stream(c)) for _ in range(STREAMS)]
        whole = [asyncio.create_task(c.chat("sim", max_tokens=TOKENS)) for _ in range(WHOLE)]
        await until(c, "loraplex_worker_load", STREAMS + WHOLE)
        c.workers["w0"].signal(signal.SIGSTOP)
        more = [asyncio.create_task(c.chat("sim", max_tokens=20)) for _ in range(WHOLE)]
        await until(c, "loraplex_worker_up", 0, worker="w0")
        async with asyncio.timeout(END_S):
            assert {status for status, _, _ in await asyncio.gather(*whole, *more)} == {200}
        c.workers["w0"].signal(signal.SIGCONT)
        after = [asyncio.create_task(stream(c)) for _ in range(STREAMS)]
        async with asyncio.timeout(END_S):
            assert check_whole_or_failed(await asyncio.gather(*streams)) == 0, "they move"
            assert check_whole_or_failed(await asyncio.gather(*after)) == 0
        await quiet(c, "w0", "w1")
        assert await c.metric("loraplex_retries_total") > 0
        assert await c.metric("loraplex_requests_total") == 2 * STREAMS + 2 * WHOLE


async def test_requests_sent_to_a_lone_worker_that_stands_still_are_answered_when_it_goes_on(
    tmp_path: Path, adapters: Path
) -> None:
    async with cluster(sim_config(adapters, progress_s=0.3), tmp_path) as c:
        await c.start_worker("w0")
        c.workers["w0"].signal(signal.SIGSTOP)
        waiting = [asyncio.create_task(stream(c)) for _ in range(STREAMS)]
        await until(c, "loraplex_worker_up", 0, worker="w0")
        await until(c, "loraplex_queue_depth", STREAMS)
        c.workers["w0"].signal(signal.SIGCONT)
        async with asyncio.timeout(END_S):
            raws = await asyncio.gather(*waiting)
        assert check_whole_or_failed(raws) == 0 and all(raw.startswith(b": ") for raw in raws)
        await quiet(c, "w0")


async def test_when_the_gateway_stands_still_past_the_lease_no_stream_is_left_without_an_end(
    tmp_path: Path, adapters: Path
) -> None:
    """The gateway's workers have dropped its requests by then. Their heartbeats may come before it
    looks at their leases.
    """
    async with cluster(sim_config(adapters, sim={"itl_ms": 15}), tmp_path) as c:
        for name in ("w0", "w1"):
            await c.start_worker(name)
        streams = [asyncio.create_task(stream(c, tokens=5 * TOKENS)) for _ in range(STREAMS)]
        whole = [asyncio.create_task(c.chat("sim", max_tokens=TOKENS)) for _ in range(WHOLE)]
        await until(c, "loraplex_worker_load", STREAMS + WHOLE)
        assert c.gateway is not None
        c.gateway.signal(signal.SIGSTOP)
        async with asyncio.timeout(END_S):
            while not all('"gateway lost"' in worker.output() for worker in c.workers.values()):
                await asyncio.sleep(0.05)
        c.gateway.signal(signal.SIGCONT)
        async with asyncio.timeout(END_S):
            raws = await asyncio.gather(*streams)
            assert check_whole_or_failed(raws, 5 * TOKENS) == 0, "they go on"
            assert {status for status, _, _ in await asyncio.gather(*whole)} == {200}
        await quiet(c, "w0", "w1")
        assert "worker lost" not in c.gateway.output()


async def test_a_restarted_gateway_never_gets_what_its_earlier_life_had_asked_for(
    tmp_path: Path, adapters: Path
) -> None:
    for name in ("old", "new"):
        make_adapter(adapters, name)
    async with cluster(sim_config(adapters, sim={"itl_ms": 15}, lease_s=30.0), tmp_path) as c:
        await c.start_worker("w0")
        assert (await c.chat("sim:old", max_tokens=1))[0] == 200
        before = [asyncio.create_task(whole_until_cut(c, "sim:old")) for _ in range(STREAMS)]
        await until(c, "loraplex_worker_load", STREAMS)
        assert c.gateway is not None
        c.gateway.signal(signal.SIGKILL)
        await c.gateway.wait()
        await asyncio.gather(*before)
        await c.start_gateway()
        async with asyncio.timeout(END_S):
            raws = await asyncio.gather(*(stream(c, "sim:new") for _ in range(STREAMS)))
        assert check_whole_or_failed(raws) == 0 and all(b"adapter=new " in raw for raw in raws)
        await quiet(c, "w0")


HOLD_S = 2.0
SHORT_LEASE_S = 0.6


async def held(c: Cluster) -> list[bytes]:
    """What streams yield that were under way while the loop of w0 was held."""
    streams = [asyncio.create_task(stream(c)) for _ in range(STREAMS)]
    await until(c, "loraplex_worker_load", STREAMS)
    c.workers["w0"].signal(signal.SIGUSR2)
    async with asyncio.timeout(END_S):
        return await asyncio.gather(*streams)


async def test_a_worker_whose_loop_a_request_holds_past_its_lease_keeps_its_streams(
    tmp_path: Path, adapters: Path
) -> None:
    config = sim_config(adapters, sim={"itl_ms": 5}, lease_s=SHORT_LEASE_S)
    async with cluster(config, tmp_path, measured=True) as c:
        await c.start_worker("w0", env={HOLD_ENV: str(HOLD_S)})
        assert check_whole_or_failed(await held(c)) == 0
        assert c.gateway is not None and "worker lost" not in c.gateway.output()
        assert "gateway lost" not in c.workers["w0"].output()
        await quiet(c, "w0")


async def test_a_worker_whose_loop_hangs_is_given_up_and_its_streams_move(
    tmp_path: Path, adapters: Path
) -> None:
    config = sim_config(adapters, sim={"itl_ms": 5}, lease_s=SHORT_LEASE_S, hang_s=1.0)
    async with cluster(config, tmp_path, measured=True) as c:
        for name in ("w0", "w1"):
            await c.start_worker(name, env={HOLD_ENV: str(5 * HOLD_S)})
        assert check_whole_or_failed(await held(c)) == 0
        assert c.gateway is not None and "worker lost" in c.gateway.output()
