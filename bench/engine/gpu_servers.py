"""Shell. What `bench.engine.gpu` measures: a model and adapters that it makes itself, and the two
servers with the same engine arguments.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bench import ROOT
from shared.runtime.parent_death import die_with_parent

DEMO_TOKENIZER = ROOT / "examples" / "demo" / "model"
BOOT_S = 420.0
SAY_EVERY_S = 30.0
END_S = 20.0
COLD_ADAPTERS = 16
"""That no row but `stall` asks for."""
RANK = 16
GIB = 1 << 30
USED = 0.9
"""Of the GPU's memory, by all servers that are up at once."""
BESIDE_KV_GIB = 25
"""Weights (15 GiB), adapters, activations, graphs and the CUDA context of one server; the rest of
its share is KV cache.
"""

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
SHAPES = {
    "8b": LLAMA_8B,
    # For trying this program out where there is no GPU.
    "tiny": {
        **LLAMA_8B,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 4096,
    },
}


def make_model(folder: Path, shape: str) -> Path:
    """config.json and a tokenizer whose ids reach as far as the model's: the demo's, with entries
    that no text encodes to.
    """
    config = SHAPES[shape]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = json.loads((DEMO_TOKENIZER / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    used = set(vocab.values()) | {t["id"] for t in tokenizer["added_tokens"]}
    for i in range(int(config["vocab_size"])):  # type: ignore[call-overload]
        if i not in used:
            vocab[f"\u0120t{i}"] = i
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(
        (DEMO_TOKENIZER / "tokenizer_config.json").read_text()
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_adapters(root: Path, count: int, shape: str, *, cold: int = COLD_ADAPTERS) -> Path:
    """`count` folders, and `cold` ones of other names, with one set of random weights (q, k, v, o;
    rank 16; 26 MiB for 8b), hard-linked.
    """
    import torch
    from safetensors.torch import save_file

    c: dict[str, Any] = SHAPES[shape]
    hidden, kv = c["hidden_size"], c["num_key_value_heads"] * c["head_dim"]
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(c["num_hidden_layers"]):
        for name, out in (("q_proj", hidden), ("k_proj", kv), ("v_proj", kv), ("o_proj", hidden)):
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{key}.lora_A.weight"] = (
                torch.randn(RANK, hidden, generator=generator) * 0.01
            ).bfloat16()
            tensors[f"{key}.lora_B.weight"] = (
                torch.randn(out, RANK, generator=generator) * 0.01
            ).bfloat16()
    root.mkdir(parents=True, exist_ok=True)
    weights = root.parent / "weights.safetensors"
    save_file(tensors, weights)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": modules,
        "bias": "none",
    }
    for name in [*(f"a{i:03d}" for i in range(count)), *(f"c{i:03d}" for i in range(cold))]:
        folder = root / name
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        with contextlib.suppress(FileExistsError):
            os.link(weights, folder / "adapter_model.safetensors")
    return root


def engine_arguments(shape: str, slots: int, *, defaults: bool) -> dict[str, Any]:
    """The same for both servers. `defaults`: only what the test itself needs."""
    wanted: dict[str, Any] = {
        "load_format": "dummy",
        "enable_lora": True,
        "max_loras": slots,
        "max_lora_rank": RANK,
        "max_model_len": 2048,
    }
    if not defaults:
        wanted |= {"max_num_seqs": 512, "enable_prefix_caching": False}
    if shape == "tiny":
        wanted |= {
            "enforce_eager": True,
            "kv_cache_memory_bytes": 64 << 20,
            "max_num_seqs": 64,
            "dtype": "float32",
        }
    return wanted


def shared_gpu(memory_bytes: int, kv_gib: float | None, servers: int = 2) -> dict[str, Any]:
    """What each of `servers` gets if they are up at once on one GPU: the same KV cache, said in
    bytes, since none can measure what is free.

    `memory_bytes` is the GPU's, 0 if there is none. Raises SystemExit if they do not fit.
    """
    if not memory_bytes:
        return {}
    share = USED / servers
    kv = kv_gib or share * memory_bytes / GIB - BESIDE_KV_GIB
    if kv < 1 or servers * (kv + BESIDE_KV_GIB) > memory_bytes / GIB:
        raise SystemExit(
            f"{servers} servers with {max(kv, 0):.0f} GiB of KV cache each do not fit a GPU of "
            f"{memory_bytes / GIB:.0f} GiB"
        )
    return {"gpu_memory_utilization": share, "kv_cache_memory_bytes": int(kv * GIB)}


def gpu() -> tuple[str, int]:
    """Name and bytes of the first GPU; ("", 0) if there is none."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(
            query, capture_output=True, text=True, check=True
        ).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return "", 0
    name, _, mib = listed[0].rpartition(", ") if listed else ("", "", "0")
    return name, int(mib) << 20


# ---- servers -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GpuServer:
    """How one is started. `health` answers 200 once it serves. `naming` is the model name of an
    adapter.
    """

    name: str
    argv: list[str]
    url: str
    health: str
    naming: str
    log: Path
    env: dict[str, str] = field(default_factory=dict)


def loraplex(
    model: Path, adapters: Path, arguments: dict[str, Any], work: Path, gpus: int
) -> GpuServer:
    """One gateway and one worker per GPU."""
    config = {
        "llm_configs": [
            {
                "model_loading_config": {"model_id": "m", "model_source": str(model)},
                "lora_config": {
                    "dynamic_lora_loading_path": str(adapters),
                    "max_num_adapters_per_replica": arguments["max_loras"],
                },
                "engine_kwargs": arguments,
                "deployment_config": {"num_replicas": gpus},
            }
        ],
        "gateway": {
            "port": 8700,
            "state_dir": str(work / "state"),
            "log_level": "info",
            "max_concurrent_requests": 8192,
        },
    }
    path = work / "loraplex.yaml"
    path.write_text(json.dumps(config))
    argv = [sys.executable, "-m", "loraplex", "serve", str(path)]
    return GpuServer(
        "loraplex",
        argv,
        "http://127.0.0.1:8700",
        "/ready",
        "{base}:{adapter}",
        work / "loraplex.log",
    )


def vllm(
    model: Path, adapters: Path, arguments: dict[str, Any], work: Path, gpus: int
) -> GpuServer:
    """vLLM's own OpenAI server on one GPU, all adapters registered at its start."""
    argv = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(model),
        "--served-model-name",
        "m",
        "--port",
        "8701",
    ]
    for key, value in arguments.items():
        flag = f"--{key.replace('_', '-')}"
        argv += (
            [flag]
            if value is True
            else [flag.replace("--", "--no-", 1)]
            if value is False
            else [flag, str(value)]
        )
    argv += ["--max-cpu-loras", str(max(64, arguments["max_loras"])), "--lora-modules"]
    # It loads them all at its start and keeps the last ones: those that must be cold come first.
    argv += [f"{p.name}={p}" for p in sorted(adapters.iterdir(), reverse=True)]
    return GpuServer(
        "vllm", argv, "http://127.0.0.1:8701", "/health", "{adapter}", work / "vllm.log"
    )


SERVERS: dict[str, Callable[[Path, Path, dict[str, Any], Path, int], GpuServer]] = {
    "loraplex": loraplex,
    "vllm": vllm,
}


@contextlib.contextmanager
def up(servers: Sequence[GpuServer], work: Path, *, apart: bool = False) -> Iterator[None]:
    """Boots them all at once, `apart` each on a GPU of its own, and waits until each serves. They
    end with this process, however that ends.

    Raises SystemExit with the end of its log if one does not come up.
    """
    with contextlib.ExitStack() as stack:
        started = time.monotonic()
        waiting = {}
        for n, server in enumerate(servers):
            # Two that compile the same model at once must not write the same files.
            env = (
                {"VLLM_CACHE_ROOT": str(work / f"cache-{server.name}")} if len(servers) > 1 else {}
            )
            env |= {"CUDA_VISIBLE_DEVICES": str(n)} if apart else {}
            env |= server.env
            waiting[server.name] = server, stack.enter_context(_process(server, env))
        say_at = SAY_EVERY_S
        while waiting:
            after = time.monotonic() - started
            for name, (server, process) in [*waiting.items()]:
                if process.poll() is not None or after > BOOT_S:
                    raise SystemExit(
                        f"{name} did not start (status {process.poll()}):\n{_said(server, 3000)}"
                    )
                with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                    urllib.request.urlopen(server.url + server.health, timeout=2)
                    print(f"{name} serves after {after:.0f} s", flush=True)
                    del waiting[name]
            if waiting and after > say_at:
                say_at += SAY_EVERY_S
                for name, (server, _) in waiting.items():
                    last = (_said(server, 1000).strip().splitlines() or [""])[-1]
                    print(f"{name} boots for {after:.0f} s: {last[:160]}", flush=True)
            time.sleep(0.5)
        yield


@contextlib.contextmanager
def _process(server: GpuServer, more: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    env = {
        **os.environ,
        **more,
    }
    last_wish = partial(die_with_parent, signal.SIGTERM, os.getpid())
    with server.log.open("wb") as out:
        process = subprocess.Popen(
            server.argv,
            stdout=out,
            stderr=out,
            env=env,
            cwd=ROOT,
            start_new_session=True,
            preexec_fn=last_wish,
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _said(server: GpuServer, count: int) -> str:
    return server.log.read_text(errors="replace")[-count:]
