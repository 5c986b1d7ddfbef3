"""Pure. The rows of one or more `bench.engine.gpu` runs as a table, and Loraplex over vLLM row by
row.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Recorded = Mapping[str, Any]
"""One measured row: server, label, row, arguments, gpu, figures."""


def who(d: Recorded) -> str:
    return f"{d['server']} {d.get('label', '')}".strip()


def line(d: Recorded) -> str:
    f = d["figures"]
    if "stall" in f:
        x = f["stall"]
        stalls = f"stall p50 {x['stall_p50_ms']:.1f} ms, most {x['stall_max_ms']:.1f} ms"
        ttfts = f"TTFT {x['ttft_cold_ms']:.0f} cold, {x['ttft_warm_ms']:.0f} warm"
        return (
            f"| {who(d)} | {d['row']} | {stalls} | {ttfts} | | {x['gap_warm_ms']:.1f} (longest) | |"
        )
    ttft, itl = f["ttft"] or {"p50": 0, "p99": 0}, f["itl"] or {"p50": 0}
    return (
        f"| {who(d)} | {d['row']} | {f['throughput']['output_tokens_per_s']:,.0f} | "
        f"{ttft['p50'] * 1e3:.0f} | {ttft['p99'] * 1e3:.0f} "
        f"| {itl['p50'] * 1e3:.1f} | {f['requests']['failed']} |"
    )


def table(done: Sequence[Recorded]) -> str:
    head = [
        "| server | load | output tok/s | TTFT p50 ms | TTFT p99 ms | ITL p50 ms | errors |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *(line(d) for d in sorted(done, key=lambda d: (d["row"], who(d))))])


def ratios(done: Sequence[Recorded]) -> str:
    """Loraplex over vLLM, row by row: of the same label if there is one, else vLLM's of no label.
    The latest of each counts.
    """
    of = {
        (d["server"], d.get("label", ""), d["row"]): d for d in done if "throughput" in d["figures"]
    }
    lines: list[str] = []
    values: list[float] = []
    for (server, label, row), ours in of.items():
        theirs = of.get(("vllm", label, row)) or of.get(("vllm", "", row))
        if server != "loraplex" or theirs is None:
            continue
        values.append(_rate(ours) / _rate(theirs))
        notes = (
            []
            if ours.get("gpu") == theirs.get("gpu")
            else [f"{ours.get('gpu')} beside {theirs.get('gpu')}"]
        )
        differ = {
            k
            for k in {*ours.get("arguments", {}), *theirs.get("arguments", {})}
            if _argument(ours, k) != _argument(theirs, k)
        }
        notes += [
            f"{k}: {_argument(ours, k)} beside {_argument(theirs, k)}" for k in sorted(differ)
        ]
        lines.append(
            f"{row}{label and ' '}{label}: "
            f"{values[-1]:.3f}{' (' + '; '.join(notes) + ')' if notes else ''}"
        )
    return "\n".join(
        [
            *lines,
            f"median {statistics.median(values):.3f}" if values else "no row of both servers yet",
        ]
    )


def _rate(d: Recorded) -> float:
    return float(d["figures"]["throughput"]["output_tokens_per_s"])


def _argument(d: Recorded, name: str) -> Any:
    return d.get("arguments", {}).get(name)
