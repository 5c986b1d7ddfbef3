"""Shell. The last requests of a gateway, and the story of one, over HTTP and from the terminal."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest_asyncio

from tests.harness import ROOT, STOP_S, Cluster, chat_body, cluster, make_adapter, sim_config


@pytest_asyncio.fixture
async def one(tmp_path: Path, adapters: Path) -> AsyncIterator[Cluster]:
    """Adapters a and b; one worker with one slot, which loads in 50 ms."""
    for name in ("a", "b"):
        make_adapter(adapters, name)
    async with cluster(sim_config(adapters, max_loras=1, sim={"load_ms": 50}), tmp_path) as c:
        await c.start_worker("w0")
        while len((await c.get("/v1/models"))[1]["data"]) < 3:
            await asyncio.sleep(0.02)
        yield c


async def ask(c: Cluster, model: str, request_id: str) -> None:
    body = chat_body(model, max_tokens=4, stream=True)
    status, _, _ = await c.post("/v1/chat/completions", body, {"x-request-id": request_id})
    assert status == 200


async def ids(c: Cluster, query: str) -> list[str]:
    return [r["id"] for r in (await c.get(f"/admin/requests?{query}"))[1]["requests"]]


async def loraplex(c: Cluster, *words: str) -> tuple[int, str]:
    argv = [sys.executable, "-m", "loraplex", *words, "--url", c.url]
    process = await asyncio.create_subprocess_exec(
        *argv, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    async with asyncio.timeout(STOP_S):
        said, _ = await process.communicate()
    return process.returncode or 0, said.decode()


async def first_event(c: Cluster, path: str) -> dict[str, Any]:
    async with asyncio.timeout(STOP_S), c.http.get(c.url + path) as answer:
        assert answer.headers["Cache-Control"] == "no-store"
        async for line in answer.content:
            if line.startswith(b"data: "):
                return dict(msgspec.json.decode(line[6:]))
    raise AssertionError("the stream ended without an event")


async def until_seen(c: Cluster, column: str) -> dict[str, Any]:
    """The last hour, once this column counts one."""
    async with asyncio.timeout(STOP_S):
        while True:
            _, hour = await c.get("/admin/series")
            if sum(n or 0 for n in hour["series"][column]) == 1:
                return dict(hour)
            await asyncio.sleep(0.1)


async def test_a_cold_request_says_what_its_adapter_cost_and_what_would_have_helped(
    one: Cluster,
) -> None:
    await ask(one, "sim:a", "cold")
    await ask(one, "sim:a", "warm")
    _, cold = await one.get("/admin/requests/cold")
    assert (cold["adapter"], cold["worker"], cold["outcome"]) == ("a", "w0", "finished")
    assert cold["phases_ms"]["load"] >= 50 and cold["reason"] == "cold"
    assert abs(sum(cold["phases_ms"].values()) - cold["total_ms"]) < 1
    assert [c["worker"] for c in cold["decision"]["candidates"]] == ["w0"]
    assert cold["decision"]["candidates"][0]["terms_ms"]["load"] > 0
    assert cold["decision"]["expected_ms"] > 0 and cold["decision"]["happened_ms"] > 50
    assert "loraplex adapters pin a" in " ".join(cold["faster"])
    _, warm = await one.get("/admin/requests/warm")
    assert warm["phases_ms"]["load"] == 0 and "pin" not in " ".join(warm["faster"])
    code, said = await loraplex(one, "why", "cold")
    assert code == 0 and "Its adapter cost" in said and "loraplex adapters pin a" in said
    code, said = await loraplex(one, "why", "nobody")
    assert code == 1 and "`nobody` is not among the last 500" in said


async def test_requests_are_filtered_and_those_that_were_refused_are_among_them(
    one: Cluster,
) -> None:
    await ask(one, "sim:a", "r1")
    await ask(one, "sim", "r2")
    one.workers["w0"].signal(signal.SIGKILL)
    async with asyncio.timeout(STOP_S):
        while (await one.get("/ready"))[0] == 200:
            await asyncio.sleep(0.05)
    headers = {"x-request-id": "r3", "x-loraplex-timeout-ms": "200"}
    assert (await one.post("/v1/chat/completions", {"model": "sim", "messages": []}, headers))[0]
    assert await ids(one, "") == ["r3", "r2", "r1"]
    assert await ids(one, "adapter=a") == await ids(one, "adapter=sim:a") == ["r1"]
    assert await ids(one, "worker=w0") == ["r2", "r1"]
    assert await ids(one, "status=finished&limit=1") == ["r2"]
    assert (await one.get("/admin/requests?limit=0"))[0] == 400
    _, late = await one.get("/admin/requests/r3")
    assert late["code"] and late["phases_ms"]["queue"] == sum(late["phases_ms"].values())
    assert "never reached a worker" in " ".join(late["words"])


async def test_the_live_events_and_the_last_hour_have_the_fleets_figures(one: Cluster) -> None:
    await ask(one, "sim:a", "r1")
    await until_seen(one, "loads")
    await ask(one, "sim:b", "r2")
    async with asyncio.timeout(STOP_S):
        while (await one.get("/admin/adapters/b"))[1]["state"] != "loaded":
            await asyncio.sleep(0.02)
    event = await first_event(one, "/admin/live?adapters=1")
    (worker,) = event["workers"]
    assert (worker["id"], worker["state"], worker["slots"]) == ("w0", "serving", 1)
    assert [r["id"] for r in event["requests"]] == ["r2", "r1"]
    assert ["b", "gpu"] in [h[:2] for h in event["held"]["w0"]]
    assert event["scaling"]["models"]["sim"]["present"] == 1
    hour = await until_seen(one, "evictions")
    assert sum(n or 0 for n in hour["series"]["loads"]) == 2
    assert sum((n or 0) * hour["step_s"] for n in hour["series"]["requests_per_s"]) == 2
    code, said = await loraplex(one, "top", "--once")
    assert code == 0 and "w0" in said and "r2" in said and "sim: 1 workers" in said
    assert (await one.get("/admin/keys"))[1] == {"keys": []}
