"""Shell. What `bench.engine.cold` measures: a gateway and workers on real vLLM (CPU) with adapters
in S3 behind a line of known bandwidth.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import struct
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import yaml

from bench import ROOT
from bench.cluster import start_gateway, start_worker, until, until_listening
from bench.engine.bucket import CREDENTIALS, SIGNED, LocalBucket
from bench.load.client import LoadClient
from bench.load.measure import Meter
from bench.load.reply import LoadReply
from bench.process import Process, free_ports
from shared.stores.transfer import PARTS_PER_ADAPTER
from worker.engine.factory import VLLM_CPU_ENV, VLLM_ENV

MODEL = ROOT / "examples" / "demo" / "model"
BOOT_S = 300.0
RANK = 64
ENGINE: dict[str, Any] = {
    "max_model_len": 512,
    "dtype": "float32",
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 << 20,
    "max_num_seqs": 64,
    "enable_lora": True,
    "max_lora_rank": RANK,
}
PROBE, PROBE_BYTES = "probe", 8 << 20


@dataclass(frozen=True, slots=True)
class ColdCluster:
    """Processes that serve at `url`; each worker's log is `NAME.log` in `folder`."""

    url: str
    folder: Path
    gateway: Process
    workers: tuple[str, ...]

    def events(self, worker: str, event: str) -> list[dict[str, Any]]:
        """A worker's log lines of one kind, in order."""
        found = []
        for line in (self.folder / f"{worker}.log").read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                fields = json.loads(line)
                if isinstance(fields, dict) and fields.get("event") == event:
                    found.append(fields)
        return found

    async def models(self) -> int:
        """How many models and adapters it lists."""
        async with aiohttp.ClientSession() as client, client.get(f"{self.url}/v1/models") as answer:
            return len((await answer.json())["data"])


@contextlib.asynccontextmanager
async def cluster(
    folder: Path, bucket: LocalBucket, workers: Sequence[str] = (), slots: int = 4
) -> AsyncIterator[ColdCluster]:
    """In a folder that is there. Raises NotStarted."""
    (port,) = free_ports(1)
    lora = {
        "dynamic_lora_loading_path": bucket.url,
        "max_num_adapters_per_replica": slots,
        "store": bucket.options,
    }
    loading = {"model_id": "demo", "model_source": str(MODEL)}
    model = {
        "model_loading_config": loading,
        "engine_kwargs": ENGINE | {"max_loras": slots},
        "lora_config": lora,
    }
    gateway_section = {
        "host": "127.0.0.1",
        "port": port,
        "state_dir": str(folder / "state"),
        "catalog_refresh_s": 3600,
    }
    path = folder / "loraplex.yaml"
    path.write_text(yaml.safe_dump({"llm_configs": [model], "gateway": gateway_section}))
    env = (
        CREDENTIALS
        | VLLM_ENV
        | VLLM_CPU_ENV
        | {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    )
    with contextlib.ExitStack() as stack:
        run_dir = folder / "run"
        gateway = start_gateway(path, run_dir, folder / "gateway.log", env=CREDENTIALS)
        stack.callback(gateway.stop)
        control = await until_listening(gateway, run_dir)
        started = []
        for name in workers:
            log = folder / f"{name}.log"
            started.append(start_worker(path, name, [control], log, env=env))
            stack.callback(started[-1].stop)
        made = ColdCluster(f"http://127.0.0.1:{port}", folder, gateway, tuple(workers))
        for name, process in zip(workers, started, strict=True):
            serving = functools.partial(made.events, name, "serving")
            await until(serving, process, BOOT_S, f"worker {name}")
        yield made


async def ask(client: LoadClient, adapter: str, tokens: int) -> tuple[float, LoadReply]:
    """One stream: seconds to its first token, and the answer. Raises ValueError if it failed."""
    body = {
        "model": f"demo:{adapter}",
        "messages": [{"role": "user", "content": "Tell me about the moon."}],
        "stream": True,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    began = time.perf_counter()
    reply = await client.post(
        "/v1/chat/completions", json.dumps(body).encode(), stream=True, meter=Meter()
    )
    if reply.error is not None or reply.first_token_s is None:
        raise ValueError(f"{adapter}: {reply.error} {reply.detail}")
    return reply.first_token_s - began, reply


async def line_bytes_per_s(bucket: LocalBucket, connections: int = PARTS_PER_ADAPTER) -> float:
    """What the line gives to so many plain GETs side by side."""
    async with aiohttp.ClientSession() as client:
        began = time.perf_counter()
        sizes = await asyncio.gather(
            *(
                _size(client, f"{bucket.endpoint}/{bucket.name}/p/{PROBE}")
                for _ in range(connections)
            )
        )
        return sum(sizes) / (time.perf_counter() - began)


async def _size(client: aiohttp.ClientSession, url: str) -> int:
    async with client.get(url, headers=SIGNED) as answer:
        answer.raise_for_status()
        return len(await answer.read())


def adapter_files(name: str, seed: int, rank: int = RANK) -> dict[str, bytes]:
    """A valid adapter of the demo model with weights of its own, on every projection."""
    config = json.loads((MODEL / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    q, kv = (
        config["num_attention_heads"] * config["head_dim"],
        config["num_key_value_heads"] * config["head_dim"],
    )
    shapes = {
        "self_attn.q_proj": (hidden, q),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (q, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    rng, header, data, at = np.random.default_rng(seed), dict[str, Any](), list[bytes](), 0
    for layer in range(config["num_hidden_layers"]):
        for module, (wide_in, wide_out) in shapes.items():
            for half, shape in (("A", (rank, wide_in)), ("B", (wide_out, rank))):
                values = rng.normal(0, 1e-3, shape).astype(np.float32).tobytes()
                key = f"base_model.model.model.layers.{layer}.{module}.lora_{half}.weight"
                header[key] = {
                    "dtype": "F32",
                    "shape": list(shape),
                    "data_offsets": [at, at + len(values)],
                }
                data.append(values)
                at += len(values)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    targets = sorted({module.rpartition(".")[2] for module in shapes})
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": targets,
    }
    return {
        f"{name}/adapter_config.json": json.dumps(about).encode(),
        f"{name}/adapter_model.safetensors": b"".join([struct.pack("<Q", len(head)), head, *data]),
    }
