"""Shell. Two gateways, of which one dies: a client that asks again with the same key gets the rest
of its answer, and the engine makes it once.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway.api.idempotency import REJOIN_S
from gateway.dispatch.streams.delivery import CONTINUED
from gateway.dispatch.workers.commands import FIND_S
from tests.fault.test_stalls import words
from tests.harness import Cluster, chat_body, cluster, make_adapter, second_gateway, sim_config
from tests.loop_meter import HOLD_ENV

END_S = 60.0
TOKENS = 80
SLOW = {"itl_ms": 15}
KEY = {"Idempotency-Key": "one-and-only"}


@asynccontextmanager
async def two_gateways(
    adapters: Path, folder: Path, **more: Any
) -> AsyncIterator[tuple[Cluster, Cluster]]:
    make_adapter(adapters, "pirate")
    async with (
        cluster(sim_config(adapters, sim=SLOW, **more), folder) as c,
        second_gateway(c) as other,
    ):
        for name in ("w0", "w1"):
            await c.start_worker(name, gateways=[other.control])
        async with asyncio.timeout(END_S):
            while (await other.get("/ready"))[1]["workers"] != {"sim": 2}:
                await asyncio.sleep(0.02)
        yield c, other


async def generations(c: Cluster) -> float:
    """Once it has settled: heartbeats tell it."""
    await asyncio.sleep(0.3)
    return await c.metric("loraplex_engine_requests_total")


def asks(c: Cluster, body: dict[str, Any], **headers: str) -> Any:
    return c.http.post(f"{c.url}/v1/chat/completions", json=body, headers={**KEY, **headers})


def data_of(raw: bytes) -> bytes:
    """Without comments, which are not of the answer."""
    return b"\n\n".join(e for e in raw.split(b"\n\n") if not e.startswith(b":"))


async def begin(c: Cluster, body: dict[str, Any]) -> bytes:
    """Of a stream that is cut off in its middle by the death of its gateway."""
    got = b""
    assert c.gateway is not None
    with pytest.raises(aiohttp.ClientError):
        async with asks(c, body) as answer:
            assert answer.status == 200
            async for piece in answer.content.iter_any():
                got += piece
                if got.count(b"\n\n") > TOKENS // 3 and c.gateway.waiter.returncode is None:
                    c.gateway.signal(signal.SIGKILL)
    return got


async def test_a_stream_of_a_killed_gateway_is_had_whole_at_another_one_and_made_once(
    adapters: Path, tmp_path: Path
) -> None:
    async with two_gateways(adapters, tmp_path) as (c, other):
        body = chat_body("sim:pirate", max_tokens=TOKENS, stream=True)
        async with asyncio.timeout(END_S):
            begun = await begin(c, body)
            assert b"[DONE]" not in begun
            async with asks(other, body) as answer:
                raw = await answer.read()
                assert answer.status == 200 and answer.headers["idempotent-replayed"] == "true"
        assert data_of(raw).startswith(data_of(begun)), "the same id, time and bytes"
        assert words(raw) == [f"w{n}" for n in range(TOKENS - 1)] and raw.endswith(b"[DONE]\n\n")
        async with asks(other, body) as answer:
            assert data_of(await answer.read()) == data_of(raw), "and again once it has ended"
        assert await generations(other) == 1
        assert await other.metric("loraplex_output_tokens_total") == TOKENS, "charged once"


async def lose_worker(c: Cluster) -> None:
    """The one that has the answer."""
    loaded = [
        name for name in c.workers if await c.metric("loraplex_worker_load", worker=name) != 0
    ]
    c.workers[loaded[0]].signal(signal.SIGKILL)


async def test_a_stream_that_moved_and_lost_its_gateway_is_had_whole_and_not_made_again(
    adapters: Path, tmp_path: Path
) -> None:
    async with two_gateways(adapters, tmp_path) as (c, other):
        body, begun = chat_body("sim:pirate", max_tokens=3 * TOKENS, stream=True), b""
        assert c.gateway is not None
        async with asyncio.timeout(END_S):
            with pytest.raises(aiohttp.ClientError):
                async with asks(c, body) as answer:
                    begun += await answer.content.readany()
                    await lose_worker(c)
                    async for piece in answer.content.iter_any():
                        begun += piece
                        if CONTINUED in begun and piece.startswith(b"data: "):
                            c.gateway.signal(signal.SIGKILL)
            async with asks(other, body) as answer:
                raw = await answer.read()
                assert answer.status == 200 and answer.headers["idempotent-replayed"] == "true"
        assert data_of(raw).startswith(data_of(begun)), "the same id, time and bytes"
        assert words(raw) == [f"w{n}" for n in range(3 * TOKENS - 1)]
        assert await generations(other) == 1, "at the worker that is left"


async def test_an_answer_that_moved_and_is_sent_whole_is_had_after_its_client_has_left(
    adapters: Path, tmp_path: Path
) -> None:
    async with two_gateways(adapters, tmp_path) as (c, _):
        body = chat_body("sim:pirate", max_tokens=3 * TOKENS)
        async with asyncio.timeout(END_S):
            first = asyncio.ensure_future(asks(c, body))
            while not await c.metric("loraplex_engine_requests_total"):
                await asyncio.sleep(0.01)
            await asyncio.sleep(TOKENS * SLOW["itl_ms"] / 1e3)  # tokens that move along
            await lose_worker(c)
            first.cancel()
            async with asks(c, body) as answer:
                assert answer.status == 200 and answer.headers["idempotent-replayed"] == "true"
                assert json.loads(await answer.read())["usage"]["completion_tokens"] == 3 * TOKENS
        assert await generations(c) == 1, "at the worker that is left"


async def test_an_answer_that_is_sent_whole_is_had_from_another_gateway_and_made_once(
    adapters: Path, tmp_path: Path
) -> None:
    async with two_gateways(adapters, tmp_path) as (c, other):
        body = chat_body("sim:pirate", max_tokens=TOKENS)

        async def ask_the_first() -> None:
            async with asks(c, body) as answer:
                await answer.read()

        asking = asyncio.create_task(ask_the_first())
        async with asyncio.timeout(END_S):
            while not await c.metric("loraplex_engine_requests_total"):
                await asyncio.sleep(0.01)
        assert c.gateway is not None
        c.gateway.signal(signal.SIGKILL)
        with pytest.raises(aiohttp.ClientError):
            await asking
        answers = []
        for _ in range(2):
            async with asks(other, body) as answer:
                assert answer.status == 200
                answers.append(await answer.read())
        assert answers[0] == answers[1]
        assert json.loads(answers[0])["usage"]["completion_tokens"] == TOKENS
        assert await generations(other) == 1


async def test_an_answer_of_a_worker_that_stands_still_is_waited_for_and_not_made_again(
    adapters: Path, tmp_path: Path
) -> None:
    """Its streams are not given up, so what it keeps is not, either."""
    async with cluster(sim_config(adapters), tmp_path, measured=True) as c:
        for name in ("w0", "w1"):
            await c.start_worker(name, env={HOLD_ENV: str(REJOIN_S + 4 * FIND_S)})
        async with asyncio.timeout(END_S):
            async with asks(c, chat_body("sim")) as answer:
                first, worker = await answer.read(), answer.headers["x-loraplex-worker"]
            c.workers[worker].signal(signal.SIGUSR2)
            while (await c.get("/ready"))[1]["workers"] != {"sim": 1}:
                await asyncio.sleep(0.02)
            async with asks(c, chat_body("sim")) as answer:
                assert await answer.read() == first
        assert await generations(c) == 1


async def test_a_worker_that_drains_still_has_what_it_keeps(adapters: Path, tmp_path: Path) -> None:
    async with two_gateways(adapters, tmp_path) as (c, other):
        body = chat_body("sim:pirate", max_tokens=4 * TOKENS, stream=True)
        async with asyncio.timeout(END_S):
            async with asks(c, body) as first:
                raw = await first.content.readany()
                c.workers[first.headers["x-loraplex-worker"]].signal(signal.SIGTERM)
                while (await other.get("/ready"))[1]["workers"] != {"sim": 1}:
                    await asyncio.sleep(0.02)
                async with asks(other, body) as answer:
                    copy = await answer.read()
                    assert answer.headers["idempotent-replayed"] == "true"
                raw += await first.read()
        assert data_of(copy) == data_of(raw)


async def test_a_gateway_that_is_back_has_what_the_workers_of_its_earlier_life_keep(
    adapters: Path, tmp_path: Path
) -> None:
    """Its clients ask before the first worker is back, and whichever comes first."""
    async with cluster(sim_config(adapters, sim=SLOW), tmp_path) as c:
        for name in ("w0", "w1"):
            await c.start_worker(name)
        bodies = [chat_body("sim", max_tokens=TOKENS, stream=n % 2 > 0) for n in range(8)]

        async def ask(number: int) -> tuple[str, bytes]:
            key = {"Idempotency-Key": f"key {number}"}
            async with asks(c, bodies[number], **key) as answer:
                said = await answer.read()
                return answer.headers.get("idempotent-replayed", ""), said

        first = [asyncio.create_task(ask(number)) for number in range(8)]
        async with asyncio.timeout(END_S):
            while await c.metric("loraplex_engine_requests_total") < 8:
                await asyncio.sleep(0.02)
            assert c.gateway is not None
            c.gateway.signal(signal.SIGKILL)
            await c.gateway.wait()
            await asyncio.gather(*first, return_exceptions=True)
            await c.start_gateway()
            again = await asyncio.gather(*map(ask, range(8)))
        assert {replayed for replayed, _ in again} == {"true"}
        assert all(b" w78" in said for _, said in again)
        assert await generations(c) == 8


async def test_while_it_runs_others_join_and_another_body_or_account_gets_no_part_of_it(
    adapters: Path, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alice\nbob\n")
    async with two_gateways(adapters, tmp_path, api_keys_file=str(keys)) as (c, other):
        body = chat_body("sim", max_tokens=TOKENS, stream=True)
        alice, bob = ({"Authorization": f"Bearer {name}"} for name in ("alice", "bob"))
        async with asyncio.timeout(END_S), asks(c, body, **alice) as first:
            raw = await first.content.readany()
            async with asks(other, {**body, "max_tokens": 3}, **alice) as answer:
                assert answer.status == 422
                assert (await answer.json())["error"]["code"] == "idempotency_key_reused"
            async with asks(c, {**body, "max_tokens": 3}, **alice) as answer:
                assert answer.status == 422
            async with asks(other, body, **alice) as second, asks(c, body, **alice) as third:
                copies = [await second.read(), await third.read()]
            async with asks(other, body, **bob) as answer:
                bobs = await answer.read()
                assert "idempotent-replayed" not in answer.headers
            raw += await first.read()
        assert [data_of(copy) for copy in copies] == [data_of(raw)] * 2
        ids = {json.loads(r.split(b"data: ")[1].split(b"\n\n")[0])["id"] for r in (raw, bobs)}
        assert len(ids) == 2
        assert await generations(other) == 2


async def test_a_client_that_left_gets_the_rest_and_one_that_never_comes_back_costs_its_time_only(
    adapters: Path, tmp_path: Path
) -> None:
    async with two_gateways(adapters, tmp_path, keep_answers_s=1.0) as (c, other):
        body = chat_body("sim", max_tokens=TOKENS, stream=True)
        async with asyncio.timeout(END_S), asks(c, body) as answer:
            await answer.content.readany()
        async with asks(other, body) as answer:
            assert words(await answer.read()) == [f"w{n}" for n in range(TOKENS - 1)]
        assert await generations(other) == 1
        charged = [await g.metric("loraplex_output_tokens_total") for g in (c, other)]
        assert sum(charged) == TOKENS, "charged once"
        long = chat_body("sim", max_tokens=10_000, stream=True)
        async with asyncio.timeout(END_S), asks(c, long, **{"Idempotency-Key": "two"}) as answer:
            await answer.content.readany()
        async with asyncio.timeout(END_S):
            while await other.metric("loraplex_worker_load") != 0:
                await asyncio.sleep(0.05)
            # nobody heard it for a second, and its key is charged for that second
            while (await c.metric("loraplex_output_tokens_total")) - charged[0] < TOKENS // 2:
                await asyncio.sleep(0.05)


async def test_an_answer_whose_worker_dies_after_its_gateway_goes_on_elsewhere(
    adapters: Path, tmp_path: Path
) -> None:
    async with two_gateways(adapters, tmp_path) as (c, other):
        body = chat_body("sim:pirate", max_tokens=TOKENS, stream=True)
        async with asyncio.timeout(END_S):
            begun = await begin(c, body)
            async with asks(other, body) as answer:
                worker = answer.headers["x-loraplex-worker"]
                raw = await answer.content.readany()
                other_worker = c.workers[worker]
                other_worker.signal(signal.SIGKILL)
                raw += await answer.read()
        assert data_of(raw).startswith(data_of(begun))
        assert words(raw) == [f"w{n}" for n in range(TOKENS - 1)]
