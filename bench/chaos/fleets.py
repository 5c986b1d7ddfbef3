"""Shell. What is disturbed: a cluster as `loraplex serve` keeps it alive, or a gateway and workers
with a proxy between them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from bench import ROOT
from bench.chaos.link_proxy import CONTROL, DATA, LinkProxy, link_proxy
from bench.cluster import facts_of, start_gateway, start_worker, until_listening
from bench.gateways.growth import adapter_name, write_adapters
from bench.process import NotStarted, Process, free_ports, tree
from shared.runtime.descendants import command_line
from worker.engine.factory import VLLM_CPU_ENV, VLLM_ENV

DEMO = ROOT / "examples" / "demo"
ADAPTERS = 8
START_S = 240.0
"""For all workers to serve: three real engines boot side by side on few cores."""
LOOK_S = 0.05
CONFIG = "loraplex.yaml"
COUNTED = ("loraplex_worker_load", "loraplex_ongoing_requests", "loraplex_queue_depth")
SIM_TIMES = {
    "ttft_ms": 5,
    "itl_ms": 25,
    "prefill_tokens_per_s": 8000,
    "load_ms": 20,
    "load_ms_per_mb": 1.2,
    "max_num_seqs": 64,
}
"""64 streams make 2,560 tokens/s: about what gateway, workers and clients can do on two cores."""
ENGINE_KILL_S = 2.0
"""Instead of 20 s: an engine that hangs for good is replaced sooner, so that more of them can."""


@dataclass(frozen=True, slots=True)
class ClusterShape:
    """Which engine, and how many of what. `engine`: sim or vllm."""

    engine: str
    workers: int
    gateways: int = 1

    @property
    def adapters(self) -> list[str]:
        if self.engine == "sim":
            return [adapter_name(number) for number in range(ADAPTERS)]
        return sorted(path.name for path in (DEMO / "adapters").iterdir())

    @property
    def base(self) -> str:
        return "sim" if self.engine == "sim" else "demo"

    @property
    def models(self) -> list[str]:
        return [f"{self.base}:{adapter}" for adapter in self.adapters]


@dataclass
class DisturbedFleet:
    """A running cluster. `processes`: those that we started; `proxies` by the worker's name."""

    shape: ClusterShape
    folder: Path
    url: str
    http: aiohttp.ClientSession
    processes: list[Process]
    proxies: dict[str, LinkProxy] = field(default_factory=dict)

    # ---- who is there ----------------------------------------------------------------------------

    def workers(self) -> list[int]:
        """The process ids of the workers that are alive."""
        family = [pid for process in self.processes for pid in tree(process.pid)]
        named = [pid for pid in family if " --worker " in command_line(pid)]
        return named or _children_of_zygote(family)

    def worker(self, name: str) -> int:
        """Of a simulated engine. Raises NotStarted if there is none."""
        for pid in self.workers():
            if f" --worker {name} " in f"{command_line(pid)} ":
                return pid
        raise NotStarted(f"there is no worker {name}")

    def has_worker(self, name: str) -> bool:
        with contextlib.suppress(NotStarted):
            return self.worker(name) > 0
        return False

    def gateways(self) -> list[int]:
        family = [pid for process in self.processes for pid in tree(process.pid)]
        return [pid for pid in family if " --index " in command_line(pid)]

    def engine_core(self, worker: int) -> int | None:
        """The process of vLLM's engine below a worker, once there is one."""
        below = [pid for pid in tree(worker)[1:] if "EngineCore" in command_line(pid)]
        return below[0] if below else None

    def names(self) -> list[str]:
        return [f"w{number}" for number in range(self.shape.workers)]

    def configure(self, **settings: object) -> None:
        """Writes the config file anew, with other settings of the gateway."""
        path = self.folder / CONFIG
        config = yaml.safe_load(path.read_text())
        config["gateway"] |= settings
        aside = path.with_suffix(".new")
        aside.write_text(yaml.safe_dump(config))
        aside.rename(path)

    # ---- what it says ----------------------------------------------------------------------------

    async def serving(self) -> int:
        """How many workers get requests. 0: the gateway does not answer."""
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, KeyError, ValueError):
            async with self.http.get(self.url + "/ready") as answer:
                return int((await answer.json())["workers"][self.shape.base])
        return 0

    async def gateways_up(self) -> int:
        """How many gateway processes answer each other. 0: none answers us."""
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            return int(await self.metric("loraplex_gateway_process_up"))
        return 0

    async def until_serving(self, workers: int) -> None:
        """Raises NotStarted if they do not come (back)."""
        try:
            async with asyncio.timeout(START_S):
                while await self.serving() < workers:
                    for process in self.processes:
                        if not process.running:
                            raise NotStarted(f"a process ended: {process.last_words()}")
                    await asyncio.sleep(LOOK_S)
        except TimeoutError as exc:
            said = "\n".join(process.last_words() for process in self.processes)
            raise NotStarted(f"not {workers} workers serve within {START_S:g} s: {said}") from exc

    async def metric(self, name: str) -> float:
        """The sum of all series of this name."""
        async with self.http.get(self.url + "/metrics") as answer:
            lines = (await answer.text()).splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.split("{")[0] == name)

    async def until_quiet(self, limit_s: float) -> str:
        """What the gateway still counts after all answers have ended. Empty: nothing."""
        left: dict[str, float] = {}
        for _ in range(int(limit_s / LOOK_S)):
            left = {name: n for name in COUNTED if (n := await self.metric(name))}
            if not left:
                return ""
            await asyncio.sleep(LOOK_S)
        return f"left after the last answer: {left}"


@contextlib.asynccontextmanager
async def served(
    shape: ClusterShape, folder: Path, gateway: Mapping[str, object]
) -> AsyncIterator[DisturbedFleet]:
    """`loraplex serve`, once all workers serve. Raises NotStarted."""
    (port,) = free_ports(1)
    config = _write_config(shape, folder, port, gateway)
    argv = [str(Path(sys.executable).parent / "loraplex"), "serve", str(config)]
    serve = Process(argv, folder / "serve.log", _environment(folder), ROOT)
    async with _fleet(shape, folder, port, [serve]) as fleet:
        await fleet.until_serving(shape.workers)
        yield fleet


@contextlib.asynccontextmanager
async def linked(
    shape: ClusterShape, folder: Path, settings: Mapping[str, object]
) -> AsyncIterator[DisturbedFleet]:
    """A gateway and workers that join it over TCP, each through a proxy. Raises NotStarted."""
    (port,) = free_ports(1)
    link = {
        "control": "tcp://127.0.0.1:0",
        "data": "tcp://127.0.0.1:0",
        "peer": "off",
        "insecure": True,  # the proxy reads which port is the data socket's
    }
    config = _write_config(shape, folder, port, {"link": link, **settings})
    env = _environment(folder)
    gateway = start_gateway(config, folder, folder / "gateway.log", env=env)
    processes = [gateway]
    async with _fleet(shape, folder, port, processes) as fleet:
        await until_listening(gateway, folder)
        facts = json.loads(facts_of(folder, 0).read_text())
        ports = [int(facts[kind].rpartition(":")[2]) for kind in (CONTROL, DATA)]
        async with contextlib.AsyncExitStack() as stack:
            for name in fleet.names():
                proxy = await stack.enter_async_context(link_proxy(*ports))
                fleet.proxies[name] = proxy
                log = folder / f"{name}.log"
                processes.append(start_worker(config, name, [proxy.control], log, env=env))
            await fleet.until_serving(shape.workers)
            yield fleet


@contextlib.asynccontextmanager
async def _fleet(
    shape: ClusterShape, folder: Path, port: int, processes: list[Process]
) -> AsyncIterator[DisturbedFleet]:
    timeout = aiohttp.ClientTimeout(total=5)
    # a connection of its own for each look: a gateway that was told to end keeps none
    connector = aiohttp.TCPConnector(force_close=True)
    try:
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as http:
            fleet = DisturbedFleet(shape, folder, f"http://127.0.0.1:{port}", http, processes)
            yield fleet
    finally:
        for process in processes:
            for pid in tree(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            process.stop()


def _write_config(
    shape: ClusterShape, folder: Path, port: int, settings: Mapping[str, object]
) -> Path:
    lora: dict[str, Any] = {"max_num_adapters_per_replica": ADAPTERS}
    if shape.engine == "sim":
        store = folder / "adapters"
        store.mkdir()
        write_adapters(store, ADAPTERS)
        model: dict[str, Any] = {
            "model_loading_config": {"model_id": "sim"},
            "llm_engine": "sim",
            "engine_kwargs": {"max_loras": ADAPTERS, "sim": SIM_TIMES},
        }
    else:
        store = DEMO / "adapters"
        model = {
            "model_loading_config": {"model_id": "demo", "model_source": str(DEMO / "model")},
            "engine_kwargs": {
                "enable_lora": True,
                "max_loras": ADAPTERS,
                "max_lora_rank": 16,
                "max_model_len": 1024,
                "dtype": "float32",
                "enforce_eager": True,
                "kv_cache_memory_bytes": 256 << 20,
            },
        }
    model["lora_config"] = lora | {"dynamic_lora_loading_path": str(store)}
    model["deployment_config"] = {"num_replicas": shape.workers}
    gateway = {
        "host": "127.0.0.1",
        "port": port,
        "processes": shape.gateways,
        "state_dir": str(folder / "state"),
        "engine_kill_s": ENGINE_KILL_S,
        **settings,
    }
    path = folder / CONFIG
    path.write_text(yaml.safe_dump({"llm_configs": [model], "gateway": gateway}))
    return path


def _environment(folder: Path) -> dict[str, str]:
    (folder / "tmp").mkdir()
    ours = {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "TMPDIR": str(folder / "tmp")}
    return dict(VLLM_ENV | VLLM_CPU_ENV | ours)


def _children_of_zygote(family: list[int]) -> list[int]:
    """Forked workers have the command line of the process that forked them."""
    zygote = [pid for pid in family if "worker.zygote" in command_line(pid)]
    return [pid for pid in zygote if parent_of(pid) in zygote]


def parent_of(pid: int) -> int:
    """0 if it has ended."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0
