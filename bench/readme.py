"""Shell. `python -m bench.readme`: the table of README. Starts the demo (one gateway, two vLLM
workers), loads it, prints a Markdown table.

Each row is `python -m bench.load` with the flags shown; `--repeat` rounds are interleaved and the
medians printed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from bench import ROOT
from bench.load.__main__ import measure
from bench.load.options import parse
from bench.load.report import document
from gateway.supervisor.background_server import BackgroundServer
from shared.config.settings_file import load_settings

COMMON = [
    "--model",
    "demo",
    "--prompt-tokens",
    "16",
    "--output-tokens",
    "64",
    "--ignore-eos",
    "--quiet",
]
EIGHT = ["--adapters", "pirate,shouting,haiku,json,polite,emoji,bullets,robot"]
ROWS = (
    ("base model", ["--mix", "base", "--concurrency", "16", "--requests", "160"]),
    (
        "one adapter",
        [
            "--mix",
            "identical",
            *EIGHT,
            "--concurrency",
            "16",
            "--requests",
            "160",
            "--warm-adapters",
        ],
    ),
    (
        "8 adapters over 2 x 4 slots, Zipf 1.0",
        ["--mix", "zipf", *EIGHT, "--concurrency", "16", "--requests", "160", "--warm-adapters"],
    ),
    (
        "8 adapters, uniform",
        ["--mix", "uniform", *EIGHT, "--concurrency", "16", "--requests", "160", "--warm-adapters"],
    ),
    (
        "the same, one client",
        ["--mix", "uniform", *EIGHT, "--concurrency", "1", "--requests", "32", "--warm-adapters"],
    ),
)


def run(repeat: int) -> list[dict[str, Any]]:
    """One document of `bench.load` per row and round, rounds interleaved."""
    settings = load_settings(ROOT / "examples" / "demo.yaml")
    with tempfile.TemporaryDirectory() as folder:
        gateway = msgspec.structs.replace(
            settings.gateway, port=0, state_dir=folder, log_level="error"
        )
        with BackgroundServer.start(msgspec.structs.replace(settings, gateway=gateway)) as server:
            url = server.url.removesuffix("/v1")
            made = []
            for round_ in range(repeat):
                for name, flags in ROWS:
                    print(f"round {round_ + 1}: {name}", file=sys.stderr, flush=True)
                    options = parse(
                        ["--url", url, *COMMON, *flags, "--warmup", "16" if round_ == 0 else "4"]
                    )
                    made.append({"row": name, **document(uvloop.run(measure(options)))})
            return made


def table(made: list[dict[str, Any]]) -> str:
    lines = [
        "| load | output tokens/s | TTFT p50 | TTFT p99 | ITL p50 | errors |",
        "|---|---|---|---|---|---|",
    ]
    for name, _ in ROWS:
        rounds = [m for m in made if m["row"] == name]

        def middle(*path: str, of: list[dict[str, Any]] = rounds) -> float:
            values = []
            for m in of:
                value: Any = m
                for key in path:
                    value = value[key]
                values.append(float(value))
            return statistics.median(values)

        errors = sum(m["requests"]["failed"] for m in rounds)
        lines.append(
            f"| {name} | {middle('throughput', 'output_tokens_per_s'):,.0f} | "
            f"{middle('ttft', 'p50') * 1e3:.0f} ms "
            f"| {middle('ttft', 'p99') * 1e3:.0f} ms | "
            f"{middle('itl', 'p50') * 1e3:.1f} ms | {errors} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.readme", description="The table of README."
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    made = run(args.repeat)
    if args.json:
        args.json.write_bytes(msgspec.json.format(msgspec.json.encode(made)))
    print(table(made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
