"""Shell. The last requests of a gateway, and the story of one, over HTTP and from the terminal."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest_asyncio

from tests import forks
from tests.harness import (
    STOP_S,
    Cluster,
    chat_body,
    cluster,
    make_adapter,
    second_gateway,
    sim_config,
)


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
    async with asyncio.timeout(STOP_S):
        status, out, err = await forks.loraplex(*words, "--url", c.url, env=os.environ)
    return status, out + err


async def first_event(c: Cluster, path: str) -> dict[str, Any]:
    async with asyncio.timeout(STOP_S), c.http.get(c.url + path) as answer:
        assert answer.headers["Cache-Control"] == "no-store"
        async for line in answer.content:
            if line.startswith(b"data: "):
                return dict(msgspec.json.decode(line[6:]))
    raise AssertionError("the stream ended without an event")


async def of_all(c: Cluster, path: str) -> dict[str, Any]:
    """The answer in which every gateway process has its part: each has a second for it."""
    async with asyncio.timeout(STOP_S):
        while True:
            found = dict((await c.get(path))[1])
            if all(found["processes"].values()):
                return found


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
    assert code == 1 and "`nobody` is not open, and not among the last 500" in said


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


async def test_a_request_that_is_still_open_is_told_of_so_far(one: Cluster) -> None:
    body = chat_body("sim:a", max_tokens=2000, stream=True)
    headers = {"x-request-id": "long"}
    async with one.http.post(
        one.url + "/v1/chat/completions", json=body, headers=headers
    ) as answer:
        await answer.content.readline()
        _, told = await one.get("/admin/requests/long")
        assert (told["outcome"], told["worker"]) == ("open", "w0")
        assert "is still open" in told["words"][0]
        while b"w5" not in await answer.content.readline():
            pass
    async with asyncio.timeout(STOP_S):
        while (left := (await one.get("/admin/requests/long"))[1])["outcome"] == "open":
            await asyncio.sleep(0.02)
    assert left["outcome"] == "aborted" and 5 <= left["output_tokens"] < 2000


async def test_a_request_that_waited_for_a_slot_is_told_so(one: Cluster) -> None:
    body = chat_body("sim:a", max_tokens=150, stream=True)
    async with one.http.post(one.url + "/v1/chat/completions", json=body) as answer:
        await answer.content.readline()
        waits = asyncio.create_task(ask(one, "sim:b", "waits"))
        await answer.read()
        await waits
    _, told = await one.get("/admin/requests/waits")
    spent = told["phases_ms"]
    assert spent["wait"] > spent["load"] + spent["fetch"] + spent["check"] > 40, spent
    assert "for a slot that others used" in " ".join(told["words"])
    assert told["faster"][0].startswith("One more adapter slot (max_loras)")


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
    assert code == 0 and "w0" in said and "r2" in said and "sim: 1 worker, 0 queued" in said
    assert (await one.get("/admin/keys"))[1] == {"keys": []}


async def test_each_of_several_processes_shows_the_requests_and_the_last_hour_of_all(
    tmp_path: Path, adapters: Path
) -> None:
    make_adapter(adapters, "a")
    config = sim_config(adapters, processes=2, queue_timeout_s=STOP_S)
    async with cluster(config, tmp_path) as c, second_gateway(c) as other:
        await c.start_worker("w0", gateways=[other.control])
        async with asyncio.timeout(STOP_S):
            while (await other.get("/ready"))[0] != 200:
                await asyncio.sleep(0.02)
        for n, gateway in enumerate((c, other, c)):
            await ask(gateway, "sim:a", f"r{n}")
        c.workers["w0"].signal(signal.SIGKILL)
        async with asyncio.timeout(STOP_S):
            while any([(await g.get("/ready"))[0] == 200 for g in (c, other)]):
                await asyncio.sleep(0.02)
        waits = [asyncio.create_task(g.chat("sim", max_tokens=1)) for g in (c, other)]
        try:
            for gateway in (c, other):
                async with asyncio.timeout(STOP_S):
                    while (await gateway.get("/admin/autoscale"))[1]["models"]["sim"]["queued"] < 2:
                        await asyncio.sleep(0.02)
                listed = await of_all(gateway, "/admin/requests?status=finished")
                assert listed["processes"] == {"g0": True, "g1": True}
                assert [(r["id"], r["process"]) for r in listed["requests"]] == [
                    *(("r2", "g0"), ("r1", "g1"), ("r0", "g0"))
                ]
                async with asyncio.timeout(STOP_S):
                    while (await gateway.get("/admin/adapters"))[1]["adapters"][0]["hits"] < 3:
                        await asyncio.sleep(0.02)
                    while (await gateway.get("/admin/adapters/a"))[1]["traffic"]["requests"] < 3:
                        await asyncio.sleep(0.02)
                hour = await of_all(gateway, "/admin/series")
                ended = hour["series"]["requests_per_s"]
                assert sum((n or 0) * hour["step_s"] for n in ended) == 3
                async with asyncio.timeout(STOP_S):
                    while (event := await first_event(gateway, "/admin/live"))["open_requests"] < 2:
                        await asyncio.sleep(0.02)
                    while '"process":"g1"' not in (lines := (await gateway.get("/admin/logs"))[1]):
                        await asyncio.sleep(0.02)
                assert [r["id"] for r in event["requests"]] == ["r2", "r1", "r0"]
                assert event["open_requests"] == event["scaling"]["models"]["sim"]["queued"] == 2
                assert '"process":"g0"' in lines
            assert other.gateway is not None
            other.gateway.signal(signal.SIGSTOP)
            _, listed = await c.get("/admin/requests?status=finished")
            assert listed["processes"] == {"g0": True, "g1": False}
            assert [r["id"] for r in listed["requests"]] == ["r2", "r0"]
        finally:
            for task in waits:
                task.cancel()


async def test_of_requests_with_one_id_in_several_processes_the_newest_is_told(
    tmp_path: Path, adapters: Path
) -> None:
    async with (
        cluster(sim_config(adapters, processes=2), tmp_path) as c,
        second_gateway(c) as other,
    ):
        await c.start_worker("w0", gateways=[other.control])
        async with asyncio.timeout(STOP_S):
            while (await other.get("/ready"))[0] != 200:
                await asyncio.sleep(0.02)
        for gateway, elsewhere, name in ((c, other, "g0"), (other, c, "g1"), (c, other, "g0")):
            await ask(gateway, "sim", "again")
            assert (await gateway.get("/admin/requests/again"))[1]["process"] == name
            async with asyncio.timeout(STOP_S):
                while (await elsewhere.get("/admin/requests/again"))[1]["process"] != name:
                    await asyncio.sleep(0.02)


async def test_what_the_engine_refused_is_not_told_as_finished(one: Cluster) -> None:
    body = chat_body("sim:a", n=2, stream=True)  # the simulated engine gives one choice
    status, _, _ = await one.post("/v1/chat/completions", body, {"x-request-id": "r"})
    assert status == 400
    _, found = await one.get("/admin/requests/r")
    assert (found["engine_status"], found["ttft_ms"]) == (400, None)
    assert found["words"][0].startswith("The request for sim:a was refused by the engine (400)")
    assert not any("first token" in sentence for sentence in found["words"])
    assert await ids(one, "status=400") == await ids(one, "status=invalid") == ["r"]
    assert await ids(one, "status=finished") == []
    _, shown = await loraplex(one, "top", "--once")
    assert "engine: 400" in shown


async def test_a_request_of_the_base_model_has_no_tier_of_an_adapter(one: Cluster) -> None:
    await ask(one, "sim", "r")
    assert (await one.get("/admin/requests/r"))[1]["tier"] is None
