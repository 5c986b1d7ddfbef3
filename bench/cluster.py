"""Shell. Gateways and workers of a benchmark as processes: started, found, waited for."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import ROOT
from bench.process import LOOK_AGAIN_S, NotStarted, Process, until_answers

GATEWAY_START_S = 60.0


def start_gateway(
    config: Path,
    run_dir: Path,
    log: Path,
    *,
    index: int = 0,
    env: Mapping[str, str] | None = None,
    root: Path = ROOT,
) -> Process:
    """One gateway process of the checkout `root`. It writes its facts into `run_dir` (see
    until_listening).
    """
    facts_of(run_dir, index).unlink(missing_ok=True)
    argv = [sys.executable, "-m", "gateway", str(config)]
    argv += ["--index", str(index), "--run-dir", str(run_dir)]
    return Process(argv, log, env, root)


def start_worker(
    config: Path,
    name: str,
    gateways: Sequence[str],
    log: Path,
    *,
    model: str | None = None,
    env: Mapping[str, str] | None = None,
) -> Process:
    """One worker that knows all of `gateways` (endpoints of their control sockets)."""
    argv = [sys.executable, "-m", "worker", str(config), "--worker", name]
    argv += ["--model", model] if model is not None else []
    argv += [f"--gateway={endpoint}" for endpoint in gateways]
    return Process(argv, log, env, ROOT)


@dataclass(frozen=True, slots=True)
class SimulatedCluster:
    """A gateway, and one worker with a simulated engine."""

    gateway: Process
    port: int


@contextlib.asynccontextmanager
async def simulated_cluster(
    folder: Path, sim: Mapping[str, float], most: int = 1000, **settings: Any
) -> AsyncIterator[SimulatedCluster]:
    """`sim`: the engine's timing; `most`: requests that the worker is given at once; `settings`:
    those of the gateway.
    """
    await asyncio.to_thread(folder.mkdir)
    config, run_dir = folder / "config.yaml", folder / "run"
    model = {
        "model_loading_config": {"model_id": "sim"},
        "llm_engine": "sim",
        "engine_kwargs": {"sim": dict(sim)},
        "deployment_config": {"max_ongoing_requests": most},
    }
    gateway = {"port": 0, "state_dir": str(folder / "state"), "log_level": "warning", **settings}
    config.write_text(json.dumps({"llm_configs": [model], "gateway": gateway}))  # JSON is YAML
    with contextlib.ExitStack() as stack:
        process = start_gateway(config, run_dir, folder / "gateway.log")
        stack.callback(process.stop)
        control = await until_listening(process, run_dir)
        worker = start_worker(config, "w0", [control], folder / "worker.log")
        stack.callback(worker.stop)
        port = int(json.loads(facts_of(run_dir, 0).read_text())["port"])
        await until_answers(port, "/ready", process, GATEWAY_START_S)
        yield SimulatedCluster(process, port)


async def until_listening(gateway: Process, run_dir: Path, index: int = 0) -> str:
    """The endpoint of the gateway's control socket, once it has said it. Raises NotStarted."""
    facts = facts_of(run_dir, index)
    await until(facts.exists, gateway, GATEWAY_START_S, "the gateway")
    return str(json.loads(facts.read_text())["control"])


async def until(
    condition: Callable[[], object], process: Process, timeout_s: float, what: str
) -> None:
    """Raises NotStarted with the process's last words if it ends or takes too long."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if not process.running or time.monotonic() > deadline:
            raise NotStarted(f"{what} did not start: {process.last_words()}")
        await asyncio.sleep(LOOK_AGAIN_S)


def facts_of(run_dir: Path, index: int) -> Path:
    return run_dir / f"g{index}.json"
