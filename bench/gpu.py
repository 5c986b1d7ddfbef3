"""Shell. `python -m bench.gpu`: Loraplex beside vLLM's own server on GPUs, with a model in the shape of Llama-3.1-8B and dummy weights.

Self-contained: it writes the model's config, a tokenizer and random rank-16 adapters, boots one server after the other with the same engine
arguments, loads each with `bench.load`, and prints a table last. Every measured row is printed and kept in `--out` at once, so a run that was cut
off goes on where it stopped; the rows that matter most come first, and none begins after `--budget-s`.

    python -m bench.gpu --out results --rows zipf,stall,adapters        the rows with adapters
    python -m bench.gpu --out results --rows base                       the rest; both together measure everything
    python -m bench.gpu --out results --defaults --rows adapters        each server's own defaults, but for slots and rank
    python -m bench.gpu --servers loraplex --loraplex-arg specialize_active_lora=true --label specialized
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from bench.load import measure, raise_open_files_limit
from bench.options import parse
from bench.report import document
from bench.stall import stall

ROOT = Path(__file__).resolve().parent.parent
DEMO_TOKENIZER = ROOT / "examples" / "demo" / "model"
BOOT_S = 420.0
KINDS = ("zipf", "stall", "adapters", "base")
COLD_ADAPTERS = 16
"""That no row but `stall` asks for."""
RANK = 16

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


@dataclass(frozen=True, slots=True)
class Row:
    """One load. `adapters` 0 is the base model; `mix` is that of bench.load."""

    name: str
    adapters: int
    mix: str
    streams: int
    requests: int


def rows(args: argparse.Namespace) -> list[Row]:
    """What `--rows` asks for, the most important first."""
    slots, adapters, per_stream = args.slots, args.adapters, args.per_stream
    made: dict[str, list[Row]] = {kind: [] for kind in KINDS}
    made["zipf"] = [Row(f"{adapters} adapters over {slots} slots, zipf x128", adapters, "zipf", 128, 128 * per_stream)]
    made["stall"] = [Row("stall per cold load", 0, "stall", 32, 0)]
    for n in args.levels:
        count = max(8, n * per_stream)
        if n in args.adapter_levels:
            made["adapters"].append(Row(f"{slots} adapters x{n}", slots, "uniform", n, count))
        made["base"].append(Row(f"base x{n}", 0, "base", n, count))
    return [row for kind in KINDS if kind in args.rows for row in made[kind]]


# ---- what is served -------------------------------------------------------------------------------------------------------------------------


def make_model(folder: Path, shape: str) -> Path:
    """config.json and a tokenizer whose ids reach as far as the model's: the demo's, with entries that no text encodes to."""
    config = SHAPES[shape]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = json.loads((DEMO_TOKENIZER / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    used = set(vocab.values()) | {t["id"] for t in tokenizer["added_tokens"]}
    for i in range(int(config["vocab_size"])):  # type: ignore[call-overload]
        if i not in used:
            vocab[f"\u0120t{i}"] = i
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text((DEMO_TOKENIZER / "tokenizer_config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_adapters(root: Path, count: int, shape: str, *, cold: int = COLD_ADAPTERS) -> Path:
    """`count` folders, and `cold` ones of other names, with one set of random weights (q, k, v, o; rank 16; 26 MiB for 8b), hard-linked."""
    import torch
    from safetensors.torch import save_file

    c: dict[str, Any] = SHAPES[shape]
    hidden, kv = c["hidden_size"], c["num_key_value_heads"] * c["head_dim"]
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(c["num_hidden_layers"]):
        for name, out in (("q_proj", hidden), ("k_proj", kv), ("v_proj", kv), ("o_proj", hidden)):
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{key}.lora_A.weight"] = (torch.randn(RANK, hidden, generator=generator) * 0.01).bfloat16()
            tensors[f"{key}.lora_B.weight"] = (torch.randn(out, RANK, generator=generator) * 0.01).bfloat16()
    root.mkdir(parents=True, exist_ok=True)
    weights = root.parent / "weights.safetensors"
    save_file(tensors, weights)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "target_modules": modules, "bias": "none"}
    for name in [*(f"a{i:03d}" for i in range(count)), *(f"c{i:03d}" for i in range(cold))]:
        folder = root / name
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        with contextlib.suppress(FileExistsError):
            os.link(weights, folder / "adapter_model.safetensors")
    return root


def engine_arguments(shape: str, slots: int, *, defaults: bool) -> dict[str, Any]:
    """The same for both servers. `defaults`: only what the test itself needs."""
    wanted: dict[str, Any] = {"load_format": "dummy", "enable_lora": True, "max_loras": slots, "max_lora_rank": RANK, "max_model_len": 2048}
    if not defaults:
        wanted |= {"max_num_seqs": 512, "enable_prefix_caching": False}
    if shape == "tiny":
        wanted |= {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 64, "dtype": "float32"}
    return wanted


# ---- servers ----------------------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def loraplex(model: Path, adapters: Path, arguments: dict[str, Any], work: Path, gpus: int) -> Iterator[tuple[str, str]]:
    """One gateway and one worker per GPU. Yields its URL and how an adapter is named."""
    config = {
        "llm_configs": [
            {
                "model_loading_config": {"model_id": "m", "model_source": str(model)},
                "lora_config": {"dynamic_lora_loading_path": str(adapters), "max_num_adapters_per_replica": arguments["max_loras"]},
                "engine_kwargs": arguments,
                "deployment_config": {"num_replicas": gpus},
            }
        ],
        "gateway": {"port": 8700, "state_dir": str(work / "state"), "log_level": "info", "max_concurrent_requests": 8192},
    }
    path = work / "loraplex.yaml"
    path.write_text(json.dumps(config))
    argv = [sys.executable, "-m", "gateway.cli", "serve", str(path)]
    with server(argv, "http://127.0.0.1:8700", "/ready", work / "loraplex.log"):
        yield "http://127.0.0.1:8700", "{base}:{adapter}"


@contextlib.contextmanager
def vllm(model: Path, adapters: Path, arguments: dict[str, Any], work: Path, gpus: int) -> Iterator[tuple[str, str]]:
    """vLLM's own OpenAI server on one GPU, all adapters registered at its start."""
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "m", "--port", "8701"]
    for key, value in arguments.items():
        flag = f"--{key.replace('_', '-')}"
        argv += [flag] if value is True else [flag.replace("--", "--no-", 1)] if value is False else [flag, str(value)]
    argv += ["--max-cpu-loras", str(max(64, arguments["max_loras"])), "--lora-modules"]
    # It loads them all at its start and keeps the last ones: those that must be cold come first.
    argv += [f"{p.name}={p}" for p in sorted(adapters.iterdir(), reverse=True)]
    with server(argv, "http://127.0.0.1:8701", "/health", work / "vllm.log"):
        yield "http://127.0.0.1:8701", "{adapter}"


@contextlib.contextmanager
def server(argv: list[str], url: str, path: str, log: Path) -> Iterator[None]:
    env = {**os.environ, "VLLM_WORKER_MULTIPROC_METHOD": os.environ.get("VLLM_WORKER_MULTIPROC_METHOD", "spawn")}
    started = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=out, env=env, cwd=ROOT, start_new_session=True)
    try:
        while True:
            if process.poll() is not None or time.monotonic() - started > BOOT_S:
                raise SystemExit(f"{argv[2]} did not start (status {process.poll()}):\n{log.read_text(errors='replace')[-3000:]}")
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                urllib.request.urlopen(url + path, timeout=2)
                break
            time.sleep(0.5)
        print(f"{argv[2]} serves after {time.monotonic() - started:.0f} s", flush=True)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


SERVERS = {"loraplex": loraplex, "vllm": vllm}

# ---- the run --------------------------------------------------------------------------------------------------------------------------------


def load(url: str, naming: str, row: Row, output_tokens: int, rounds: int) -> dict[str, Any]:
    """Figures of one row: the last of `rounds` passes (the first pays kernel tuning)."""
    flags = ["--url", url, "--model", "m", "--model-format", naming, "--quiet", "--ignore-eos", "--timeout", "300"]
    flags += ["--prompt-tokens", "100", "--output-tokens", str(output_tokens)]
    flags += ["--concurrency", str(row.streams), "--requests", str(row.requests), "--mix", row.mix]
    if row.adapters:
        flags += ["--adapters", ",".join(f"a{i:03d}" for i in range(row.adapters))]
        flags += ["--warm-adapters"] if row.mix == "uniform" else []
    made: dict[str, Any] = {}
    for _ in range(rounds):
        made = document(uvloop.run(measure(parse([*flags, "--warmup", "4"]))))
    return made


def figures_of(url: str, naming: str, row: Row, args: argparse.Namespace) -> dict[str, Any]:
    if row.mix != "stall":
        return load(url, naming, row, args.output_tokens, args.rounds)
    names = [naming.format(base="m", adapter=name) for name in ("a000", *(f"c{i:03d}" for i in range(COLD_ADAPTERS)))]
    return {"stall": uvloop.run(stall(url, names[0], names[1:]))}


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    began = time.monotonic()
    out: Path = args.out
    work = Path(args.work)
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    label = args.label or ("defaults" if args.defaults else "")
    kept = out / f"gpu-{args.shape}{label and '-'}{label}.jsonl"
    done = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    model = make_model(work / "model", args.shape)
    adapters = make_adapters(work / "adapters", args.adapters, args.shape)
    wanted = rows(args)
    for name in args.servers:
        left = [r for r in wanted if not any(d["server"] == name and d["row"] == r.name for d in done)]
        if not left:
            continue
        arguments = engine_arguments(args.shape, args.slots, defaults=args.defaults) | (
            dict(args.loraplex_arg) if name == "loraplex" else {}
        )
        with SERVERS[name](model, adapters, arguments, work, args.gpus) as (url, naming):
            for row in left:
                if time.monotonic() - began > args.budget_s:
                    print(f"out of time before {name}, {row.name}", flush=True)
                    break
                done.append({"server": name, "row": row.name, "arguments": arguments, "figures": figures_of(url, naming, row, args)})
                with kept.open("a") as f:
                    f.write(json.dumps(done[-1]) + "\n")
                print(line(done[-1]), flush=True)
        print_stalls(work / f"{name}.log")
    return done


def print_stalls(path: Path) -> None:
    """What the worker itself says of its loads: how long the engine stood still for each."""
    said = [
        json.loads(text) for text in path.read_text(errors="replace").splitlines() if text.startswith("{") and '"adapter loaded"' in text
    ]
    if said:
        each = sorted(d["stall_ms"] / d["together"] for d in said)
        together = [d["together"] for d in said]
        mean = statistics.mean(together)
        print(
            f"{len(each)} loads: stall p50 {each[len(each) // 2]:.1f} ms, most {each[-1]:.1f} ms; {mean:.1f} adapters per swap", flush=True
        )


def line(d: dict[str, Any]) -> str:
    f = d["figures"]
    if "stall" in f:
        x = f["stall"]
        stalls = f"stall p50 {x['stall_p50_ms']:.1f} ms, most {x['stall_max_ms']:.1f} ms"
        ttfts = f"TTFT {x['ttft_cold_ms']:.0f} cold, {x['ttft_warm_ms']:.0f} warm"
        return f"| {d['server']} | {d['row']} | {stalls} | {ttfts} | | {x['gap_warm_ms']:.1f} (longest) | |"
    ttft, itl = f["ttft"] or {"p50": 0, "p99": 0}, f["itl"] or {"p50": 0}
    return (
        f"| {d['server']} | {d['row']} | {f['throughput']['output_tokens_per_s']:,.0f} | {ttft['p50'] * 1e3:.0f} | {ttft['p99'] * 1e3:.0f} "
        f"| {itl['p50'] * 1e3:.1f} | {f['requests']['failed']} |"
    )


def table(done: list[dict[str, Any]]) -> str:
    head = ["| server | load | output tok/s | TTFT p50 ms | TTFT p99 ms | ITL p50 ms | errors |", "|---|---|---|---|---|---|---|"]
    return "\n".join([*head, *(line(d) for d in sorted(done, key=lambda d: (d["row"], d["server"])))])


def ratios(done: list[dict[str, Any]]) -> str:
    """Loraplex over vLLM, row by row."""
    of = {(d["server"], d["row"]): d["figures"]["throughput"]["output_tokens_per_s"] for d in done if "throughput" in d["figures"]}
    pairs = [(row, of["loraplex", row] / of["vllm", row]) for (server_, row) in of if server_ == "loraplex" and of.get(("vllm", row))]
    middle = statistics.median([r for _, r in pairs]) if pairs else 0.0
    return "\n".join([*(f"{row}: {ratio:.3f}" for row, ratio in pairs), f"median {middle:.3f}"])


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _argument(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--work", default="/tmp/loraplex-gpu")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--servers", type=lambda s: s.split(","), default=["loraplex", "vllm"])
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--levels", type=_numbers, default=[256, 64, 1, 512], help="concurrent streams, in order of importance")
    parser.add_argument("--adapter-levels", type=_numbers, default=[256, 64], help="those of them that are measured with adapters as well")
    parser.add_argument("--rows", type=lambda s: s.split(","), default=list(KINDS), help=f"of {', '.join(KINDS)} (all)")
    parser.add_argument("--defaults", action="store_true", help="each server's own defaults, but for slots, rank and context")
    parser.add_argument(
        "--loraplex-arg", type=_argument, action="append", default=[], metavar="NAME=JSON", help="an engine argument for Loraplex alone"
    )
    parser.add_argument("--label", default="", help="part of the results file's name")
    parser.add_argument("--budget-s", type=float, default=520.0, help="no row begins after so long")
    parser.add_argument("--per-stream", type=int, default=4, help="requests per concurrent stream")
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2, help="passes per row; the last one counts")
    args = parser.parse_args()
    raise_open_files_limit()
    done = run(args)
    print(f"\n{table(done)}\n\nLoraplex over vLLM, output tokens/s:\n{ratios(done)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
