"""Shell. Real clusters for tests: a gateway process and worker processes, over real sockets, killed
with real signals.

vLLM workers are forked from one zygote per test process, which imports vLLM once. All tests of a
process run on one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import yaml

from shared.runtime.children import Zygote
from tests.forks import fork

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "examples" / "demo"
START_S = 240.0  # generous, because two engines may boot on two busy cores
STOP_S = 90.0


@dataclass
class Proc:
    """A process that a test started: its pid, how to wait for it, and what it has written to
    stderr.
    """

    name: str
    pid: int
    log: Path
    waiter: Any

    async def wait(self, timeout_s: float = STOP_S) -> int:
        async with asyncio.timeout(timeout_s):
            return int(await self.waiter.wait())

    def signal(self, sig: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, sig)

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


@dataclass
class Cluster:
    """A gateway and its workers. `url` is the base of the HTTP API."""

    config: dict[str, Any]
    folder: Path
    zygote: Zygote | None
    http: aiohttp.ClientSession
    url: str = ""
    control: str = ""
    gateway: Proc | None = None
    workers: dict[str, Proc] = field(default_factory=dict)
    index: int = 0
    measured: bool = False
    """Whether the loops of its processes are measured, and can be held: see tests/loop_meter.py."""

    def longest_turn_ms(self, process: str) -> float:
        return float(self._turns_of(process).read_text())

    async def start_gateway(self) -> None:
        name = f"g{self.index}"
        facts = self.folder / "run" / f"{name}.json"
        facts.unlink(missing_ok=True)
        argv = [str(self._config_file()), "--run-dir", str(self.folder / "run")]
        argv += ["--index", str(self.index)]
        if self.measured:
            self.gateway = await self._start(name, [*self._command("gateway", name), *argv])
        else:
            self.gateway = self._fork("gateway", name, argv)
        async with asyncio.timeout(START_S):
            while not facts.exists():
                if self.gateway.waiter.returncode is not None:
                    raise AssertionError(f"the gateway ended:\n{self.gateway.output()}")
                await asyncio.sleep(0.02)
        found = json.loads(facts.read_text())
        self.url, self.control = f"http://127.0.0.1:{found['port']}", found["control"]

    async def start_worker(
        self,
        name: str,
        model: str | None = None,
        *,
        serving: bool = True,
        state_dir: Path | None = None,
        env: Mapping[str, str] | None = None,
        gateways: Sequence[str] = (),
    ) -> Proc:
        """`state_dir` of its own stands for a host of its own; `gateways`: control endpoints
        besides this cluster's.
        """
        config = self._config_file() if state_dir is None else self._config_of_host(state_dir)
        argv = [str(config), "--worker", name, *(["--model", model] if model else [])]
        argv += [part for endpoint in (self.control, *gateways) for part in ("--gateway", endpoint)]
        if self.zygote is not None:
            child = await self.zygote.start(argv, env or {})
            proc = Proc(name, child.pid, self.folder / f"{name}.log", child)
        elif not self.measured and not env and self._is_simulated():
            proc = self._fork("worker", name, argv)
        else:
            proc = await self._start(name, [*self._command("worker", name), *argv], env)
        self.workers[name] = proc
        if serving:
            await self.until_serving(name)
        return proc

    async def until_serving(self, name: str) -> None:
        async with asyncio.timeout(START_S):
            while f'worker="{name}"' not in "".join(
                line for line in (await self.metrics()).splitlines() if 'state="serving"' in line
            ):
                if self.workers[name].waiter is not None and await _ended(self.workers[name]):
                    raise AssertionError(f"worker {name} ended:\n{self.workers[name].output()}")
                await asyncio.sleep(0.05)
        async with asyncio.timeout(START_S):
            while (await self.get("/ready"))[0] != 200:
                await asyncio.sleep(0.02)

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.http.get(self.url + path) as answer:
            body = await answer.read()
            return answer.status, msgspec.json.decode(
                body
            ) if "json" in answer.content_type else body.decode()

    async def post(
        self, path: str, body: Mapping[str, Any] | bytes, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any, Mapping[str, str]]:
        data = body if isinstance(body, bytes) else msgspec.json.encode(body)
        given = {"Content-Type": "application/json", **(headers or {})}
        async with self.http.post(self.url + path, data=data, headers=given) as answer:
            raw = await answer.read()
            return (
                answer.status,
                msgspec.json.decode(raw) if "json" in answer.content_type else raw.decode(),
                answer.headers,
            )

    async def chat(
        self, model: str, prompt: str = "hello", **more: Any
    ) -> tuple[int, Any, Mapping[str, str]]:
        return await self.post("/v1/chat/completions", chat_body(model, prompt, **more))

    async def put(self, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        data, json = msgspec.json.encode(body), {"Content-Type": "application/json"}
        async with self.http.put(self.url + path, data=data, headers=json) as answer:
            return answer.status, msgspec.json.decode(await answer.read())

    async def delete(self, path: str) -> tuple[int, Any]:
        json = {"Content-Type": "application/json"}
        async with self.http.delete(self.url + path, headers=json) as answer:
            return answer.status, msgspec.json.decode(await answer.read())

    async def text(self, model: str, prompt: str = "hello", **more: Any) -> str:
        """The text of an answer that succeeded."""
        status, body, _ = await self.chat(
            model, prompt, **({"temperature": 0, "max_tokens": 64} | more)
        )
        assert status == 200, body
        return str(body["choices"][0]["message"]["content"])

    async def metrics(self) -> str:
        return str((await self.get("/metrics"))[1])

    async def metric(self, name: str, **labels: str) -> float:
        """The sum of the series with this name and these labels."""
        total = 0.0
        for line in (await self.metrics()).splitlines():
            series, _, value = line.rpartition(" ")
            if series.split("{")[0] == name and all(
                f'{k}="{v}"' in series for k, v in labels.items()
            ):
                total += float(value)
        return total

    async def stop(self) -> None:
        for proc in [*([self.gateway] if self.gateway else []), *self.workers.values()]:
            proc.signal(signal.SIGKILL)
            await proc.wait()

    def _command(self, package: str, process: str) -> list[str]:
        meter = ["tests.loop_meter", str(self._turns_of(process))] if self.measured else []
        return [sys.executable, "-m", *meter, package]

    def _is_simulated(self) -> bool:
        return all(model.get("llm_engine") == "sim" for model in self.config["llm_configs"])

    def _fork(self, package: str, name: str, argv: Sequence[str]) -> Proc:
        log = self.folder / f"{name}.log"
        with log.open("ab") as output:
            log_fd = output.fileno()
            process = fork(f"{package}.__main__", argv, os.environ, log_fd, log_fd)
        return Proc(name, process.pid, log, process)

    def _turns_of(self, process: str) -> Path:
        return self.folder / f"{process}.longest-turn"

    def _config_file(self) -> Path:
        path = self.folder / "config.yaml"
        if not path.exists():
            path.write_text(yaml.safe_dump(self.config))
        return path

    def _config_of_host(self, state_dir: Path) -> Path:
        state_dir.mkdir(parents=True, exist_ok=True)
        path = state_dir / "config.yaml"
        path.write_text(
            yaml.safe_dump(
                self.config | {"gateway": self.config["gateway"] | {"state_dir": str(state_dir)}}
            )
        )
        return path

    async def _start(
        self, name: str, argv: Sequence[str], env: Mapping[str, str] | None = None
    ) -> Proc:
        log = self.folder / f"{name}.log"
        with log.open("ab") as stderr:
            process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                cwd=ROOT,
                env={**os.environ, **(env or {})},
            )
        return Proc(name, process.pid, log, process)


async def _ended(proc: Proc) -> bool:
    try:
        async with asyncio.timeout(0):
            await proc.waiter.wait()
    except TimeoutError:
        return False
    return True


def chat_body(model: str, prompt: str = "hello", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": prompt}], **more}


def sim_config(
    adapters: Path | str,
    *,
    max_loras: int = 4,
    sim: Mapping[str, float] | None = None,
    **gateway: Any,
) -> dict[str, Any]:
    """One simulated model `sim`. It is fast unless the arguments say otherwise."""
    timing = {
        "ttft_ms": 1,
        "itl_ms": 2,
        "prefill_tokens_per_s": 100_000,
        "load_ms": 5,
        "load_ms_per_mb": 0,
        **(sim or {}),
    }
    return {
        "llm_configs": [
            {
                "model_loading_config": {"model_id": "sim"},
                "llm_engine": "sim",
                "engine_kwargs": {"max_loras": max_loras, "sim": timing},
                "lora_config": {
                    "dynamic_lora_loading_path": str(adapters),
                    "max_num_adapters_per_replica": max_loras,
                },
            }
        ],
        "gateway": {"port": 0, "lease_s": 2.0, "adapter_settle_s": 0, **gateway},
    }


def demo_config(
    *,
    max_loras: int = 2,
    adapters: Path | str = DEMO / "adapters",
    engine: Mapping[str, Any] | None = None,
    **gateway: Any,
) -> dict[str, Any]:
    """The demo model on real vLLM."""
    kwargs = {
        "enable_lora": True,
        "max_loras": max_loras,
        "max_lora_rank": 16,
        "enforce_eager": True,
        "dtype": "float32",
        "max_model_len": 1024,
        "kv_cache_memory_bytes": 64 << 20,
        **(engine or {}),
    }
    return {
        "llm_configs": [
            {
                "model_loading_config": {"model_id": "demo", "model_source": str(DEMO / "model")},
                "engine_kwargs": kwargs,
                "lora_config": {
                    "dynamic_lora_loading_path": str(adapters),
                    "max_num_adapters_per_replica": max_loras,
                },
            }
        ],
        "gateway": {"port": 0, "lease_s": 3.0, "adapter_settle_s": 0, **gateway},
    }


def make_adapter(root: Path, name: str, rank: int = 8, size_bytes: int = 1000) -> Path:
    """A folder that looks like an adapter. It serves the simulated engine, which reads only the
    config.
    """
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": ["q_proj"]})
    )
    (folder / "adapter_model.safetensors").write_bytes(os.urandom(16) + bytes(size_bytes))
    return folder


def replace_file(path: Path, data: bytes) -> None:
    """Replaces a file as a careful uploader does: written aside, then renamed."""
    aside = path.with_name(f".{path.name}.new")
    aside.write_bytes(data)
    aside.rename(path)


@contextlib.asynccontextmanager
async def second_gateway(c: Cluster) -> AsyncIterator[Cluster]:
    """Another gateway process with the same config and state. Workers join it too if they are told
    its `control` endpoint.
    """
    other = Cluster(c.config, c.folder, None, c.http, index=1)
    try:
        await other.start_gateway()
        yield other
    finally:
        await other.stop()


@contextlib.asynccontextmanager
async def cluster(
    config: dict[str, Any],
    folder: Path,
    zygote: Zygote | None = None,
    *,
    measured: bool = False,
) -> AsyncIterator[Cluster]:
    """A running gateway in `folder`. `start_worker` starts workers. Everything is killed at the
    end.
    """
    config["gateway"].setdefault("state_dir", str(folder / "state"))
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as http:
        c = Cluster(config, folder, zygote, http, measured=measured)
        try:
            await c.start_gateway()
            yield c
        finally:
            await c.stop()
