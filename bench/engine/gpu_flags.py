"""Shell. The flags of `python -m bench.engine.gpu`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from bench.engine.gpu_servers import BESIDE_KV_GIB, SERVERS, SHAPES

KINDS = ("zipf", "stall", "adapters", "base")


def read_arguments(argv: Sequence[str] | None = None, description: str = "") -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.engine.gpu",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_file_flags(parser)
    _add_server_flags(parser)
    _add_load_flags(parser)
    return parser.parse_args(argv)


def _add_file_flags(parser: argparse.ArgumentParser) -> None:
    """Where everything is written, and which results are only printed."""
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument(
        "--work",
        default="/tmp/loraplex-gpu",
        help="model, adapters, logs and caches (default %(default)s)",
    )
    parser.add_argument(
        "--report",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="print what these files hold, and measure nothing",
    )


def _add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Which servers run, with what model and which arguments."""
    parser.add_argument(
        "--shape",
        choices=SHAPES,
        default="8b",
        help="tiny: to try this program out where there is no GPU",
    )
    parser.add_argument("--servers", type=_some_of(SERVERS), default=[*SERVERS])
    parser.add_argument(
        "--together",
        action="store_true",
        help="the servers are up at once, each on a GPU of its own or sharing one, and "
        "measured in turns",
    )
    parser.add_argument(
        "--kv-gib",
        type=float,
        help=f"KV cache of each with --together (default: its share less {BESIDE_KV_GIB} GiB)",
    )
    parser.add_argument(
        "--gpus", type=int, default=1, help="workers of Loraplex; vLLM's server has one"
    )
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--slots", type=int, default=16)


def _add_load_flags(parser: argparse.ArgumentParser) -> None:
    """Which rows are measured, and how."""
    parser.add_argument(
        "--levels",
        type=_numbers,
        default=[256, 64, 1, 512],
        help="concurrent streams of the base rows, in order of importance",
    )
    parser.add_argument(
        "--adapter-levels", type=_numbers, default=[256, 64], help="the same of the adapters rows"
    )
    parser.add_argument(
        "--rows", type=_some_of(KINDS), default=list(KINDS), help=f"of {', '.join(KINDS)} (all)"
    )
    parser.add_argument(
        "--defaults",
        action="store_true",
        help="each server's own defaults, but for slots, rank and context",
    )
    parser.add_argument(
        "--loraplex-arg",
        type=_argument,
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="an engine argument for Loraplex alone",
    )
    parser.add_argument(
        "--vllm-env",
        type=_argument,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an environment variable for vLLM's server alone, such as "
        "VLLM_LORA_ENABLE_DUAL_STREAM=1",
    )
    parser.add_argument("--label", default="", help="part of the results file's name")
    parser.add_argument(
        "--budget-s",
        type=float,
        default=515.0,
        help="no row begins that would not end by then (default %(default)s)",
    )
    parser.add_argument("--per-stream", type=int, default=4, help="requests per concurrent stream")
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2, help="passes per row; the last one counts")


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise ValueError
    return numbers


def _some_of(known: Collection[str]) -> Callable[[str], list[str]]:
    def parse_names(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [n for n in names if n not in known]:
            raise argparse.ArgumentTypeError(
                f"{', '.join(map(repr, unknown))}: there are {', '.join(known)}"
            )
        return names

    return parse_names


def _argument(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
