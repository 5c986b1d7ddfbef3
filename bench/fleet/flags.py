"""Shell. The flags of `python -m bench.fleet`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.fleet.plan import PARTS, POLICIES, SHARES
from bench.provenance import RESULTS

HEAT_S = {"sim": 0.0, "vllm": 20.0}
SIM_SEQUENCES = 32
VLLM_STREAMS = 256
TIMEOUT_S = 130.0


def read_flags(arguments: Sequence[str] | None, description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fleet",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_choice_flags(parser)
    _add_time_flags(parser)
    _add_served_flags(parser)
    _add_file_flags(parser)
    flags = parser.parse_args(arguments)
    if flags.share_gpu and "mixed" in flags.parts:
        parser.error("--share-gpu: the pair of the part `mixed` has two GPUs")
    flags.heat = HEAT_S[flags.engine] if flags.heat is None else flags.heat
    return flags


def _add_choice_flags(parser: argparse.ArgumentParser) -> None:
    """What is measured."""
    parser.add_argument("--engine", choices=("sim", "vllm"), default="vllm")
    parser.add_argument(
        "--workers",
        type=_numbers,
        default=[2, 4, 8],
        metavar="N,N",
        help="sizes of the fleet (default 2,4,8)",
    )
    parser.add_argument(
        "--parts",
        type=_words(PARTS),
        default=list(PARTS[:-1]),
        help=f"of {','.join(PARTS)} (default: all but mixed)",
    )
    parser.add_argument(
        "--mixed", dest="parts", action=_Also, const="mixed", nargs=0, help="the part `mixed` too"
    )
    parser.add_argument(
        "--policies", type=_words(POLICIES), default=list(POLICIES), help="default: all three"
    )
    parser.add_argument(
        "--rps",
        type=_rates,
        default=[],
        metavar="R,R",
        help="policies and kill at so many requests/s a worker, instead of shares of the capacity",
    )
    parser.add_argument(
        "--shares",
        type=_rates,
        default=list(SHARES),
        metavar="F,F",
        help="of the capacity, for the policies (default 0.7,0.95)",
    )
    parser.add_argument(
        "--repetitions", type=int, default=1, help="of the policies (default %(default)s)"
    )


def _add_time_flags(parser: argparse.ArgumentParser) -> None:
    """How long each load runs."""
    parser.add_argument(
        "--budget",
        type=float,
        metavar="S",
        help="the whole call, boot included; what does not fit is trimmed, then left out",
    )
    parser.add_argument(
        "--warm",
        type=float,
        default=6.0,
        metavar="S",
        help="of each load, not counted (default %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=12.0,
        metavar="S",
        help="of each load, counted (default %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT_S,
        metavar="S",
        help="of one request. It bounds a load beyond the capacity (default %(default)s)",
    )
    parser.add_argument(
        "--heat",
        type=float,
        metavar="S",
        help="of load before everything else (default 20 for vllm, 0 for sim)",
    )


def _add_served_flags(parser: argparse.ArgumentParser) -> None:
    """What is served, and by how many processes."""
    parser.add_argument(
        "--streams",
        type=int,
        metavar="N",
        help=f"per worker in a closed loop (default {VLLM_STREAMS}); sim: places ({SIM_SEQUENCES})",
    )
    parser.add_argument(
        "--share-gpu",
        action="store_true",
        help="all workers on the first GPU, with equal shares of its memory",
    )
    parser.add_argument("--adapters", type=int, default=256)
    parser.add_argument("--slots", type=int, default=16, help="per worker (default %(default)s)")
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument(
        "--shape",
        choices=("8b", "tiny"),
        default="8b",
        help="of the model for vllm; tiny is for CPUs",
    )
    parser.add_argument(
        "--slow",
        type=float,
        default=4.0,
        metavar="F",
        help="sim: an H200's times, stretched so often (default %(default)s)",
    )
    parser.add_argument(
        "--gateway-processes",
        type=int,
        metavar="N",
        help="default one for every 4 workers where there are cores, else 1",
    )
    parser.add_argument(
        "--generators",
        type=int,
        metavar="N",
        help="default one for every 2 workers where there are cores, else 1",
    )


def _add_file_flags(parser: argparse.ArgumentParser) -> None:
    """Where the results and everything else go."""
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="DIR", help="default bench/results"
    )
    parser.add_argument(
        "--name", help="of the files in --out (default: fleet-ENGINE-HARDWARE-DATE)"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("/tmp/loraplex-fleet"),
        metavar="DIR",
        help="model, adapters, logs (default %(default)s)",
    )


class _Also(argparse.Action):
    """Adds `const` to a list."""

    def __call__(
        self,
        parser: Any,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), self.const])


def _numbers(text: str) -> list[int]:
    made = sorted({int(part) for part in text.split(",")})
    if made[0] < 1:
        raise argparse.ArgumentTypeError(f"{text}: a fleet has at least one worker")
    return made


def _rates(text: str) -> list[float]:
    made = sorted({float(part) for part in text.split(",")})
    if not 0 < made[0] <= made[-1] < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: a rate is above 0")
    return made


def _words(known: Sequence[str]) -> Any:
    def words(text: str) -> list[str]:
        made = text.split(",")
        unknown = [word for word in made if word not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: there are {', '.join(known)}")
        return made

    return words
