"""Shell. Workers of several hosts (each a process with a disk cache of its own) and one S3 server
behind a counting proxy.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.fault.proxy import Fault, FaultProxy, fault_proxy
from tests.harness import Cluster, cluster, sim_config
from tests.store_servers import S3Place
from worker.disk import layout as disk_layout

pytestmark = pytest.mark.usefixtures("store_credentials")

MIB = 1 << 20
WEIGHTS = "adapter_model.safetensors"
CONFIG = b'{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}'
SECRET_ENV = "LORAPLEX_TEST_SECRET"
SECRET = "the secret of these tests"
LINK = {
    "control": "tcp://127.0.0.1:0",
    "data": "tcp://127.0.0.1:0",
    "peer": "tcp://127.0.0.1:0",
    "secret_env": SECRET_ENV,
}


@dataclass
class Hosts:
    """A gateway, and workers on hosts of their own. Each worker takes one request at a time, so
    requests that are sent together reach as many hosts.
    """

    cluster: Cluster
    place: S3Place
    proxy: FaultProxy
    contents: dict[str, bytes] = field(default_factory=dict)

    def put(self, name: str, size_bytes: int) -> None:
        self.contents[name] = os.urandom(size_bytes)
        self.place.put(f"{name}/adapter_config.json", CONFIG)
        self.place.put(f"{name}/{WEIGHTS}", self.contents[name])

    def root(self, worker: str) -> Path:
        return self.cluster.folder / f"host-{worker}"

    async def start(self, *workers: str) -> None:
        await asyncio.gather(
            *(self.cluster.start_worker(worker, state_dir=self.root(worker)) for worker in workers)
        )

    async def ask(self, name: str) -> int:
        return (await self.cluster.chat(f"sim:{name}", max_tokens=1))[0]

    def fetched(self, worker: str) -> list[dict[str, Any]]:
        """The worker's log lines about its fetches."""
        lines = [
            json.loads(line)
            for line in self.cluster.workers[worker].output().splitlines()
            if line.startswith("{")
        ]
        return [line for line in lines if line["event"] == "adapter fetched"]

    def weights_asked(self) -> list[str]:
        return sorted(r.range for r in self.proxy.files() if r.path.endswith(WEIGHTS))

    def shelf_is_true(self, worker: str, name: str) -> bool:
        """The one entry of this host equals the adapter in the store, and its manifest says the
        same.
        """
        (key,) = [key for key, _ in disk_layout.keys_in(self.root(worker) / "adapters" / "entries")]
        entry = self.root(worker) / "adapters" / "entries" / key
        manifest = disk_layout.read_manifest(entry)
        assert manifest is not None
        return (
            disk_layout.is_whole(entry, manifest)
            and (entry / "files" / WEIGHTS).read_bytes() == self.contents[name]
        )


@pytest.fixture
async def hosts(
    moto_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Hosts]:
    monkeypatch.setenv(SECRET_ENV, SECRET)
    async with opened(moto_url, tmp_path) as h:
        yield h


@asynccontextmanager
async def opened(moto_url: str, folder: Path) -> AsyncIterator[Hosts]:
    place = S3Place(
        moto_url, f"peers-{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}", "p/"
    )
    async with fault_proxy(moto_url) as proxy:
        one_at_a_time = {"max_num_seqs": 1, "ttft_ms": 200}
        config = sim_config(
            place.url, max_loras=2, sim=one_at_a_time, routing_policy="residency-p2c", link=LINK
        )
        config["llm_configs"][0]["lora_config"]["store"] = {
            **place.options,
            "endpoint_url": proxy.url,
        }
        async with cluster(config, folder) as c:
            yield Hosts(c, place, proxy)


async def test_four_hosts_that_ask_at_once_ask_the_store_for_every_byte_once(hosts: Hosts) -> None:
    hosts.put("a", 40 * MIB)
    hosts.proxy.rule = lambda r: Fault(bytes_per_s=24 * MIB) if r.path.endswith(WEIGHTS) else None
    workers = ("w0", "w1", "w2", "w3")
    await hosts.start(*workers)
    assert await asyncio.gather(*(hosts.ask("a") for _ in workers)) == [200] * 4
    assert hosts.weights_asked() == sorted(
        [f"bytes={n * 8 * MIB}-{(n + 1) * 8 * MIB - 1}" for n in range(4)] + [f"bytes={32 * MIB}-"]
    )
    assert sorted(line["from"] for worker in workers for line in hosts.fetched(worker)) == [
        "peer",
        "peer",
        "peer",
        "store",
    ]
    assert all(hosts.shelf_is_true(worker, "a") for worker in workers)


async def test_a_host_that_comes_later_gets_it_from_who_has_it_and_not_from_the_store(
    hosts: Hosts,
) -> None:
    hosts.put("a", 9 * MIB)
    await hosts.start("w0")
    assert await hosts.ask("a") == 200
    before = len(hosts.proxy.files())
    await hosts.start("w1")
    assert await asyncio.gather(hosts.ask("a"), hosts.ask("a")) == [200, 200]
    assert len(hosts.proxy.files()) == before and hosts.fetched("w1")[0]["from"] == "peer"
    assert hosts.shelf_is_true("w1", "a")


async def test_a_peer_that_is_killed_while_it_gives_costs_the_parts_that_it_still_had(
    hosts: Hosts,
) -> None:
    hosts.put("a", 128 * MIB)
    await hosts.start("w0")
    assert await hosts.ask("a") == 200
    before = len(hosts.proxy.files())
    await hosts.start("w1")
    asked = asyncio.gather(hosts.ask("a"), hosts.ask("a"))
    giver = hosts.cluster.workers["w0"]
    async with asyncio.timeout(60):
        while parts_of_download(hosts.root("w1")) < 3:  # the config, and two of the weights
            await asyncio.sleep(0.001)
    giver.signal(signal.SIGSTOP)
    had = parts_of_download(hosts.root("w1")) - 1
    giver.signal(signal.SIGKILL)
    assert 200 in await asked
    (line,) = hosts.fetched("w1")
    given = line["peer_bytes"] // (8 * MIB)
    assert (
        line["from"] == "peer+store"
        and had <= given < 16
        and len(hosts.proxy.files()) - before == 16 - given
    )
    assert hosts.shelf_is_true("w1", "a")


async def test_workers_that_share_a_disk_cache_never_ask_each_other(hosts: Hosts) -> None:
    hosts.put("a", MIB)
    root = hosts.root("shared")
    for worker in ("w0", "w1"):
        await hosts.cluster.start_worker(worker, state_dir=root)
    assert await asyncio.gather(hosts.ask("a"), hosts.ask("a")) == [200, 200]
    assert len(hosts.proxy.files()) == 2
    found = [line["from"] for worker in ("w0", "w1") for line in hosts.fetched(worker)]
    assert found.count("store") == 1 and "peer" not in found


def parts_of_download(root: Path) -> int:
    """The number of complete parts of a host's one download."""
    return sum(
        journal.read_bytes().count(b"\n") - 1
        for journal in (root / "adapters" / "partial").glob("*/journal")
    )
