"""Shell. The processes of a run: workers that live through it, gateways that come and go, and load
generators.

A worker is told at its start of all gateways that it will ever know, one set per size of fleet. A
gateway of size 2 has the first two workers, whatever else runs. To change the policy, only the
gateway is started again. Its workers find it at the same sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from bench import ROOT
from bench.cluster import start_gateway, start_worker, until, until_listening
from bench.fleet.figures import Seen, together
from bench.fleet.served import MODEL, PAIR_ENV, Served
from bench.process import (
    LOOK_AGAIN_S,
    NotStarted,
    Process,
    ProcessUsage,
    free_ports,
    spent_s,
    tree,
)
from shared.runtime.process import PARENT_ENV

REJOIN_S = 30.0
STOP_GENERATORS_S = 150.0
ORPHANS_S = 10.0  # children of a killed worker may take so long to notice
MIXED = 0
"""The size that stands for the mixed fleet."""
WORKER_LOG, GATEWAY_LOG = "worker-{}.log", "gateway-{}.log"


@dataclass
class FleetGateway:
    """A running gateway of `processes` processes at `url`."""

    url: str
    processes: Sequence[Process]
    log: Path

    def usage(self) -> list[ProcessUsage]:
        return [process.usage() for process in self.processes]


def cpu_s(before: Sequence[ProcessUsage], after: Sequence[ProcessUsage]) -> float:
    return sum(spent_s(b, a) for b, a in zip(before, after, strict=True))


@dataclass
class FleetCluster:
    """`sizes` are those of the fleets; `boot_s` bounds a worker's start. `share_gpu`: all workers
    are on the first GPU.
    """

    served: Served
    work: Path
    sizes: Sequence[int]
    mixed_singles: int
    gateway_processes: int
    boot_s: float
    gpus: int
    share_gpu: bool = False
    workers: dict[str, Process] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    port: int = field(default_factory=lambda: free_ports(1)[0])

    def __post_init__(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        for old in self.work.glob("*.log"):
            old.unlink()
        # short: a socket's path holds at most 107 bytes
        self._sockets = Path(tempfile.mkdtemp(prefix="fleet-"))

    # ---- workers ---------------------------------------------------------------------------------

    @property
    def pair(self) -> str:
        """The worker with tensor parallel 2: its number is that of its first GPU, the first that
        the single ones of the mixed fleet leave.
        """
        return f"w{self.mixed_singles}"

    def start_worker(self, name: str, model: str = MODEL) -> Process:
        number = int(name[1:])
        known = [size for size in self.sizes if number < size] if model == MODEL else []
        known += [MIXED] if model != MODEL or number < self.mixed_singles else []
        endpoints = [
            f"ipc://{self._run_dir(size)}/g{i}.control"
            for size in known
            for i in range(self.gateway_processes)
        ]
        self.models[name] = model
        self.workers[name] = start_worker(
            self._config("worker", 0),
            name,
            endpoints,
            self.work / WORKER_LOG.format(name),
            model=model,
            env=self._worker_env(number, model),
        )
        return self.workers[name]

    async def until_serving(self, name: str, times: int = 1) -> None:
        """Until the worker has said so the `times`-th time in its log. Raises NotStarted."""
        process = self.workers[name]
        served = lambda: self.times_served(name) >= times  # noqa: E731
        await until(served, process, self.boot_s, f"worker {name}")

    def times_served(self, name: str) -> int:
        return sum(1 for _ in self._events("worker", name, "serving"))

    def kill(self, name: str) -> None:
        """SIGKILL to the worker alone: what becomes of its engine is the worker's own business."""
        os.kill(self.workers[name].pid, signal.SIGKILL)

    async def bury(self, name: str, family: Sequence[int]) -> int:
        """Waits until the killed worker's children are gone. Returns how many of them had to be
        killed.
        """
        deadline = time.monotonic() + ORPHANS_S
        self.workers[name].stop()
        # they are no children of ours: nothing tells of their end
        while time.monotonic() < deadline and any(map(_alive, family)):  # noqa: ASYNC110
            await asyncio.sleep(LOOK_AGAIN_S)
        left = [pid for pid in family if _alive(pid)]
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(left)

    def family(self, name: str) -> list[int]:
        return tree(self.workers[name].pid)

    def stop(self) -> None:
        for process in self.workers.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)  # all at once; stop() waits for each
        for process in self.workers.values():
            process.stop()
        shutil.rmtree(self._sockets, ignore_errors=True)

    def _worker_env(self, number: int, model: str) -> dict[str, str]:
        env = {PARENT_ENV: str(os.getpid())}
        if self.served.engine == "vllm" and self.gpus:
            devices = [number] if model == MODEL else [number, number + 1]
            if self.share_gpu:
                devices = [0]
                # two that compile the same model at once must not write the same files
                env |= {"VLLM_CACHE_ROOT": str(self.work / f"cache-{number}")}
            env |= {
                "CUDA_VISIBLE_DEVICES": ",".join(map(str, devices)),
                "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            }
        elif self.served.engine == "vllm":
            env |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        return env if model == MODEL else env | PAIR_ENV

    # ---- gateways --------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def gateway(self, size: int, policy: str) -> AsyncIterator[FleetGateway]:
        """With the first `size` workers (MIXED: those of the mixed fleet), all of which have
        joined. Raises NotStarted.
        """
        run_dir = self._run_dir(size)
        config = self._config(policy, self.port)
        log = self.work / GATEWAY_LOG.format(f"{size}-{policy}")
        processes: list[Process] = []
        with contextlib.ExitStack() as stack:
            for index in range(self.gateway_processes):
                env = {PARENT_ENV: str(os.getpid())}
                processes.append(start_gateway(config, run_dir, log, index=index, env=env))
                stack.callback(processes[-1].stop)
                await until_listening(processes[-1], run_dir, index)
            wanted = size or self.mixed_singles + 1
            await self._until_joined(processes, wanted)
            yield FleetGateway(f"http://127.0.0.1:{self.port}", processes, log)

    async def _until_joined(self, processes: Sequence[Process], wanted: int) -> None:
        """All processes share the port: each new connection may meet another one, so it takes
        several good answers in a row.
        """
        deadline, good = time.monotonic() + REJOIN_S, 0
        while good < (1 if len(processes) == 1 else 6 * len(processes)):
            good = good + 1 if await _serving(self.port) >= wanted else 0
            if time.monotonic() > deadline:
                raise NotStarted(
                    f"the gateway has {await _serving(self.port)} of {wanted} workers: "
                    f"{processes[0].last_words()}"
                )
            if not good:
                await asyncio.sleep(LOOK_AGAIN_S)

    def _run_dir(self, size: int) -> Path:
        folder = self._sockets / str(size)
        folder.mkdir(exist_ok=True, mode=0o700)
        return folder

    def _config(self, name: str, port: int) -> Path:
        gateway = {
            "port": port,
            "processes": self.gateway_processes,
            "state_dir": str(self.work / "state"),
            "max_concurrent_requests": 65_536,
            # an overloaded policy shows as a late answer, not as a refused one
            "max_queued_requests": 65_536,
            "queue_timeout_s": 120.0,
            **({} if name == "worker" else {"routing_policy": name}),
        }
        path = self.work / f"{name}.yaml"
        path.write_text(self.served.config(gateway))
        return path

    # ---- what the logs say -----------------------------------------------------------------------

    def loads(self, since: float, until: float) -> list[Mapping[str, Any]]:
        """Adapter loads of all workers between two moments of the wall clock."""
        return [
            e
            for name in self.workers
            for e in self._events("worker", name, "adapter loaded")
            if since <= e["ts"] < until
        ]

    def lost(self, gateway: FleetGateway, worker: str) -> Mapping[str, Any] | None:
        """What the gateway said as it lost the worker: `ts`, `requests`."""
        lines = [e for e in _lines(gateway.log, "worker lost") if e["worker"] == worker]
        return lines[-1] if lines else None

    def _events(self, kind: str, name: str, event: str) -> Iterator[Mapping[str, Any]]:
        return _lines(self.work / f"{kind}-{name}.log", event)


def _lines(log: Path, event: str) -> Iterator[Mapping[str, Any]]:
    if not log.exists():
        return
    mark = f'"{event}"'
    with log.open(errors="replace") as lines:
        for line in lines:
            if mark in line:
                # a line that is being written, or of somebody else
                with contextlib.suppress(ValueError):
                    made = json.loads(line)
                    if made.get("event") == event:
                        yield made


def _alive(pid: int) -> bool:
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


async def _serving(port: int) -> int:
    """Workers that the gateway process which answers can route to."""
    with contextlib.suppress(OSError, TimeoutError, ValueError):
        async with asyncio.timeout(2.0):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(b"GET /ready HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
                body = (await reader.read()).partition(b"\r\n\r\n")[2]
                return sum(json.loads(body)["workers"].values())
            finally:
                writer.close()
    return 0


# ---- load ----------------------------------------------------------------------------------------


@dataclass
class FleetLoad:
    """Generators that run. `seen()` and `each()` wait for them. After `end()` they send no more."""

    children: Sequence[asyncio.subprocess.Process]
    files: Sequence[Path]

    def end(self) -> None:
        for child in self.children:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signal.SIGINT)

    async def each(self) -> list[Seen]:
        """Of every generator. Raises NotStarted if one failed."""
        for child in self.children:
            _, words = await child.communicate()
            if child.returncode:
                raise NotStarted(
                    f"a load generator failed: {words.decode(errors='replace')[-600:]}"
                )
        return [msgspec.msgpack.decode(file.read_bytes(), type=Seen) for file in self.files]

    async def seen(self) -> Seen:
        """Of all together."""
        return together(await self.each())


@contextlib.asynccontextmanager
async def load(work: Path, flags: Sequence[Sequence[str]]) -> AsyncIterator[FleetLoad]:
    """One generator for each list of flags of bench.load."""
    files = [work / f"seen-{index}" for index in range(len(flags))]
    children = []
    try:
        for file, mine in zip(files, flags, strict=True):
            file.unlink(missing_ok=True)
            argv = [sys.executable, "-m", "bench.fleet.generator", str(file), *mine, "--quiet"]
            env = {**os.environ, PARENT_ENV: str(os.getpid())}
            child = await asyncio.create_subprocess_exec(
                *argv,
                cwd=ROOT,
                env=env,
                stdin=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
            children.append(child)
        yield FleetLoad(children, files)
    finally:
        for child in children:
            if child.returncode is None:
                child.kill()
                await child.wait()
