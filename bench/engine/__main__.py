"""Shell. `python -m bench.engine` (`make bench-engine`): Loraplex beside vLLM's own server, same
engine arguments, on the demo model.

    python -m bench.engine
        # 1, 16 and 64 streams, base and 8 adapters, 3 interleaved rounds
    python -m bench.engine --levels 1,16,64,256,512 --rounds 5 --servers loraplex,vllm
    python -m bench.engine --levels 64 --rounds 5 --servers loraplex,vllm

Three are compared: Loraplex (gateway and one worker), the same worker with every request sent
through vLLM's serving layer (a field that asks for nothing, but that only vLLM's layer knows), and
vLLM's server. CPU is that of each process, in microseconds per output token: the gateway, the front
end (the worker, or vLLM's API server) and the engine below it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import uvloop
import yaml

from bench import ROOT
from bench.cluster import start_gateway, start_worker, until_listening
from bench.load.__main__ import measure, raise_open_files_limit
from bench.load.options import parse
from bench.load.report import document
from bench.process import (
    NotStarted,
    Process,
    free_ports,
    tree,
    until_answers,
)
from bench.provenance import commit
from worker.engine.factory import VLLM_CPU_ENV, VLLM_ENV

DEMO = ROOT / "examples" / "demo"
ADAPTERS = sorted(p.name for p in (DEMO / "adapters").iterdir())
BOOT_S = 300.0
ENGINE = {
    "max_model_len": 1024,
    "dtype": "float32",
    "enforce_eager": True,
    "kv_cache_memory_bytes": 256 << 20,
    "max_num_seqs": 512,
    "enable_lora": True,
    "max_loras": len(ADAPTERS),
    "max_cpu_loras": len(ADAPTERS),
    "max_lora_rank": 16,
}
"""Of both; every adapter has a slot, so that what is compared is serving and not loading."""
ENV = VLLM_ENV | VLLM_CPU_ENV | {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
PARTS = ("gateway", "front end", "engine")
EngineFigures: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that runs: where it is, how it names adapters, fields for each request, and its
    processes by part.
    """

    name: str
    url: str
    naming: str
    extra: str
    gateway: Process | None
    front_end: Process

    def cpu_s(self) -> dict[str, float]:
        below = [pid for pid in tree(self.front_end.pid) if pid != self.front_end.pid]
        parts = {
            "gateway": [self.gateway.pid] if self.gateway else [],
            "front end": [self.front_end.pid],
            "engine": below,
        }
        return {part: sum(_scheduled_s(pid) for pid in pids) for part, pids in parts.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.engine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--levels",
        type=lambda s: [int(x) for x in s.split(",")],
        default=[1, 16, 64],
        metavar="N,N",
        help="streams at once",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--per-stream",
        type=int,
        default=2,
        help="requests per stream and round (default %(default)s; at least 4 requests)",
    )
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument(
        "--servers",
        type=lambda s: s.split(","),
        default=["loraplex", "loraplex, vLLM's layer", "vllm"],
    )
    parser.add_argument("--out", type=Path, help="a folder for the result as JSON and Markdown")
    flags = parser.parse_args(arguments)
    raise_open_files_limit()
    try:
        made = uvloop.run(compare(flags))
    except NotStarted as exc:
        print(f"bench.engine: {exc}", file=sys.stderr)
        return 2
    print(table(made))
    if flags.out:
        flags.out.mkdir(parents=True, exist_ok=True)
        about = about_run(sys.argv[1:] if arguments is None else arguments)
        stem = flags.out / f"engine-{about['started_at'][:10]}"
        stem.with_suffix(".json").write_bytes(
            msgspec.json.format(msgspec.json.encode(about | {"rows": made}), indent=1) + b"\n"
        )
        stem.with_suffix(".md").write_text(
            f"`{about['command']}`, {about['started_at']}, commit "
            f"{about['commit'][:13]}\n\n{table(made)}\n"
        )
    return 0


async def compare(flags: argparse.Namespace) -> list[EngineFigures]:
    """One entry for each server, load and round. Within a round the servers take turns."""
    made: list[EngineFigures] = []
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(
            stack.enter_context(
                tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True)
            )
        )
        servers: list[RunningServer] = []
        if any(name.startswith("loraplex") for name in flags.servers):
            servers += await stack.enter_async_context(loraplex(folder))
        if "vllm" in flags.servers:
            servers.append(await stack.enter_async_context(vllm(folder)))
        servers = [s for s in servers if s.name in flags.servers]
        # each adapter into its slot, and whatever else a first request pays for
        for server in servers:
            for kind in ("base", "adapters"):
                await one(server, kind, 8, 16, 8)
        for round_ in range(flags.rounds):
            for kind in ("base", "adapters"):
                for streams in flags.levels:
                    for server in servers:
                        requests = max(4, streams * flags.per_stream)
                        figures = await one(server, kind, streams, requests, flags.output_tokens)
                        made.append(
                            {
                                "server": server.name,
                                "kind": kind,
                                "streams": streams,
                                "round": round_ + 1,
                                **figures,
                            }
                        )
                        print(
                            f"round {round_ + 1}: {_line([made[-1]])}", file=sys.stderr, flush=True
                        )
    return made


async def one(
    server: RunningServer, kind: str, streams: int, requests: int, tokens: int
) -> EngineFigures:
    """One load on one server."""
    flags = [
        "--url",
        server.url,
        "--model",
        "demo",
        "--model-format",
        server.naming,
        "--quiet",
        "--ignore-eos",
        "--timeout",
        "300",
    ]
    flags += [
        "--prompt-tokens",
        "16",
        "--output-tokens",
        str(tokens),
        "--concurrency",
        str(streams),
        "--requests",
        str(requests),
    ]
    flags += (
        ["--mix", "uniform", "--adapters", ",".join(ADAPTERS)]
        if kind == "adapters"
        else ["--mix", "base"]
    )
    flags += ["--extra-body", server.extra]
    before = server.cpu_s()
    seen = document(await measure(parse(flags)))
    after = server.cpu_s()
    count = seen["throughput"]["output_tokens"]
    return {
        "tokens_per_s": seen["throughput"]["output_tokens_per_s"],
        "ttft_ms": (seen["ttft"] or {}).get("p50", 0.0) * 1e3,
        "itl_ms": (seen["itl"] or {}).get("p50", 0.0) * 1e3,
        "itl_p99_ms": (seen["itl"] or {}).get("p99", 0.0) * 1e3,
        "failed": seen["requests"]["failed"],
        "cpu_us": {part: (after[part] - before[part]) / max(1, count) * 1e6 for part in PARTS},
    }


@contextlib.asynccontextmanager
async def loraplex(folder: Path) -> AsyncIterator[list[RunningServer]]:
    """A gateway and a worker; twice, since the fields of a request choose the way through the
    worker.
    """
    (port,) = free_ports(1)
    lora = {
        "dynamic_lora_loading_path": str(DEMO / "adapters"),
        "max_num_adapters_per_replica": len(ADAPTERS),
    }
    loading = {"model_id": "demo", "model_source": str(DEMO / "model")}
    model = {"model_loading_config": loading, "engine_kwargs": ENGINE, "lora_config": lora}
    config = {
        "llm_configs": [model],
        "gateway": {"host": "127.0.0.1", "port": port, "state_dir": str(folder / "state")},
    }
    path = folder / "loraplex.yaml"
    path.write_text(yaml.safe_dump(config))
    with contextlib.ExitStack() as stack:
        gateway = start_gateway(path, folder / "run", folder / "gateway.log")
        stack.callback(gateway.stop)
        control = await until_listening(gateway, folder / "run")
        worker = start_worker(path, "w0", [control], folder / "worker.log", env=ENV)
        stack.callback(worker.stop)
        try:
            await until_answers(port, "/ready", gateway, BOOT_S)
        except NotStarted as exc:
            raise NotStarted(f"{exc}\nworker: {worker.last_words()}") from exc
        url, naming = f"http://127.0.0.1:{port}", "{base}:{adapter}"
        yield [
            RunningServer("loraplex", url, naming, "{}", gateway, worker),
            RunningServer(
                "loraplex, vLLM's layer",
                url,
                naming,
                '{"return_token_ids": false}',
                gateway,
                worker,
            ),
        ]


@contextlib.asynccontextmanager
async def vllm(folder: Path) -> AsyncIterator[RunningServer]:
    """vLLM's API server module: the CPU build's `vllm` command stops at the name of its own
    package.
    """
    (port,) = free_ports(1)
    argv = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(DEMO / "model"),
        "--served-model-name",
        "demo",
    ]
    argv += ["--host", "127.0.0.1", "--port", str(port)]
    for key, value in ENGINE.items():
        flag = f"--{key.replace('_', '-')}"
        argv += [flag] if value is True else [flag, str(value)]
    argv += ["--lora-modules", *(f"{name}={DEMO / 'adapters' / name}" for name in ADAPTERS)]
    server = Process(argv, folder / "vllm.log", ENV, cwd=ROOT)
    try:
        await until_answers(port, "/health", server, BOOT_S)
        yield RunningServer("vllm", f"http://127.0.0.1:{port}", "{adapter}", "{}", None, server)
    finally:
        server.stop()


def table(made: Sequence[EngineFigures]) -> str:
    """Medians over the rounds."""
    head = (
        "| streams | server | output tok/s (min to max) | TTFT p50 ms | ITL p50 / p99 ms | "
        "CPU us per token: gateway | front end | engine | failed |"
    )
    keys = dict.fromkeys((m["kind"], m["streams"], m["server"]) for m in made)
    rows = [
        _line([m for m in made if (m["kind"], m["streams"], m["server"]) == key]) for key in keys
    ]
    return "\n".join([head, "|---" * 9 + "|", *rows, *_ratios(made)])


def _ratios(made: Sequence[EngineFigures]) -> list[str]:
    """Loraplex over vLLM, round by round, since both halves of a ratio then ran within the same
    seconds.
    """
    runs = {(m["kind"], m["streams"], m["round"], m["server"]): m for m in made}
    lines = [
        "",
        "| streams | output tok/s, Loraplex over vLLM: median (least to most) | TTFT "
        "p50, Loraplex less vLLM, ms |",
        "|---|---|---|",
    ]
    for kind, streams in dict.fromkeys((m["kind"], m["streams"]) for m in made):
        pairs = [
            (ours, runs[kind, streams, round_, "vllm"])
            for (k, n, round_, server), ours in runs.items()
            if (k, n, server) == (kind, streams, "loraplex")
            and (kind, streams, round_, "vllm") in runs
        ]
        if pairs:
            speeds = [ours["tokens_per_s"] / theirs["tokens_per_s"] for ours, theirs in pairs]
            later = [ours["ttft_ms"] - theirs["ttft_ms"] for ours, theirs in pairs]
            spread = f"{statistics.median(speeds):.2f} ({min(speeds):.2f} to {max(speeds):.2f})"
            lines.append(
                f"| {streams}, {kind} | {spread} | {statistics.median(later):+.1f} "
                f"({min(later):+.1f} to {max(later):+.1f}) |"
            )
    return lines if len(lines) > 3 else []


def _line(rounds: Sequence[EngineFigures]) -> str:
    first, speeds = rounds[0], [m["tokens_per_s"] for m in rounds]

    def middle(key: str) -> float:
        return float(statistics.median(m[key] for m in rounds))

    cpu = " | ".join(
        f"{statistics.median(m['cpu_us'][part] for m in rounds):.1f}" for part in PARTS
    )
    return (
        f"| {first['streams']}, {first['kind']} | {first['server']} | "
        f"{statistics.median(speeds):,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f}) "
        f"| {middle('ttft_ms'):.1f} | {middle('itl_ms'):.1f} / "
        f"{middle('itl_p99_ms'):.1f} | {cpu} | {sum(m['failed'] for m in rounds)} |"
    )


def about_run(arguments: Sequence[str]) -> dict[str, Any]:
    return {
        "started_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m bench.engine", *arguments]),
        "commit": commit(),
        "cores": os.cpu_count(),
        "loadavg": os.getloadavg(),
        "engine": ENGINE,
    }


def _scheduled_s(pid: int) -> float:
    """CPU seconds of a process's living threads, to the nanosecond."""
    total = 0
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError, ValueError):
                total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


if __name__ == "__main__":
    sys.exit(main())
