"""Pure. What a comparison measures, and its figures: medians with their spread, ratios of runs that
stood side by side, one table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeAlias

SCHEMA = "loraplex.bench.gateways/1"
YARDSTICK = "nginx"
COMPARED = ("A64", "C256", "D", "R")


@dataclass(frozen=True, slots=True)
class GatewayScenario:
    """A closed loop of `clients`. It ends after `requests` have been sent or `duration_s` has
    passed. `pace_ms` is the time between two tokens of a stream. None asks for whole answers.
    `unit` is what a cost is divided by. The clients begin within `ramp_s`: with 0 all at once, so
    that the time to the first token is that of the last one in a queue of them all.
    """

    name: str
    title: str
    clients: int
    requests: int
    tokens: int
    pace_ms: int | None
    duration_s: float
    unit: str
    ramp_s: float = 0.0


SCENARIOS = (
    GatewayScenario(
        "A64", "whole answers of 64 tokens, 64 clients", 64, 6_000, 64, None, 4.0, "request"
    ),
    GatewayScenario("C256", "256 streams, 100 tokens every 20 ms", 256, 768, 100, 20, 6.0, "token"),
    GatewayScenario(
        "D", "1,000 streams at once, 20 tokens every 50 ms", 1_000, 2_000, 20, 50, 20.0, "token"
    ),
    GatewayScenario(
        "R",
        "1,000 streams begun over 0.5 s, 20 tokens every 50 ms",
        1_000,
        2_000,
        20,
        50,
        20.0,
        "token",
        0.5,
    ),
    GatewayScenario("E", "one client, time to the first token", 1, 300, 2, 0, 3.0, "request"),
)
QUICK = (
    GatewayScenario(
        "A64", "whole answers of 64 tokens, 64 clients", 64, 1_000, 64, None, 2.0, "request"
    ),
    GatewayScenario("C256", "256 streams, 40 tokens every 20 ms", 256, 256, 40, 20, 6.0, "token"),
    GatewayScenario(
        "D", "1,000 streams at once, 10 tokens every 50 ms", 1_000, 1_000, 10, 50, 20.0, "token"
    ),
    GatewayScenario(
        "R",
        "1,000 streams begun over 0.5 s, 10 tokens every 50 ms",
        1_000,
        1_000,
        10,
        50,
        20.0,
        "token",
        0.5,
    ),
    GatewayScenario("E", "one client, time to the first token", 1, 50, 2, 0, 3.0, "request"),
)

Result: TypeAlias = dict[str, Any]
"""One run of one peer: {peer, scenario, repetition, cpu_us, engine_us, requests, tokens, failed,
errors {kind: count}, note, ttft_ms {p50, p99}, itl_ms {p50, p99}, rss_mb, processes, wall_s,
machine_busy}. `cpu_us` is of the gateway's process tree, per unit of the scenario.
"""


@dataclass(frozen=True, slots=True)
class RunSpread:
    median: float
    least: float
    most: float

    def text(self, digits: int) -> str:
        return f"{self.median:,.{digits}f} ({self.least:,.{digits}f}-{self.most:,.{digits}f})"


def spread(values: Sequence[float]) -> RunSpread | None:
    return RunSpread(median(values), min(values), max(values)) if values else None


def of(results: Sequence[Result], peer: str, scenario: str, key: str) -> list[float]:
    """The values of `key` (dots go deeper) in the good runs of a peer, by repetition."""
    found = []
    for result in sorted(results, key=lambda r: int(r["repetition"])):
        if result["peer"] == peer and result["scenario"] == scenario and not result["note"]:
            value: Any = result
            for part in key.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            if value is not None:
                found.append(float(value))
    return found


def ratios(
    results: Sequence[Result], peer: str, other: str, scenario: str, key: str = "cpu_us"
) -> list[float]:
    """Per repetition, so that both halves of a ratio were measured within the same seconds."""
    halves: dict[int, dict[str, float]] = {}
    for result in results:
        if result["scenario"] == scenario and not result["note"] and result[key]:
            halves.setdefault(result["repetition"], {})[result["peer"]] = result[key]
    return [
        half[peer] / half[other]
        for _, half in sorted(halves.items())
        if peer in half and other in half
    ]


def added_ttft_ms(results: Sequence[Result], peer: str, direct: str) -> list[float]:
    halves: dict[int, dict[str, float]] = {}
    for result in results:
        if result["scenario"] == "E" and not result["note"] and result["ttft_ms"]:
            halves.setdefault(result["repetition"], {})[result["peer"]] = result["ttft_ms"]["p50"]
    return [
        half[peer] - half[direct]
        for _, half in sorted(halves.items())
        if peer in half and direct in half
    ]


def summary(results: Sequence[Result], peers: Sequence[str], direct: str) -> dict[str, Any]:
    """{peer: {column: {median, least, most}}}."""
    made: dict[str, Any] = {}
    for peer in peers:
        rows = {name: spread(values) for name, values in _columns(results, peer, direct).items()}
        made[peer] = {
            name: None
            if row is None
            else {"median": row.median, "least": row.least, "most": row.most}
            for name, row in rows.items()
        }
    return made


def _columns(results: Sequence[Result], peer: str, direct: str) -> dict[str, list[float]]:
    columns = {
        "a64_us_per_request": of(results, peer, "A64", "cpu_us"),
        "c256_us_per_token": of(results, peer, "C256", "cpu_us"),
        "d_us_per_token": of(results, peer, "D", "cpu_us"),
        "r_us_per_token": of(results, peer, "R", "cpu_us"),
        "c256_with_engine_side_us": _sum(
            of(results, peer, "C256", "cpu_us"), of(results, peer, "C256", "engine_us")
        ),
        "added_ttft_ms": added_ttft_ms(results, peer, direct),
        "r_ttft_p50_ms": of(results, peer, "R", "ttft_ms.p50"),
        "r_ttft_p99_ms": of(results, peer, "R", "ttft_ms.p99"),
        "rss_d_mb": of(results, peer, "D", "rss_mb"),
    }
    for scenario in COMPARED:
        columns[f"{scenario.lower()}_to_{YARDSTICK}"] = ratios(results, peer, YARDSTICK, scenario)
    return columns


def _sum(left: list[float], right: list[float]) -> list[float]:
    return [a + b for a, b in zip(left, right, strict=True)] if len(left) == len(right) else []


HEADS = (
    ("a64_us_per_request", "A64 us/request", 0),
    ("c256_us_per_token", "C256 us/token", 1),
    ("d_us_per_token", "D us/token", 1),
    ("r_us_per_token", "R us/token", 1),
    ("c256_with_engine_side_us", "C256 + engine side", 1),
    ("added_ttft_ms", "added TTFT ms", 2),
    ("r_ttft_p50_ms", "R TTFT p50 ms", 0),
    ("r_ttft_p99_ms", "R TTFT p99 ms", 0),
    ("rss_d_mb", "RSS MB", 0),
)


def table(made: Mapping[str, Any]) -> str:
    """A Markdown table of a result document."""
    lines = [
        "| gateway | " + " | ".join(head for _, head, _ in HEADS) + " | failed |",
        "|---" * (len(HEADS) + 2) + "|",
    ]
    for peer, row in made["summary"].items():
        cells = [_cell(row[key], digits) for key, _, digits in HEADS]
        version = made["peers"][peer]["version"]
        lines.append(
            f"| {peer} {version} | " + " | ".join(cells) + f" | {_failed(made['results'], peer)} |"
        )
    lines += [
        "",
        f"| to {YARDSTICK}, of the same repetition | {' | '.join(COMPARED)} |",
        "|---" * (len(COMPARED) + 1) + "|",
    ]
    for peer, row in made["summary"].items():
        cells = [_cell(row[f"{s.lower()}_to_{YARDSTICK}"], 2) for s in COMPARED]
        lines.append(f"| {peer} | " + " | ".join(cells) + " |")
    lines += [
        f"\nskipped: {name}: {facts['skipped']}"
        for name, facts in made["peers"].items()
        if facts.get("skipped")
    ]
    notes = {(r["peer"], r["scenario"], r["note"]) for r in made["results"] if r["note"]}
    lines += [f"\n{peer}, {scenario}: {note}" for peer, scenario, note in sorted(notes)]
    return "\n".join(lines)


def _cell(value: Mapping[str, float] | None, digits: int) -> str:
    return (
        "-"
        if value is None
        else RunSpread(value["median"], value["least"], value["most"]).text(digits)
    )


def _failed(results: Sequence[Result], peer: str) -> str:
    failed = sum(r["failed"] for r in results if r["peer"] == peer)
    sent = sum(r["requests"] + r["failed"] for r in results if r["peer"] == peer)
    return f"{failed} of {sent:,}"
