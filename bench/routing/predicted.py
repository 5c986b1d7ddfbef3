"""Shell. `python -m bench.routing.predicted`: the time to the first token that routing expected,
beside the one that it took.

It starts the demo, a gateway and two vLLM workers of 4 slots for 8 adapters, and sends it streams
at several rates. Of each request the gateway keeps what its policy expected (GET
/admin/requests/ID). The table has the median and the quartiles of expected over actual for each
rate. The first requests of a rate, which the policy learns from, do not count.

Exit status: 0; 1 if a median is not within 0.8 to 1.25.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import urllib.request
from dataclasses import dataclass
from typing import Any

import msgspec
import uvloop

from bench import ROOT
from bench.load.__main__ import measure
from bench.load.options import parse
from gateway.supervisor.background_server import BackgroundServer
from shared.config.settings_file import load_settings

ADAPTERS = "pirate,shouting,haiku,json,polite,emoji,bullets,robot"
COMMON = ["--model", "demo", "--prompt-tokens", "64", "--output-tokens", "48", "--ignore-eos"]
MIXES = {
    "base model": ["--mix", "base"],
    "4 adapters, warm": ["--mix", "uniform", "--adapters", "pirate,shouting,haiku,json"],
    "8 adapters, Zipf": ["--mix", "zipf", "--adapters", ADAPTERS],
}
LOWEST, HIGHEST = 0.8, 1.25
KEPT = 500
"""Requests that a gateway process remembers."""


@dataclass(frozen=True, slots=True)
class Prediction:
    expected_ms: float
    actual_ms: float

    @property
    def ratio(self) -> float:
        return self.expected_ms / self.actual_ms


def prediction_of(timeline: dict[str, Any]) -> Prediction | None:
    """None: the first token's time, or what was expected, is unknown."""
    decision = timeline["decision"]
    terms, actual_ms = decision["chosen_terms_ms"], decision["happened_ms"]
    if not terms or not actual_ms or timeline["attempts"] != 1:
        return None
    own = ("queue", "line", "load", "outside")
    return Prediction(sum(terms[term] for term in own), actual_ms)


def quartiles(ratios: list[float]) -> tuple[float, float, float]:
    """The first, the median, and the third."""
    first, middle, third = statistics.quantiles(ratios, n=4)
    return first, middle, third


def fetch(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


def predictions(url: str, requests: int) -> list[Prediction]:
    """Of the last requests, the oldest first."""
    rows = fetch(f"{url}/admin/requests?limit={requests}")["requests"]
    found = [prediction_of(fetch(f"{url}/admin/requests/{row['id']}")) for row in rows]
    return [p for p in found if p is not None][::-1]


def row(name: str, rate: float, found: list[Prediction]) -> tuple[str, float]:
    """A line of the table, and the median."""
    first, middle, third = quartiles([p.ratio for p in found])
    expected = statistics.median(p.expected_ms for p in found)
    actual = statistics.median(p.actual_ms for p in found)
    return (
        f"| {name} | {rate:g} | {len(found)} | {expected:.0f} | {actual:.0f} "
        f"| {middle:.2f} | {first:.2f} to {third:.2f} |",
        middle,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.routing.predicted")
    parser.add_argument("--rates", type=float, nargs="+", default=[2.0, 6.0, 12.0])
    parser.add_argument("--requests", type=int, default=120, help="of each row, a third to learn")
    flags = parser.parse_args()
    if flags.requests > KEPT:
        parser.error(f"a gateway remembers {KEPT} requests")
    settings = load_settings(ROOT / "examples" / "demo.yaml")
    medians = []
    with tempfile.TemporaryDirectory() as folder:
        gateway = msgspec.structs.replace(
            settings.gateway, port=0, state_dir=folder, log_level="error"
        )
        with BackgroundServer.start(msgspec.structs.replace(settings, gateway=gateway)) as server:
            url = server.url.removesuffix("/v1")
            print("| load | requests/s | counted | expected ms | actual ms | ratio | quartiles |")
            print("|---" * 7 + "|", flush=True)
            for name, mix in MIXES.items():
                for rate in flags.rates:
                    load = ["--rate", f"{rate:g}", "--requests", f"{flags.requests}", "--quiet"]
                    uvloop.run(measure(parse(["--url", url, *COMMON, *mix, *load])))
                    counted = flags.requests * 2 // 3
                    line, median = row(name, rate, predictions(url, counted))
                    medians.append(median)
                    print(line, flush=True)
    return 0 if all(LOWEST <= median <= HIGHEST for median in medians) else 1


if __name__ == "__main__":
    sys.exit(main())
