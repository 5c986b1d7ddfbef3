"""Pure. From what the load generators saw to the figures of a row, and from rows to ratios and a
table.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import msgspec

from bench.fleet.plan import OURS
from bench.load.measure import BIN_S, LoadOutcome, latency

RecordedRow: TypeAlias = Mapping[str, Any]

BACK = 0.9
"""Throughput is back at this share of what it was: requests of a Poisson stream vary by about a
tenth over a few seconds.
"""
HOLD_S = 2.0
"""... if it stays there on average for so long."""
GIVEN_UP = "timeout"
LATE_S = 0.010
BUSY = 0.85


class Seen(msgspec.Struct):
    """What one generator saw. Times of `outcomes` count from `start_s`, which is on a clock that
    all processes of this machine share.
    """

    start_s: float
    outcomes: list[LoadOutcome]
    tokens_by_bin: dict[int, int]
    cpu_share: float = 0.0
    machine_busy: float | None = None


def together(parts: Sequence[Seen]) -> Seen:
    """Several generators as one that started with the first of them. Raises: ValueError if there is
    none.
    """
    start_s = min(part.start_s for part in parts)
    outcomes: list[LoadOutcome] = []
    bins: Counter[int] = Counter()
    for part in parts:
        late_s = part.start_s - start_s
        outcomes += [_later(outcome, late_s) for outcome in part.outcomes]
        for at, count in part.tokens_by_bin.items():
            bins[at + int(late_s / BIN_S)] += count
    busy = [part.machine_busy for part in parts if part.machine_busy is not None]
    return Seen(
        start_s,
        outcomes,
        dict(bins),
        max(part.cpu_share for part in parts),
        max(busy, default=None),
    )


def _later(outcome: LoadOutcome, by_s: float) -> LoadOutcome:
    def moved(time_s: float | None) -> float | None:
        return None if time_s is None else time_s + by_s

    return replace(
        outcome,
        scheduled_s=outcome.scheduled_s + by_s,
        started_s=outcome.started_s + by_s,
        ended_s=outcome.ended_s + by_s,
        first_byte_s=moved(outcome.first_byte_s),
        first_token_s=moved(outcome.first_token_s),
        last_token_s=moved(outcome.last_token_s),
    )


def tokens_within(outcomes: Sequence[LoadOutcome], from_s: float, until_s: float) -> float:
    """Output tokens between two moments. The tokens of an answer count as evenly spread from its
    first to its last.
    """
    total = 0.0
    for outcome in outcomes:
        if outcome.first_token_s is None or outcome.last_token_s is None:
            continue
        lasted_s = outcome.last_token_s - outcome.first_token_s
        if lasted_s <= 0:
            total += outcome.output_tokens if from_s <= outcome.first_token_s < until_s else 0
        else:
            shared_s = min(until_s, outcome.last_token_s) - max(from_s, outcome.first_token_s)
            total += outcome.output_tokens * max(0.0, shared_s) / lasted_s
    return total


def figures(seen: Seen, from_s: float, until_s: float) -> dict[str, Any]:
    """The load between two moments: tokens that came then, requests that were due then. `cold`: the
    adapter was in no slot as the request came. A request that was given up before its first token
    counts with its age then.
    """
    due = [o for o in seen.outcomes if from_s <= o.scheduled_s < until_s]
    good = [o for o in due if o.error is None]
    lag = latency(o.lag_s for o in due) or {"p99": 0.0}
    return {
        "window_s": until_s - from_s,
        "output_tokens_per_s": tokens_within(seen.outcomes, from_s, until_s) / (until_s - from_s),
        "requests": {"due": len(due), "succeeded": len(good), **failures(due)},
        "ttft": latency(
            o.e2e_s if o.ttft_s is None else o.ttft_s for o in due if o.error in (None, GIVEN_UP)
        ),
        "ttft_warm": latency(o.ttft_s for o in good if o.tier == "gpu"),
        "ttft_cold": latency(o.ttft_s for o in good if o.tier not in (None, "gpu")),
        "tpot": latency(o.tpot_s for o in good),
        "tiers": dict(Counter(o.tier for o in good if o.tier)),
        "workers": dict(Counter(o.worker for o in good if o.worker)),
        "generator": {
            "cpu_share": seen.cpu_share,
            "lag_p99_s": lag["p99"],
            "machine_busy": seen.machine_busy,
            "kept_up": seen.cpu_share <= BUSY and lag["p99"] <= LATE_S,
        },
    }


def failures(outcomes: Sequence[LoadOutcome]) -> dict[str, Any]:
    """Requests that got nothing, and answers that broke off after their first token: the latter
    cannot be sent again, the former must not fail.
    """
    failed = [o for o in outcomes if o.error is not None]
    before = sum(o.first_token_s is None for o in failed)
    return {
        "failed_before_first_byte": before,
        "broken_off": len(failed) - before,
        "errors": dict(Counter(o.error for o in failed)),
        "samples": {o.error: o.detail for o in failed},
    }


def recovery_s(
    tokens: Sequence[float], bin_s: float, at_s: float, settled_s: float
) -> float | None:
    """Seconds after `at_s` until throughput is back. It is back when its mean over HOLD_S is at
    least BACK of the mean before. None: it never is.

    `tokens` are counts of bins; before means from `settled_s` to `at_s`.
    """
    at, settled, hold = _bin(at_s, bin_s), _bin(settled_s, bin_s), round(HOLD_S / bin_s)
    before = tokens[settled:at]
    if not before:
        return None
    wanted = BACK * statistics.fmean(before)
    for start in range(at, len(tokens) - hold + 1):
        if statistics.fmean(tokens[start : start + hold]) >= wanted:
            return max(0.0, start * bin_s - at_s)
    return None


def lowest_share(
    tokens: Sequence[float], bin_s: float, at_s: float, settled_s: float
) -> float | None:
    """The worst second after `at_s`, against the mean before it."""
    at, settled, second = _bin(at_s, bin_s), _bin(settled_s, bin_s), round(1 / bin_s)
    before = tokens[settled:at]
    sums = [sum(tokens[start : start + second]) for start in range(at, len(tokens) - second + 1)]
    return (
        min(sums) / (statistics.fmean(before) * second) if before and sums and any(before) else None
    )


def _bin(at_s: float, bin_s: float) -> int:
    """The first one for a moment before the load began: on a busy machine it may begin late."""
    return max(0, int(at_s / bin_s))


def served_again_s(
    outcomes: Sequence[LoadOutcome], worker: str, restarted_s: float
) -> float | None:
    """When the first answer of a worker that was started at `restarted_s` began. None: it gave
    none.
    """
    times = [
        o.first_token_s
        for o in outcomes
        if o.worker == worker and o.first_token_s is not None and o.first_token_s > restarted_s
    ]
    return min(times, default=None)


# ---- rows together -------------------------------------------------------------------------------


def linear(tokens_per_s: Mapping[int, float]) -> dict[int, float]:
    """Throughput per worker against that of the smallest fleet: 1 is linear."""
    if not tokens_per_s:
        return {}
    least = min(tokens_per_s)
    each = tokens_per_s[least] / least
    return {n: made / n / each for n, made in sorted(tokens_per_s.items()) if each}


def scale(rows: Sequence[RecordedRow], part: str = "scale") -> dict[int, float]:
    """Output tokens/s against workers, the latest row of each."""
    return {
        row["workers"]: row["figures"]["output_tokens_per_s"] for row in rows if row["part"] == part
    }


def pace(row: RecordedRow) -> str:
    """Of an open loop, for people. Rows of earlier calls have no `rps`."""
    return (
        f"{row['share']:.0%} of capacity"
        if row["share"] is not None
        else f"{row['rps']:g} requests/s a worker"
    )


def paces(rows: Sequence[RecordedRow]) -> list[str]:
    """All that policies were compared at, lowest first."""
    found = {
        pace(row): (row["share"] or 0.0, row.get("rps") or 0.0)
        for row in rows
        if row["part"] == "policies"
    }
    return sorted(found, key=lambda each: found[each])


def medians(rows: Sequence[RecordedRow]) -> dict[tuple[str, str], dict[str, float]]:
    """Of each policy and pace, the medians over the repetitions, seconds; what no repetition has is
    missing.
    """
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        if row["part"] == "policies":
            cell = found.setdefault((row["policy"], pace(row)), {})
            for name in ("ttft", "ttft_warm", "ttft_cold"):
                for rank in ("mean", "p50", "p99"):
                    if row["figures"][name]:
                        cell.setdefault(f"{name}_{rank}", []).append(row["figures"][name][rank])
            if row.get("expected_over_actual"):
                ratio = row["expected_over_actual"]["p50"]
                cell.setdefault("expected_over_actual", []).append(ratio)
            cell.setdefault("loads_per_1000", []).append(row["loads"]["per_1000_requests"])
            cell.setdefault("tokens_per_s", []).append(row["figures"]["output_tokens_per_s"])
            cell.setdefault("failed", []).append(
                sum(
                    row["figures"]["requests"][k]
                    for k in ("failed_before_first_byte", "broken_off")
                )
            )
    return {
        key: {name: statistics.median(values) for name, values in cell.items()}
        for key, cell in found.items()
    }


def line(row: RecordedRow) -> str:
    """One row for people."""
    f, cost = row["figures"], row["gateway"]["us_per_token"]
    fates = row["kill"] if row["part"] == "kill" else f["requests"]
    failed = f"failed {fates['failed_before_first_byte']}, broken off {fates['broken_off']}"
    shown = [
        f"{row['key']:<38}",
        f"{f['output_tokens_per_s']:>9,.0f} tok/s",
        f"TTFT {_ms(f['ttft'])}",
    ]
    shown += [
        f"warm {_ms(f['ttft_warm'])}",
        f"cold {_ms(f['ttft_cold'])}",
        f"{row['loads']['per_1000_requests']:.0f} loads/1000",
        failed,
    ]
    shown += [f"gateway {cost:.1f} us/token"] if cost is not None else []
    if row["part"] == "kill":
        k = row["kill"]
        shown += [
            f"back after {_s(k['throughput_back_s'])}",
            f"worker serves again after {_s(k['worker_serves_again_s'])}",
        ]
    if row.get("expected_over_actual"):
        shown.append(f"expected/actual {row['expected_over_actual']['p50']:.2f}")
    shown += [] if f["generator"]["kept_up"] else ["GENERATOR LATE"]
    return "  ".join(shown)


def _ms(times: Mapping[str, float] | None) -> str:
    """Mean, median and 99th percentile."""
    if times is None:
        return "-"
    return "/".join(f"{times[name] * 1e3:,.0f}" for name in ("mean", "p50", "p99")) + " ms"


def _s(time_s: float | None) -> str:
    return "never" if time_s is None else f"{time_s:.1f} s"


def table(rows: Sequence[RecordedRow]) -> str:
    """The short table at the end, Markdown."""
    return "\n\n".join(
        part
        for part in (_scale_table(rows), _policy_table(rows), _kill_table(rows), _mixed_table(rows))
        if part
    )


def _scale_table(rows: Sequence[RecordedRow]) -> str:
    lines = []
    for part, load in (("scale", "adapters"), ("base", "base model")):
        made = scale(rows, part)
        costs = {r["workers"]: r["gateway"] for r in rows if r["part"] == part}
        for n, ratio in linear(made).items():
            g = costs[n]
            cost = f"{g['us_per_token'] or 0:.1f} | {g['cores']:.2f} | {g['processes']}"
            lines.append(f"| {load} | {n} | {made[n]:,.0f} | {ratio:.2f} | {cost} |")
    head = [
        "| load | workers | output tok/s | to linear | gateway us/token | gateway "
        "cores | processes |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *lines]) if lines else ""


def _policy_table(rows: Sequence[RecordedRow]) -> str:
    cells = medians(rows)
    if not cells:
        return ""
    names = (
        "ttft_mean",
        "ttft_p50",
        "ttft_p99",
        "ttft_warm_p50",
        "ttft_warm_p99",
        "ttft_cold_p50",
        "ttft_cold_p99",
    )
    head = " | ".join(
        name.replace("_", " ")
        .replace("ttft", "TTFT")
        .replace("mean", "mean ms")
        .replace("p50", "p50 ms")
        .replace("p99", "p99 ms")
        for name in names
    )
    lines = [
        f"| load | policy | {head} | expected/actual | loads/1,000 | tok/s | failed |",
        "|---" * (len(names) + 6) + "|",
    ]
    order = paces(rows)
    for policy, at in sorted(cells, key=lambda key: (order.index(key[1]), key[0] != OURS, key[0])):
        cell = cells[policy, at]
        shown = " | ".join(f"{cell[name] * 1e3:,.0f}" if name in cell else "-" for name in names)
        ratio = cell.get("expected_over_actual")
        rest = "- | " if ratio is None else f"{ratio:.2f} | "
        rest += f"{cell['loads_per_1000']:.0f} | {cell['tokens_per_s']:,.0f} | {cell['failed']:g}"
        lines.append(f"| {at} | {policy} | {shown} | {rest} |")
    return "\n".join([*lines, *_to_ray(rows), *_mixed_runs(rows)])


def _to_ray(rows: Sequence[RecordedRow]) -> list[str]:
    """Pairs have the same requests at the same moments, so it is pairs that are compared."""
    waits = {
        (row["policy"], pace(row), row.get("repetition", 0)): row["figures"]["ttft"]
        for row in rows
        if row["part"] == "policies" and row["figures"]["ttft"]
    }
    made = []
    for at in paces(rows):
        pairs = [
            (waits[OURS, at, again], ray)
            for (policy, offered, again), ray in waits.items()
            if (policy, offered) == ("ray", at) and (OURS, at, again) in waits
        ]
        if pairs:
            mean, p99 = (
                statistics.geometric_mean(ours[name] / ray[name] for ours, ray in pairs)
                for name in ("mean", "p99")
            )
            made.append(
                f"\nTTFT of {OURS} to ray's at {at}: mean {mean:.2f}, p99 {p99:.2f} "
                f"(pairs: {len(pairs)})"
            )
    return made


def _mixed_runs(rows: Sequence[RecordedRow]) -> list[str]:
    runs = {row["run"] for row in rows if row["part"] == "policies"}
    return (
        [f"\nThe policies were measured in {len(runs)} runs, not in one."] if len(runs) > 1 else []
    )


def _kill_table(rows: Sequence[RecordedRow]) -> str:
    lines = []
    for row in (row for row in rows if row["part"] == "kill"):
        k = row["kill"]
        worst = (
            ""
            if k["lowest_second"] is None
            else f"worst second {k['lowest_second']:.0%} of before, "
        )
        lines.append(
            f"{k['worker']} of {row['workers']} killed at {pace(row)}, "
            f"{k['in_flight']} requests in flight there: "
            f"{k['failed_before_first_byte']} failed before the first byte, "
            f"{k['broken_off']} streams broken off, {worst}"
            f"throughput back after {_s(k['throughput_back_s'])}, the restarted worker "
            f"serves after {_s(k['worker_serves_again_s'])}"
        )
    return "\n".join(lines)


def _mixed_table(rows: Sequence[RecordedRow]) -> str:
    lines = []
    for row in (row for row in rows if row["part"] == "mixed"):
        for model, f in row["models"].items():
            failed = f["requests"]["failed_before_first_byte"] + f["requests"]["broken_off"]
            lines.append(
                f"mixed, {model}: {f['output_tokens_per_s']:,.0f} tok/s, TTFT "
                f"{_ms(f['ttft'])}, {failed} failed"
            )
    return "\n".join(lines)
