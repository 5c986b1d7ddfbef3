"""Shell. The pods of the chart run here as processes: they find each other by the DNS, answer the
kubelet's probes, and are replaced one after the other under load without a failed request.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

from tests.harness import make_adapter
from tests.pods import PodCluster
from tests.unit.deploy.chart import container_of, gateway_of, of_kind, render, workers_of

CLIENTS = 6
TOKENS = 40
WAIT_S = 60.0


def values(adapters: Path) -> dict[str, Any]:
    model = {
        "model_loading_config": {"model_id": "demo"},
        "llm_engine": "sim",
        "engine_kwargs": {"max_loras": 4, "sim": {"itl_ms": 10}},
        "lora_config": {"dynamic_lora_loading_path": str(adapters)},
        "deployment_config": {"autoscaling_config": {"min_replicas": 2, "max_replicas": 4}},
    }
    return {
        "config": {"llm_configs": [model]},
        "gateway": {"leaveServiceSeconds": 1},
        "scaling": {"by": "keda"},
    }


@contextlib.asynccontextmanager
async def running(folder: Path) -> AsyncIterator[PodCluster]:
    """Two gateways and two workers, all ready."""
    make_adapter(folder / "adapters", "pirate")
    cluster = PodCluster(render(values(folder / "adapters")), folder)
    gateway, (worker,) = gateway_of(cluster.objects), workers_of(cluster.objects)
    try:
        gateways = [await cluster.start(gateway, f"gateway-{n}") for n in range(2)]
        workers = [await cluster.start(worker, f"worker-{n}") for n in range(2)]
        for pod in workers:
            await pod.until("startupProbe")
            await pod.until("readinessProbe")
        for pod in gateways:
            await pod.until("startupProbe")
            await pod.until("readinessProbe")
            cluster.ready.append(pod)
        yield cluster
    finally:
        await cluster.close()


class Load:
    """Clients that ask without a pause, each over connections of its own to pods of the Service."""

    def __init__(self, cluster: PodCluster) -> None:
        self._cluster = cluster
        self._rng = random.Random(7)
        self.answered = 0
        self.failures: list[str] = []
        self.more = asyncio.Event()

    async def client(self) -> None:
        async with aiohttp.ClientSession() as http:
            while True:
                await self._ask(http)

    async def _ask(self, http: aiohttp.ClientSession) -> None:
        pod = self._rng.choice(self._cluster.ready)
        body = {
            "model": self._rng.choice(["demo", "demo:pirate"]),
            "stream": True,
            "max_tokens": TOKENS,
            "ignore_eos": True,
            "messages": [{"role": "user", "content": "Hello!"}],
        }
        url = f"http://{pod.ip}:{pod.ports['http']}/v1/chat/completions"
        try:
            async with asyncio.timeout(WAIT_S), http.post(url, json=body) as answer:
                text = await answer.text()
                events = re.findall(r"^data: (.*)$", text, re.MULTILINE)
                whole = answer.status == 200 and events[-1:] == ["[DONE]"]
                tokens = sum('"content":' in event for event in events)
        except (aiohttp.ClientError, TimeoutError) as exc:
            self.failures.append(f"{pod.name}: {exc!r}")
            return
        if not whole or "error" in text or not tokens:
            self.failures.append(f"{pod.name}: {answer.status} {text[-300:]}")
        self.answered += 1
        self.more.set()

    async def answer(self, count: int) -> None:
        """Waits until so many more have been answered."""
        wanted = self.answered + count
        async with asyncio.timeout(WAIT_S):
            while self.answered < wanted:
                self.more.clear()
                await self.more.wait()


@contextlib.asynccontextmanager
async def load(cluster: PodCluster) -> AsyncIterator[Load]:
    found = Load(cluster)
    tasks = [asyncio.create_task(found.client()) for _ in range(CLIENTS)]
    try:
        yield found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_gateways_and_workers_are_replaced_one_by_one_under_load_and_nothing_fails(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as cluster:
        gateway, (worker,) = gateway_of(cluster.objects), workers_of(cluster.objects)
        async with load(cluster) as clients:
            await clients.answer(20)
            for n in range(2):  # maxSurge 1, maxUnavailable 0
                new = await cluster.start(gateway, f"gateway-{n + 2}")
                await new.until("startupProbe")
                await new.until("readinessProbe")
                cluster.ready.append(new)
                old = cluster.pods[f"gateway-{n}"]
                assert await cluster.stop(old, gateway) == 0, old.output()
                await clients.answer(20)
            for n in range(2):  # a StatefulSet: the same name comes back
                old = cluster.pods[f"worker-{n}"]
                assert await cluster.stop(old, worker) == 0, old.output()
                await clients.answer(5)
                back = await cluster.start(worker, f"worker-{n}")
                await back.until("startupProbe")
                await back.until("readinessProbe")
                await clients.answer(20)
            assert clients.failures == []
        assert {pod.name for pod in cluster.ready} == {"gateway-2", "gateway-3"}


async def test_a_gateway_that_comes_later_is_found_by_every_worker_and_keda_finds_its_series(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as cluster:
        late = await cluster.start(gateway_of(cluster.objects), "gateway-2")
        await late.until("startupProbe")
        url = f"http://{late.ip}:{late.ports['http']}/metrics"
        both = {'worker="worker-0"', 'worker="worker-1"'}
        async with asyncio.timeout(WAIT_S), aiohttp.ClientSession() as http:
            while True:
                async with http.get(url) as answer:
                    text = await answer.text()
                up = [line for line in text.splitlines() if line.startswith("loraplex_worker_up{")]
                if all(any(worker in line for line in up) for worker in both):
                    break
                await asyncio.sleep(0.05)
        (scaled,) = of_kind(cluster.objects, "ScaledObject")
        asked = scaled["spec"]["triggers"][0]["metadata"]
        assert asked["url"].endswith(f":{late.ports['http']}/metrics")
        name, label = asked["valueLocation"].split("{")
        lines = [line for line in text.splitlines() if line.startswith(f"{name}{{{label[:-1]}")]
        assert len(lines) == 1 and json.loads(lines[0].split()[-1]) == 0


async def test_a_worker_is_ready_only_while_it_serves_and_drains_by_its_hook(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as cluster:
        (worker,) = workers_of(cluster.objects)
        pod = cluster.pods["worker-1"]
        assert await pod.probe("livenessProbe") and await pod.probe("readinessProbe")
        assert container_of(worker)["lifecycle"]["preStop"]["exec"]["command"][:3] == [
            "python3",
            "-m",
            "worker.probes",
        ]
        assert await cluster.stop(pod, worker) == 0
        assert "told to drain" in pod.output()
