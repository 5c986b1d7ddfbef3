"""Shell. What the disk cache makes of real S3 and GCS servers behind a proxy that breaks things."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from shared.adapters.checks import AdapterFacts
from shared.adapters.identity import AdapterRef, StoredAdapter
from shared.errors import StoreUnavailable
from shared.stores import AdapterStore, open_store
from shared.stores import transfer as transfer_module
from shared.stores.transfer import TransferRetries
from tests.fault.proxy import Fault, FaultProxy, fault_proxy
from tests.harness import cluster, sim_config
from tests.store_servers import GCSPlace, S3Place, moto_process
from tests.unit.worker.disk.whole_check import WholeCheck
from worker.disk.cache import Cached, DiskCache

pytestmark = pytest.mark.usefixtures("store_credentials")

MIB = 1 << 20
WEIGHTS = "adapter_model.safetensors"
CONFIG = b'{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}'
_numbers = itertools.count()


@dataclass
class Site:
    """A store behind a proxy, and a host with a disk cache."""

    place: S3Place | GCSPlace
    proxy: FaultProxy
    store: AdapterStore
    root: Path

    def put(self, name: str, weights: bytes) -> None:
        self.place.put(f"{name}/adapter_config.json", CONFIG)
        self.place.put(f"{name}/{WEIGHTS}", weights)

    def cache(self, stall_s: float = 10.0, tries: int = 3) -> DiskCache:
        return DiskCache(self.root, 0, TransferRetries(stall_s, tries))

    async def look_up(self, name: str) -> tuple[AdapterRef, StoredAdapter]:
        stored = await self.store.find(name)
        assert stored is not None
        return AdapterRef("base", name, stored.digest), stored

    async def fetch(self, cache: DiskCache, name: str) -> Cached:
        ref, stored = await self.look_up(name)
        return await cache.fetch(ref, stored, self.store, check)


def _check(folder: Path) -> AdapterFacts:
    return AdapterFacts(8, 0, ())


check = WholeCheck(_check)


@asynccontextmanager
async def opened(kind: str, url: str, root: Path) -> AsyncIterator[Site]:
    bucket = f"faults-{next(_numbers)}"
    place = S3Place(url, bucket, "p/") if kind == "s3" else GCSPlace(url, bucket, "p/")
    async with (
        fault_proxy(url) as proxy,
        open_store(place.url, {**place.options, "endpoint_url": proxy.url}) as store,
    ):
        yield Site(place, proxy, store, root)


@pytest.fixture(params=["s3", "gcs"])
async def site(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Site]:
    url = request.getfixturevalue("moto_url" if request.param == "s3" else "gcs_url")
    async with opened(request.param, url, tmp_path / "cache") as s:
        yield s


@pytest.fixture
async def s3(moto_url: str, tmp_path: Path) -> AsyncIterator[Site]:
    async with opened("s3", moto_url, tmp_path / "cache") as s:
        yield s


async def test_a_large_file_comes_in_parts_side_by_side(site: Site) -> None:
    weights = os.urandom(26 * MIB)
    site.put("a", weights)
    got = await site.fetch(site.cache(), "a")
    assert (got.folder / WEIGHTS).read_bytes() == weights
    ranges = sorted(r.range for r in site.proxy.files() if r.path.endswith(WEIGHTS))
    assert ranges == sorted(
        ["bytes=0-8388607", "bytes=8388608-16777215", "bytes=16777216-25165823", "bytes=25165824-"]
    )
    assert 2 <= site.proxy.most_at_once <= transfer_module.PARTS_PER_ADAPTER + 1


async def test_cut_connections_cost_only_the_bytes_that_were_lost(site: Site) -> None:
    weights = os.urandom(2 * MIB)
    site.put("a", weights)
    site.proxy.rule = lambda r: (
        Fault(cut_after=400_000) if r.path.endswith(WEIGHTS) and r.number < 5 else None
    )
    got = await site.fetch(site.cache(tries=1), "a")
    assert (got.folder / WEIGHTS).read_bytes() == weights
    begins = [
        int(r.range.removeprefix("bytes=").split("-")[0] or 0)
        for r in site.proxy.files()
        if r.path.endswith(WEIGHTS) and r.range
    ]
    assert begins == sorted(set(begins)) and len(begins) == 5


async def test_errors_that_pass_are_retried_up_to_the_number_of_tries(site: Site) -> None:
    site.put("a", b"weights")
    site.proxy.rule = lambda r: (
        Fault(status=500) if r.path.endswith(WEIGHTS) and r.number < 2 else None
    )
    await site.fetch(site.cache(tries=3), "a")
    site.put("b", b"weights")
    site.proxy.rule = lambda r: Fault(status=500) if r.path.endswith(f"b/{WEIGHTS}") else None
    with pytest.raises(StoreUnavailable, match="failed"):
        await site.fetch(site.cache(tries=3), "b")
    assert sum(r.path.endswith(f"b/{WEIGHTS}") for r in site.proxy.files()) == 3


async def test_a_refusal_is_not_retried(site: Site) -> None:
    site.put("a", b"weights")
    site.proxy.rule = lambda r: Fault(status=403) if r.path.endswith(WEIGHTS) else None
    with pytest.raises(StoreUnavailable, match="denied access"):
        await site.fetch(site.cache(tries=3), "a")
    assert sum(r.path.endswith(WEIGHTS) for r in site.proxy.files()) == 1


async def test_a_stuck_store_ends_after_its_tries_and_delays_nobody_else(site: Site) -> None:
    for name in ("stuck", "quick"):
        site.put(name, os.urandom(MIB))
    site.proxy.rule = lambda r: Fault(stuck=True) if r.path.endswith(f"stuck/{WEIGHTS}") else None
    cache, start = site.cache(stall_s=1.0, tries=2), time.monotonic()
    stuck = asyncio.create_task(site.fetch(cache, "stuck"))
    await site.fetch(cache, "quick")
    assert not stuck.done()
    with pytest.raises(StoreUnavailable, match="too slow"):
        await stuck
    assert time.monotonic() - start < 8


async def test_bodies_that_always_end_early_are_given_up(site: Site) -> None:
    site.put("a", os.urandom(MIB))
    site.proxy.rule = lambda r: Fault(cut_after=0) if r.path.endswith(WEIGHTS) else None
    with pytest.raises(StoreUnavailable, match="cut"):
        await site.fetch(site.cache(tries=2), "a")


async def test_a_store_that_trickles_is_given_up_though_it_never_stalls(
    s3: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer_module, "MIN_BYTES_PER_S", MIB)
    s3.put("a", os.urandom(MIB))
    s3.proxy.rule = lambda r: Fault(bytes_per_s=64 * 1024) if r.path.endswith(WEIGHTS) else None
    with pytest.raises(StoreUnavailable, match="too slow"):
        async with asyncio.timeout(8):
            await s3.fetch(s3.cache(stall_s=1.0, tries=1), "a")


async def test_the_next_process_goes_on_where_the_last_one_was_cut(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer_module, "PART_BYTES", MIB)
    weights = os.urandom(6 * MIB)
    site.put("a", weights)
    site.proxy.rule = lambda r: Fault(status=403) if r.range.startswith("bytes=5242880") else None
    with pytest.raises(StoreUnavailable):
        await site.fetch(site.cache(), "a")
    site.proxy.rule = lambda _: None
    before = len(site.proxy.files())
    got = await site.fetch(site.cache(), "a")
    assert (got.folder / WEIGHTS).read_bytes() == weights
    assert 1 <= len(site.proxy.files()) - before < 7


async def test_of_all_processes_of_a_host_one_asks_the_store(site: Site) -> None:
    site.put("a", os.urandom(MIB))
    site.proxy.rule = lambda _: Fault(latency_s=0.1)
    await asyncio.gather(*(site.fetch(site.cache(), "a") for _ in range(6)))
    assert len(site.proxy.files()) == 2


async def test_while_the_store_is_down_what_is_cached_answers_and_the_rest_is_503(
    tmp_path: Path,
) -> None:
    with moto_process() as server:
        place = S3Place(server.url, "down", "p/")
        for name in ("warm", "disk", "cold"):
            place.put(f"{name}/adapter_config.json", CONFIG)
            place.put(f"{name}/{WEIGHTS}", os.urandom(1000))
        config = sim_config(place.url, max_loras=1)
        config["llm_configs"][0]["lora_config"].update(store=place.options, max_download_tries=2)
        async with cluster(config, tmp_path) as c:
            await c.start_worker("w0")
            for name in ("disk", "warm"):
                assert (await c.chat(f"sim:{name}", max_tokens=1))[0] == 200
            server.kill()
            assert [
                (await c.chat(f"sim:{name}", max_tokens=1))[0] for name in ("warm", "disk")
            ] == [200, 200]
            status, body, headers = await c.chat("sim:cold", max_tokens=1)
            assert (
                status == 503
                and body["error"]["code"] == "store_unavailable"
                and int(headers["Retry-After"]) >= 1
            )
            c.workers["w0"].signal(signal.SIGKILL)
            await c.workers["w0"].wait()
            await c.start_worker("w1")
            assert (await c.chat("sim:warm", max_tokens=1))[0] == 200
