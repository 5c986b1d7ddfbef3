"""Pure. The rows of `python -m bench.gateways`: one gateway in one scenario."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from bench.gateways.peers.comparison import GatewayScenario, Result


@dataclass(frozen=True, slots=True)
class GatewayCost:
    """What a gateway's process tree has used during one run, and its engine's CPU time."""

    wall_s: float
    cpu_s: float
    engine_s: float
    rss_bytes: int
    processes: int


def measured(
    name: str,
    scenario: GatewayScenario,
    repetition: int,
    made: dict[str, Any],
    cost: GatewayCost,
    delivered: int,
) -> Result:
    """One row: what `bench.load` has seen (`made`), and what that has cost. `delivered` counts the
    tokens of all answers, even of those that failed later: they have cost as much.
    """
    good, failed, tokens = (
        made["requests"]["succeeded"],
        made["requests"]["failed"],
        made["throughput"]["output_tokens"],
    )
    units = good if scenario.unit == "request" else delivered
    errors: Counter[str] = Counter({kind: entry["count"] for kind, entry in made["errors"].items()})
    if tokens != good * scenario.tokens:
        errors["wrong_token_count"] = 1
    return {
        **nothing(
            name,
            scenario.name,
            repetition,
            f"{failed:,} of {failed + good:,} requests failed" if failed > good else "",
        ),
        "cpu_us": cost.cpu_s / units * 1e6 if units else None,
        "engine_us": cost.engine_s / units * 1e6 if units else None,
        "requests": good,
        "tokens": tokens,
        "failed": failed,
        "errors": dict(errors),
        "ttft_ms": _ms(made["ttft"]),
        "itl_ms": _ms(made["itl"]),
        "rss_mb": cost.rss_bytes / 1e6,
        "processes": cost.processes,
        "wall_s": cost.wall_s,
        "machine_busy": made["host"]["busy_share"],
    }


def nothing(name: str, scenario: str, repetition: int, note: str) -> Result:
    """The row of a run that has no figures. `note` says why."""
    return {
        "peer": name,
        "scenario": scenario,
        "repetition": repetition,
        "cpu_us": None,
        "engine_us": None,
        "requests": 0,
        "tokens": 0,
        "failed": 0,
        "errors": {},
        "note": note,
        "ttft_ms": None,
        "itl_ms": None,
        "rss_mb": None,
        "processes": 0,
        "wall_s": None,
        "machine_busy": None,
    }


def _ms(figures: dict[str, float] | None) -> dict[str, float] | None:
    return None if figures is None else {key: figures[key] * 1e3 for key in ("p50", "p99")}


def line(r: Result) -> str:
    """The row for the terminal."""
    if r["note"]:
        return f"{r['repetition']}  {r['scenario']:<5} {r['peer']:<17} {r['note']}"
    ttft = (
        f"  TTFT p50 {r['ttft_ms']['p50']:.2f} p99 {r['ttft_ms']['p99']:.1f} ms"
        if r["ttft_ms"]
        else ""
    )
    cost = f"{r['cpu_us']:9.1f} us, engine {r['engine_us']:6.1f} us"
    errors = f"  ERRORS {r['errors']}" if r["errors"] else ""
    return (
        f"{r['repetition']}  {r['scenario']:<5} {r['peer']:<17} {cost}  {r['requests']:>5} "
        f"answers in {r['wall_s']:.1f} s{ttft}{errors}"
    )
