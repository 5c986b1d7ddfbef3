"""Shell. Routing end to end: gateway and simulated workers as real processes over real sockets."""

from __future__ import annotations

import asyncio
import json
import math
import signal
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.harness import Cluster, cluster, make_adapter, sim_config

SLOW = {"itl_ms": 20, "load_ms": 30}


async def burst(c: Cluster, models: list[str], max_tokens: int = 30) -> list[Mapping[str, str]]:
    """The headers of the answers to requests that were all sent at once."""
    answers = await asyncio.gather(*(c.chat(model, max_tokens=max_tokens) for model in models))
    assert all(status == 200 for status, _, _ in answers), answers
    return [headers for _, _, headers in answers]


async def three_workers(c: Cluster) -> None:
    for n in range(3):
        await c.start_worker(f"w{n}")


async def listed(c: Cluster, count: int) -> None:
    """The store's listing is known."""
    async with asyncio.timeout(20):
        while len((await c.get("/v1/models"))[1]["data"]) < count:
            await asyncio.sleep(0.02)


async def test_requests_of_the_base_model_spread_over_all_workers(
    tmp_path: Path, adapters: Path
) -> None:
    async with cluster(sim_config(adapters, sim=SLOW), tmp_path) as c:
        await three_workers(c)
        counts = Counter(h["x-loraplex-worker"] for h in await burst(c, ["sim"] * 18))
        assert set(counts) == {"w0", "w1", "w2"}, counts


async def test_a_burst_for_a_cold_adapter_is_loaded_once_and_then_found_in_the_slot(
    tmp_path: Path, adapters: Path
) -> None:
    make_adapter(adapters, "pirate")
    async with cluster(sim_config(adapters, sim=SLOW), tmp_path) as c:
        await three_workers(c)
        await listed(c, 2)
        first = await burst(c, ["sim:pirate"] * 8)
        assert len({h["x-loraplex-worker"] for h in first}) == 1
        assert "remote" in {h["x-loraplex-adapter-tier"] for h in first}
        assert {h["x-loraplex-policy"] for h in first} == {"expected-ttft"}
        assert sum(c.workers[w].output().count("adapter loaded") for w in c.workers) == 1
        [again] = await burst(c, ["sim:pirate"])
        assert (
            again["x-loraplex-adapter-tier"] == "gpu"
            and again["x-loraplex-worker"] == first[0]["x-loraplex-worker"]
        )
        assert float(again["x-loraplex-queue-ms"]) < 100


async def test_a_full_holder_spills_onto_another_worker(tmp_path: Path, adapters: Path) -> None:
    make_adapter(adapters, "pirate")
    async with cluster(sim_config(adapters, sim={**SLOW, "max_num_seqs": 4}), tmp_path) as c:
        await three_workers(c)
        await listed(c, 2)
        counts = Counter(h["x-loraplex-worker"] for h in await burst(c, ["sim:pirate"] * 6))
        assert len(counts) == 2 and max(counts.values()) == 4, counts


async def test_more_adapters_than_slots_all_get_their_turn(tmp_path: Path, adapters: Path) -> None:
    # two in slots, six in the worker's line, the others wait at the gateway
    names = [f"a{n}" for n in range(10)]
    for name in names:
        make_adapter(adapters, name)
    async with cluster(sim_config(adapters, max_loras=2, sim=SLOW), tmp_path) as c:
        await c.start_worker("w0")
        await listed(c, 11)
        headers = await burst(c, [f"sim:{n}" for n in names for _ in range(3)], max_tokens=10)
        assert len(headers) == 30 and max(float(h["x-loraplex-queue-ms"]) for h in headers) > 0


async def test_a_warm_adapter_is_never_unloaded_for_a_burst_of_cold_ones(
    tmp_path: Path, adapters: Path
) -> None:
    colds = [f"cold{n:02}" for n in range(40)]
    for name in ["warm", *colds]:
        make_adapter(adapters, name)
    async with cluster(sim_config(adapters, max_loras=3, sim=SLOW), tmp_path) as c:
        for n in range(2):
            await c.start_worker(f"w{n}")
        await listed(c, len(colds) + 2)
        tiers: list[str] = []
        asking = [asyncio.create_task(keep_asking(c, "sim:warm", tiers)) for _ in range(3)]
        async with asyncio.timeout(60):
            while len(tiers) < 60:  # a handful a second, far from where steady use begins
                await asyncio.sleep(0.05)
        holders = (await c.get("/admin/adapters/warm"))[1]["workers"]
        assert holders and all(w["steady"] for w in holders)
        before, loads = len(tiers), loads_of(c, "warm")
        await burst(c, [f"sim:{name}" for name in colds], max_tokens=10)
        assert not any(task.done() for task in asking)
        for task in asking:
            task.cancel()
        await asyncio.wait(asking)
        assert sum(loads_of(c, name) for name in colds) >= len(colds) and len(tiers) > before
        assert set(tiers[before:]) == {"gpu"}, "each request found it in its slot"
        assert loads_of(c, "warm") == loads == len(holders)


async def keep_asking(c: Cluster, model: str, tiers: list[str]) -> None:
    """One short request after another. Returns where each found the adapter."""
    while True:
        [headers] = await burst(c, [model], max_tokens=3)
        tiers.append(headers["x-loraplex-adapter-tier"])
        await asyncio.sleep(0.1)  # idle for a moment: that is what it is about


def loads_of(c: Cluster, adapter: str) -> int:
    lines = [
        line
        for proc in c.workers.values()
        for line in proc.output().splitlines()
        if '"adapter loaded"' in line
    ]
    return sum(f":{adapter}@" in line for line in lines)


async def test_explain_names_each_worker_with_its_costs(tmp_path: Path, adapters: Path) -> None:
    make_adapter(adapters, "pirate")
    async with cluster(sim_config(adapters), tmp_path) as c:
        await three_workers(c)
        await listed(c, 2)
        [sent] = await burst(c, ["sim:pirate"], max_tokens=1)
        async with asyncio.timeout(60):
            found = await explained(c, "sim:pirate")
            while len(found["workers"]) < 3 or found["workers"][0]["tier"] != "gpu":
                await asyncio.sleep(0.02)
                found = await explained(c, "sim:pirate")
        assert found["policy"] == "expected-ttft" and found["queued"] == 0
        assert found["workers"][0]["worker"] == sent["x-loraplex-worker"]
        assert {w["worker"] for w in found["workers"]} == {"w0", "w1", "w2"}
        assert set(found["workers"][0]["terms_ms"]) == {
            "queue",
            "line",
            "slot",
            "load",
            "stall",
            "outside",
            "prefix",
        }
        assert (
            found["workers"][0]["terms_ms"]["load"] == 0 < found["workers"][1]["terms_ms"]["load"]
        )
        assert [w["tier"] for w in found["workers"]] == ["gpu", "disk", "disk"], (
            "they share the disk that the first one read it to"
        )
        assert (await c.get("/admin/explain?model=sim:nobody"))[0] == 404
        assert (await c.get("/admin/explain"))[0] == 404


async def test_a_worker_that_starts_again_is_known_to_have_on_disk_what_it_had(
    tmp_path: Path, adapters: Path
) -> None:
    make_adapter(adapters, "pirate")
    async with cluster(sim_config(adapters, warm_up_s=0), tmp_path) as c:
        await c.start_worker("w0")
        await listed(c, 2)
        [first] = await burst(c, ["sim:pirate"], max_tokens=1)
        c.workers["w0"].signal(signal.SIGKILL)
        await c.workers["w0"].wait()
        await c.start_worker("w0")
        [again] = await burst(c, ["sim:pirate"], max_tokens=1)
        assert [h["x-loraplex-adapter-tier"] for h in (first, again)] == ["remote", "disk"]


async def test_a_load_is_priced_by_all_of_it_the_check_and_what_is_done_beside_the_engine_included(
    tmp_path: Path, adapters: Path
) -> None:
    for name in ("pirate", "haiku"):
        make_adapter(adapters, name)
    load_ms = 500  # far more than a swap, on a busy machine too
    async with cluster(sim_config(adapters, sim={**SLOW, "load_ms": load_ms}), tmp_path) as c:
        await c.start_worker("w0")
        await listed(c, 3)
        await burst(c, ["sim:pirate"], max_tokens=1)
        c.workers["w0"].signal(signal.SIGKILL)
        await c.workers["w0"].wait()
        await c.start_worker("w0")
        await burst(c, ["sim:pirate"], max_tokens=1)
        async with asyncio.timeout(60):  # until a heartbeat tells of it
            while (await explained(c, "sim:pirate"))["workers"][0]["tier"] != "gpu":
                await asyncio.sleep(0.02)
        [w0] = (await explained(c, "sim:haiku"))["workers"]
        lines = c.workers["w0"].output().splitlines()
        prepared, loaded = (
            json.loads([line for line in lines if f'"adapter {what}"' in line][-1])
            for what in ("prepared", "loaded")
        )
        # a timer may end a tick early
        assert prepared["ms"] > 0.99 * load_ms > 5 * loaded["stall_ms"]
        whole_ms = prepared["check_ms"] + prepared["ms"] + loaded["stall_ms"]
        assert w0["tier"] == "remote" and w0["terms_ms"]["load"] == pytest.approx(
            250 + whole_ms, abs=0.5
        )  # 250: a fetch that nobody measured
        assert w0["terms_ms"]["stall"] < 1


async def test_a_worker_that_joins_loads_its_share_of_the_hot_adapters_before_its_first_request(
    tmp_path: Path, adapters: Path
) -> None:
    names = [f"a{n}" for n in range(12)]
    for name in names:
        make_adapter(adapters, name)
    async with cluster(sim_config(adapters, max_loras=16), tmp_path) as c:
        await c.start_worker("w0")
        await listed(c, 13)

        async def ask(times: float) -> None:
            while times > 0:
                await burst(c, [f"sim:{n}" for n in names for _ in range(8)], max_tokens=1)
                times -= 1

        await ask(6)
        asking = asyncio.create_task(ask(math.inf))  # the worker may take long to start
        worker = await c.start_worker("w1")
        asking.cancel()
        lines = map(json.loads, worker.output().splitlines())
        events = [line for line in lines if line["event"] in ("warmed up", "serving")]
        assert [line["event"] for line in events] == ["warmed up", "serving"]
        assert events[0]["adapters"] >= 2


async def explained(c: Cluster, model: str) -> Any:
    status, body = await c.get(f"/admin/explain?model={model}")
    assert status == 200
    return body


async def test_the_access_log_says_where_and_why(tmp_path: Path, adapters: Path) -> None:
    make_adapter(adapters, "pirate")
    async with cluster(sim_config(adapters), tmp_path) as c:
        await c.start_worker("w0")
        await listed(c, 2)
        await burst(c, ["sim:pirate"], max_tokens=3)
        assert c.gateway is not None
        lines: list[dict[str, Any]] = []
        async with asyncio.timeout(60):
            while not lines:  # lines leave together, a tenth of a second later
                lines = [
                    json.loads(line)
                    for line in c.gateway.output().splitlines()
                    if '"request"' in line and "ttft_ms" in line
                ]
                await asyncio.sleep(0.01)
        assert (
            lines[-1]["worker"] == "w0"
            and lines[-1]["tier"] == "remote"
            and lines[-1]["reason"] == "cold"
        )
        assert (
            lines[-1]["output_tokens"] == 3
            and lines[-1]["queue_ms"] >= 0
            and lines[-1]["load_ms"] > 0
        )


@pytest.mark.parametrize("policy", ["ray", "residency-p2c"])
async def test_another_policy_is_chosen_in_the_config(
    tmp_path: Path, adapters: Path, policy: str
) -> None:
    make_adapter(adapters, "pirate")
    async with cluster(sim_config(adapters, routing_policy=policy), tmp_path) as c:
        await c.start_worker("w0")
        await listed(c, 2)
        for headers in await burst(c, ["sim", "sim:pirate"], max_tokens=2):
            assert headers["x-loraplex-policy"] == policy


async def test_a_priority_that_is_no_number_is_refused(tmp_path: Path, adapters: Path) -> None:
    async with cluster(sim_config(adapters), tmp_path) as c:
        await c.start_worker("w0")
        body = {"model": "sim", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        assert (await c.post("/v1/chat/completions", body, {"x-loraplex-priority": "-3"}))[0] == 200
        status, answer, _ = await c.post(
            "/v1/chat/completions", body, {"x-loraplex-priority": "high"}
        )
        assert status == 400 and answer["error"]["param"] == "x-loraplex-priority"
