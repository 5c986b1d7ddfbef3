"""Shell. `python -m bench.engine.gpu`: Loraplex beside vLLM's own server on GPUs. The model has the
shape of Llama-3.1-8B and random weights.

The program needs nothing from outside. It writes the model's config, a tokenizer and random
adapters of rank 16. It starts the servers with the same engine arguments, sends each the load of
`bench.load`, and prints a table at the end.

Each row is printed and appended to a file in `--out` as soon as it is measured. The same command
goes on where the last one stopped. SIGTERM, for example from `timeout`, ends the program and its
servers. The most important rows come first. A row that would not end within `--budget-s` is not
begun.

A server takes 2 to 3.5 minutes to start. Within 9 minutes, one call has time for all rows of one
kind on one server. For both servers it has time for few rows one server after the other, or for
more with both servers up at once:

    python -m bench.engine.gpu --out results --together --rows zipf,stall,adapters
        # both servers are up and measured in turns
    python -m bench.engine.gpu --out results --servers loraplex --rows base
    python -m bench.engine.gpu --out results --servers vllm --rows base
        # each server has the GPU to itself
    python -m bench.engine.gpu --out results --defaults --rows adapters
        # each server has its own defaults, except for slots, rank and context
    python -m bench.engine.gpu --out results --servers loraplex --loraplex-arg \\
        specialize_active_lora=true --label spec
        # Loraplex has one engine argument more
    python -m bench.engine.gpu --report results/*.jsonl
        # prints one table, and the ratios, of what several calls have measured

With `--together`, each server has a GPU of its own if the host has two. Otherwise they share one:
each has 45% of its memory, and a KV cache of the same number of bytes. On a GPU of 80 GB that is
10 GiB of KV cache for each, which is enough for 256 streams but not for 512. Only one server at a
time gets requests.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from bench.engine.gpu_flags import KINDS, read_arguments
from bench.engine.gpu_report import Recorded, line, ratios, table
from bench.engine.gpu_servers import (
    COLD_ADAPTERS,
    SERVERS,
    GpuServer,
    engine_arguments,
    gpu,
    make_adapters,
    make_model,
    shared_gpu,
    up,
)
from bench.engine.stall import stall
from bench.load.__main__ import CannotRun, measure, raise_open_files_limit
from bench.load.options import parse
from bench.load.report import document
from shared.runtime.process import count_gpus

STALL_S = 30.0
SLOW_STEP_S = {"zipf": 0.05, "uniform": 0.03, "base": 0.025}
"""How long one output token of a stream takes on a slow machine, its share of the wait and the
prefill included. The longest time of a row is estimated from it.
"""


@dataclass(frozen=True, slots=True)
class GpuRow:
    """One load. `adapters` 0 means the base model. `mix` is the `--mix` of bench.load."""

    name: str
    adapters: int
    mix: str
    streams: int
    requests: int

    def seconds(self, output_tokens: int, rounds: int) -> float:
        """An estimate of the longest time that the row takes."""
        if self.mix == "stall":
            return STALL_S
        return rounds * output_tokens * self.requests / self.streams * SLOW_STEP_S[self.mix]


def rows(args: argparse.Namespace) -> list[GpuRow]:
    """The rows that `--rows` asks for, the most important first."""
    slots, adapters, per_stream = args.slots, args.adapters, args.per_stream
    made: dict[str, list[GpuRow]] = {kind: [] for kind in KINDS}
    made["zipf"] = [
        GpuRow(
            f"{adapters} adapters over {slots} slots, zipf x128",
            adapters,
            "zipf",
            128,
            128 * per_stream,
        )
    ]
    made["stall"] = [GpuRow("stall per cold load", 0, "stall", 32, 0)]
    made["adapters"] = [
        GpuRow(f"{slots} adapters x{n}", slots, "uniform", n, max(8, n * per_stream))
        for n in args.adapter_levels
    ]
    made["base"] = [GpuRow(f"base x{n}", 0, "base", n, max(8, n * per_stream)) for n in args.levels]
    return [row for kind in KINDS if kind in args.rows for row in made[kind]]


def load(server: GpuServer, row: GpuRow, output_tokens: int, rounds: int) -> dict[str, Any]:
    """The figures of one row. The last of `rounds` passes counts, because kernels are tuned during
    the first.
    """
    flags = [
        "--url",
        server.url,
        "--model",
        "m",
        "--model-format",
        server.naming,
        "--quiet",
        "--ignore-eos",
        "--timeout",
        "300",
    ]
    flags += ["--prompt-tokens", "100", "--output-tokens", str(output_tokens)]
    flags += ["--concurrency", str(row.streams), "--requests", str(row.requests), "--mix", row.mix]
    if row.adapters:
        flags += ["--adapters", ",".join(f"a{i:03d}" for i in range(row.adapters))]
        flags += ["--warm-adapters"] if row.mix == "uniform" else []
    made: dict[str, Any] = {}
    for number in range(rounds):
        made = document(uvloop.run(measure(parse([*flags, "--warmup", "4"]))))
        rate = made["throughput"]["output_tokens_per_s"]
        print(
            f"  {server.name}, {row.name}, pass {number + 1} of {rounds}: {rate:,.0f} tokens/s",
            flush=True,
        )
    return made


def figures_of(server: GpuServer, row: GpuRow, args: argparse.Namespace) -> dict[str, Any]:
    if row.mix != "stall":
        return load(server, row, args.output_tokens, args.rounds)
    names = [
        server.naming.format(base="m", adapter=name)
        for name in ("a000", *(f"c{i:03d}" for i in range(COLD_ADAPTERS)))
    ]
    return {"stall": uvloop.run(stall(server.url, names[0], names[1:]))}


class GpuRecord:
    """The rows of one results file. New ones are appended to it."""

    def __init__(self, path: Path, label: str) -> None:
        self.path, self._label, self.rows = path, label, list[Recorded]()
        self._gpu = gpu()[0]
        kept = path.read_text() if path.exists() else ""
        # the last run was killed while it wrote a line
        self._cut_off = bool(kept) and not kept.endswith("\n")
        for text in kept.splitlines():
            try:
                self.rows.append(json.loads(text))
            except ValueError:
                print(f"{path}: a line that is cut off is left out", flush=True)

    def has(self, server: str, row: GpuRow, arguments: dict[str, Any]) -> bool:
        """Whether the row was measured with these arguments."""
        return any(
            d["server"] == server and d["row"] == row.name and d.get("arguments") == arguments
            for d in self.rows
        )

    def add(
        self, server: str, row: GpuRow, arguments: dict[str, Any], figures: dict[str, Any]
    ) -> None:
        facts = {
            "server": server,
            "label": self._label,
            "row": row.name,
            "arguments": arguments,
            "gpu": self._gpu,
        }
        self.rows.append({**facts, "figures": figures})
        with self.path.open("a") as f:
            f.write("\n" * self._cut_off + json.dumps(self.rows[-1]) + "\n")
        self._cut_off = False
        print(line(self.rows[-1]), flush=True)


def run(args: argparse.Namespace, record: GpuRecord) -> None:
    until = time.monotonic() + args.budget_s
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    model = make_model(work / "model", args.shape)
    adapters = make_adapters(work / "adapters", args.adapters, args.shape)
    common = engine_arguments(args.shape, args.slots, defaults=args.defaults)
    apart = args.together and args.gpus == 1 and count_gpus() >= len(args.servers)
    if args.together and not apart:
        common |= shared_gpu(gpu()[1], args.kv_gib)
    arguments = {
        name: common | (dict(args.loraplex_arg) if name == "loraplex" else {})
        for name in args.servers
    }
    left = {
        name: [r for r in rows(args) if not record.has(name, r, arguments[name])]
        for name in args.servers
    }
    for name in args.servers:
        if kept := [r.name for r in rows(args) if r not in left[name]]:
            print(f"{name}: {', '.join(kept)}: in {record.path} already", flush=True)
    names = [name for name in args.servers if left[name]]
    for group in [names] if args.together and names else [[name] for name in names]:
        servers = [
            SERVERS[name](model, adapters, arguments[name], work, args.gpus) for name in group
        ]
        for server in servers:
            if server.name == "vllm":
                server.env.update({name: str(value) for name, value in args.vllm_env})
        with up(servers, work, apart=apart):
            for row in rows(args):
                for server in servers:
                    if row not in left[server.name]:
                        continue
                    if time.monotonic() + row.seconds(args.output_tokens, args.rounds) > until:
                        print(
                            f"out of time before {server.name}, {row.name}: run the "
                            "same command again",
                            flush=True,
                        )
                        continue
                    record.add(
                        server.name, row, arguments[server.name], figures_of(server, row, args)
                    )
        for server in servers:
            print_stalls(server.log)


def print_stalls(path: Path) -> None:
    """Prints, from the worker's log, how long the engine stood still for each load."""
    said = [
        json.loads(text)
        for text in path.read_text(errors="replace").splitlines()
        if text.startswith("{") and '"adapter loaded"' in text
    ]
    if said:
        each = sorted(d["stall_ms"] / d["together"] for d in said)
        mean = sum(d["together"] for d in said) / len(said)
        print(
            f"{len(each)} loads: stall p50 {each[len(each) // 2]:.1f} ms, most "
            f"{each[-1]:.1f} ms; {mean:.1f} adapters per swap",
            flush=True,
        )


def main() -> int:
    args = read_arguments(None, __doc__ or "")
    if missing := [str(path) for path in args.report or () if not path.exists()]:
        print(f"bench.engine.gpu: --report: no such file: {', '.join(missing)}", file=sys.stderr)
        return 2
    if args.report:
        done = [d for path in args.report for d in GpuRecord(path, "").rows]
        print(f"{table(done)}\n\nLoraplex over vLLM, output tokens/s:\n{ratios(done)}")
        return 0
    if args.shape != "tiny" and not count_gpus():
        print(
            f"bench.engine.gpu: no NVIDIA GPU here, and --shape {args.shape} needs "
            "one; --shape tiny tries this program out on a CPU",
            file=sys.stderr,
        )
        return 2
    # the exit runs the clean-up, which ends the servers
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit("bench.engine.gpu: stopped; what was measured is kept")
    )
    raise_open_files_limit()
    label = args.label or ("defaults" if args.defaults else "")
    args.out.mkdir(parents=True, exist_ok=True)
    record = GpuRecord(args.out / f"gpu-{args.shape}{label and '-'}{label}.jsonl", label)
    try:
        run(args, record)
    except CannotRun as exc:
        print(f"bench.engine.gpu: {exc}", file=sys.stderr)
        return 2
    finally:
        print(
            f"\n{table(record.rows)}\n\nLoraplex over vLLM, output "
            f"tokens/s:\n{ratios(record.rows)}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
