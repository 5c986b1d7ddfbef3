"""Shell. One key floods with ten times the load of another key. Whatever it varies, the other one
gets its half of the capacity.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from gateway.accounts.key_ring import digest_of
from tests.harness import Cluster, chat_body, cluster, make_adapter, sim_config

FLOODER, HONEST = "tenant-a-key-000000", "tenant-b-key-000000"
HONEST_CLIENTS = 16
FLOODING_CLIENTS = 10 * HONEST_CLIENTS
AT_ONCE = 8
TOKENS = 20
LONG_PROMPT = 50_000
ADAPTERS, SLOTS = 50, 4
SPELLINGS = 192
WARM_S, WINDOW_S = 1.5, 4.0
LEAST_SHARE = 0.45
"""Of the tokens that are served."""
LEAST_CAPACITY = 0.7
"""Tokens a second beside the flood, of those that the honest key gets alone. Loads of adapters, and
a machine that is busy with the flood, take some.
"""
REFUSED_S = 0.25
"""Before a flooding client asks again whose request was refused, or that has left: it floods the
gateway, not this machine.
"""
TRIES = 3
"""More than one where the machine was busy: a share that is taken is taken again."""


@dataclass(frozen=True, slots=True)
class FloodRequest:
    """`leaves_after_s` is how long its client waits for the answer."""

    model: str = "sim"
    fields: dict[str, Any] = field(default_factory=lambda: {"max_tokens": TOKENS})
    headers: dict[str, str] = field(default_factory=dict)
    authorization: str = f"Bearer {FLOODER}"
    prompt: str = "hello"
    leaves_after_s: float | None = None


def spellings() -> list[str]:
    words = ["".join(w) for w in itertools.product(*((c.lower(), c.upper()) for c in "Bearer"))]
    found = [f"{w}{gap}{FLOODER}" for gap in (" ", "  ", "   ") for w in words]
    assert len(set(found)) == SPELLINGS
    return found


def of_spellings(_: random.Random) -> Iterator[FloodRequest]:
    yield from (FloodRequest(authorization=text) for text in itertools.cycle(spellings()))


def of_priorities(rng: random.Random) -> Iterator[FloodRequest]:
    while True:
        priority = rng.choice((-999_999_999, -1, 0, 999_999_999))
        if rng.random() < 0.5:
            yield FloodRequest(headers={"x-loraplex-priority": str(priority)})
        else:
            yield FloodRequest(fields={"max_tokens": TOKENS, "priority": priority})


def of_adapters(_: random.Random) -> Iterator[FloodRequest]:
    names = itertools.cycle(f"sim:a{n}" for n in range(ADAPTERS))
    yield from (FloodRequest(model=name) for name in names)


def of_lengths(rng: random.Random) -> Iterator[FloodRequest]:
    while True:
        yield FloodRequest(fields={"max_tokens": rng.choice((1, 5, TOKENS, 5 * TOKENS))})


def of_choices(rng: random.Random) -> Iterator[FloodRequest]:
    """The simulated engine refuses more than one, after the gateway has let them in."""
    while True:
        yield FloodRequest(fields={"max_tokens": TOKENS, "n": rng.choice((1, 1, 2, 64))})


def of_prompts(rng: random.Random) -> Iterator[FloodRequest]:
    """Of half a second each, and of one token."""
    while True:
        words = rng.choice((1, LONG_PROMPT, LONG_PROMPT))
        yield FloodRequest(prompt="word " * words, fields={"max_tokens": 1})


def of_deadlines(_: random.Random) -> Iterator[FloodRequest]:
    """Long streams that are cut short, each after half a second."""
    while True:
        fields = {"max_tokens": 100 * TOKENS, "stream": True}
        yield FloodRequest(fields=fields, headers={"x-loraplex-timeout-ms": "500"})


def of_leaving(rng: random.Random) -> Iterator[FloodRequest]:
    """Their clients leave, and might ask for the same answer again."""
    while True:
        key = {"Idempotency-Key": f"{rng.random()}"} if rng.random() < 0.7 else {}
        fields = {"max_tokens": 2 * TOKENS, "stream": rng.random() < 0.5}
        yield FloodRequest(fields=fields, headers=key, leaves_after_s=rng.choice((0.02, 0.2, 1.0)))


def of_all(rng: random.Random) -> Iterator[FloodRequest]:
    kinds = [make(rng) for make in FLOODS.values() if make is not of_all]
    while True:
        one = next(rng.choice(kinds))
        session = {"x-session-id": str(rng.random()), "x-loraplex-timeout-ms": "60000"}
        yield FloodRequest(one.model, one.fields, one.headers | session, rng.choice(spellings()))


FLOODS = {
    "adapters": of_adapters,
    "choices": of_choices,
    "all": of_all,
}
FURTHER_FLOODS = {
    "spellings": of_spellings,
    "priorities": of_priorities,
    "lengths": of_lengths,
    "prompts": of_prompts,
    "deadlines": of_deadlines,
    "leaving": of_leaving,
}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def slow(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    tmp_path = tmp_path_factory.mktemp("flood")
    adapters = tmp_path / "adapters"
    for n in range(ADAPTERS):
        make_adapter(adapters, f"a{n}")
    make_adapter(adapters, "honest")
    keys = tmp_path / "keys"
    keys.write_text(f"{FLOODER}\n{HONEST}\n")
    timing = {"itl_ms": 20, "max_num_seqs": AT_ONCE, "load_ms": 40}
    config = sim_config(adapters, max_loras=SLOTS, sim=timing, api_keys_file=str(keys))
    config["llm_configs"][0]["deployment_config"] = {"max_ongoing_requests": AT_ONCE}
    async with cluster(config, tmp_path) as c:
        await c.start_worker("w0")
        c.http.headers["Authorization"] = f"Bearer {HONEST}"
        yield c


async def honest_answers(c: Cluster, seconds: float) -> None:
    """Clients that ask again as soon as they have their answer."""
    until = time.monotonic() + seconds

    async def one(http: aiohttp.ClientSession) -> None:
        body, headers = (
            chat_body("sim:honest", max_tokens=TOKENS),
            {"Authorization": f"Bearer {HONEST}"},
        )
        while True:
            async with http.post(
                c.url + "/v1/chat/completions", json=body, headers=headers
            ) as answer:
                await answer.read()
            if time.monotonic() >= until:
                return
            assert answer.status == 200

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        await asyncio.gather(*(one(http) for _ in range(HONEST_CLIENTS)))


async def flood(c: Cluster, requests: Iterator[FloodRequest]) -> None:
    async def one(http: aiohttp.ClientSession) -> None:
        for asked in requests:
            headers = {**asked.headers, "Authorization": asked.authorization}
            body = chat_body(asked.model, asked.prompt, **asked.fields)
            status = 0
            with contextlib.suppress(TimeoutError):
                async with (
                    asyncio.timeout(asked.leaves_after_s),
                    http.post(c.url + "/v1/chat/completions", json=body, headers=headers) as answer,
                ):
                    await answer.read()
                    status = answer.status
            if status != 200:
                await asyncio.sleep(REFUSED_S)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        await asyncio.gather(*(one(http) for _ in range(FLOODING_CLIENTS)))


async def served_tokens(c: Cluster) -> tuple[float, float]:
    """(of the honest key, of all), so far."""
    name, tenant = "loraplex_usage_output_tokens_total", digest_of(HONEST).hex()[:16]
    return await c.metric(name, key=tenant), await c.metric(name)


async def served(c: Cluster) -> tuple[float, float]:
    """(the honest key's share of the tokens, tokens a second)."""
    before, begun = await served_tokens(c), time.monotonic()
    await honest_answers(c, WINDOW_S)
    after, took_s = await served_tokens(c), time.monotonic() - begun
    tokens = after[1] - before[1]
    return (after[0] - before[0]) / tokens, tokens / took_s


async def beside_flood(c: Cluster, requests: Iterator[FloodRequest]) -> tuple[float, float]:
    """(the honest key's share of the tokens, the capacity in what it gets alone)."""
    _, alone = await served(c)
    flooding = asyncio.create_task(flood(c, requests))
    try:
        await asyncio.sleep(WARM_S)
        share, per_s = await served(c)
        return round(share, 2), round(per_s / alone, 2)
    finally:
        flooding.cancel()
        await asyncio.wait([flooding])


@pytest.mark.parametrize(
    "kind", [*FLOODS, *(pytest.param(kind, marks=pytest.mark.long) for kind in FURTHER_FLOODS)]
)
async def test_a_flood_by_another_key_leaves_a_key_its_half(slow: Cluster, kind: str) -> None:
    seen, floods = [], FLOODS | FURTHER_FLOODS
    for _ in range(TRIES):
        seen.append(await beside_flood(slow, floods[kind](random.Random(16))))
        if seen[-1][0] >= LEAST_SHARE and seen[-1][1] >= LEAST_CAPACITY:
            return
    raise AssertionError(f"(share, capacity) {seen} beside a flood of {kind}")
