"""Shell. Gateways and workers of a benchmark as processes: started, found, waited for."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench import ROOT
from bench.process import LOOK_AGAIN_S, NotStarted, Process

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
    """One gateway process of the checkout `root`; `run_dir` gets its facts (`until_listening`)."""
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
