"""Pure. From what a load run saw to figures: a JSON document, and a table for people.

The JSON document (`document`), schema `loraplex.bench.load/1`; every latency is {count, mean, p50,
p90, p99, max} in seconds or null:

    schema, started_at (ISO 8601, UTC), command [str], seed, versions {name: str}
    host        {cores, cpu_model, platform, busy_share}      busy_share: all processes of the
                machine during the run, 0 to 1, or null
    load        the workload and the settings of the run, as given
    duration_s  from the first scheduled request to the last answer
    requests    {sent, succeeded, failed, error_rate, warm_up, warm_up_failed}
    throughput  {requests_per_s, output_tokens_per_s, prompt_tokens_per_s, output_tokens,
                tokens_counted_by: usage|chunks|mixed}   successful requests
    goodput     null or {slo {ttft_s, itl_s, e2e_s}, requests_per_s, share}       share of all
                requests sent; a failed one is never good
    ttft, tpot, e2e        latencies of successful requests; tpot: mean time per output token after
    a request's first itl                    gaps between content chunks, of all streams, 1%
    resolution ttft_cold, ttft_warm, e2e_cold, e2e_warm, cold {by: header|first_seen|mixed} errors
    {kind: {count, sample}} adapters    {known, seen, top [{adapter, requests, failed, cold,
    output_tokens, ttft, e2e}]}     adapter null: the base model workers     {id: requests}, tiers
    {tier: requests}        from the answers' x-loraplex-* headers generator   {cpu_s,
    cpu_us_per_token, cpu_share, lag, kept_up}      lag: how late requests were sent, open loop only
    timeline    {bin_s, output_tokens [int], completed [int], failed [int]} warnings    [str]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bench.load.measure import BIN_S, LoadOutcome, LoadRun, cold_flags, gap_latency, latency

SCHEMA = "loraplex.bench.load/1"
LAG_WARNING_S = 0.010
CPU_SHARE_WARNING = 0.85
BUSY_WARNING = 0.97
MAX_WORKERS_LISTED = 256


def _cold_source(outcomes: Sequence[LoadOutcome]) -> str:
    told = sum(outcome.cold is not None for outcome in outcomes)
    asked = sum(outcome.adapter is not None or outcome.cold is not None for outcome in outcomes)
    return "first_seen" if not told else "header" if told == asked else "mixed"


def document(run: LoadRun) -> dict[str, Any]:
    """The JSON document described at the top of this module."""
    outcomes, good = run.outcomes, [outcome for outcome in run.outcomes if outcome.error is None]
    duration_s = _duration_s(outcomes)
    flags = cold_flags(outcomes, run.warmed)
    cold = [
        outcome
        for outcome, flag in zip(outcomes, flags, strict=True)
        if flag and outcome.error is None
    ]
    warm = [
        outcome
        for outcome, flag in zip(outcomes, flags, strict=True)
        if not flag and outcome.error is None
    ]
    failed = len(outcomes) - len(good)
    made: dict[str, Any] = {
        "schema": SCHEMA,
        **run.about,
        "duration_s": duration_s,
        "requests": {
            "sent": len(outcomes),
            "succeeded": len(good),
            "failed": failed,
            "error_rate": failed / len(outcomes) if outcomes else 0.0,
            "warm_up": run.warm_up,
            "warm_up_failed": run.warm_up_failed,
        },
        "throughput": _throughput(good, duration_s),
        "goodput": _goodput(run, duration_s),
        "ttft": latency(outcome.ttft_s for outcome in good),
        "itl": gap_latency(run.meter.gaps),
        "tpot": latency(outcome.tpot_s for outcome in good),
        "e2e": latency(outcome.e2e_s for outcome in good),
        "ttft_cold": latency(outcome.ttft_s for outcome in cold),
        "ttft_warm": latency(outcome.ttft_s for outcome in warm),
        "e2e_cold": latency(outcome.e2e_s for outcome in cold),
        "e2e_warm": latency(outcome.e2e_s for outcome in warm),
        "cold": {"by": _cold_source(outcomes)},
        "errors": _errors(outcomes),
        "adapters": _adapters(run, flags),
        "workers": dict(
            Counter(o.worker for o in outcomes if o.worker).most_common(MAX_WORKERS_LISTED)
        ),
        "tiers": dict(Counter(o.tier for o in outcomes if o.tier).most_common()),
        "generator": _generator(run, duration_s),
        "timeline": _timeline(run, duration_s),
    }
    made["warnings"] = _warnings(run, made)
    return made


def _duration_s(outcomes: Sequence[LoadOutcome]) -> float:
    if not outcomes:
        return 0.0
    return max(outcome.ended_s for outcome in outcomes) - min(
        min(outcome.scheduled_s, outcome.started_s) for outcome in outcomes
    )


def _per_s(count: float, duration_s: float) -> float:
    return count / duration_s if duration_s > 0 else 0.0


def _throughput(good: Sequence[LoadOutcome], duration_s: float) -> dict[str, Any]:
    output_tokens = sum(outcome.output_tokens for outcome in good)
    by_usage = sum(outcome.by_usage for outcome in good)
    return {
        "requests_per_s": _per_s(len(good), duration_s),
        "output_tokens_per_s": _per_s(output_tokens, duration_s),
        "prompt_tokens_per_s": _per_s(sum(outcome.prompt_tokens for outcome in good), duration_s),
        "output_tokens": output_tokens,
        "tokens_counted_by": "usage"
        if good and by_usage == len(good)
        else "mixed"
        if by_usage
        else "chunks",
    }


def _goodput(run: LoadRun, duration_s: float) -> dict[str, Any] | None:
    if not run.slo.asked():
        return None
    kept = sum(map(run.slo.kept_by, run.outcomes))
    return {
        "slo": asdict(run.slo),
        "requests_per_s": _per_s(kept, duration_s),
        "share": kept / len(run.outcomes) if run.outcomes else 0.0,
    }


def _errors(outcomes: Sequence[LoadOutcome]) -> dict[str, Any]:
    errors: dict[str, Any] = {}
    for outcome in outcomes:
        if outcome.error is not None:
            entry = errors.setdefault(outcome.error, {"count": 0, "sample": outcome.detail})
            entry["count"] += 1
    return dict(sorted(errors.items(), key=lambda item: -item[1]["count"]))


def _adapters(run: LoadRun, flags: Sequence[bool]) -> dict[str, Any]:
    groups: dict[str | None, list[tuple[LoadOutcome, bool]]] = {}
    for outcome, flag in zip(run.outcomes, flags, strict=True):
        groups.setdefault(outcome.adapter, []).append((outcome, flag))
    top = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0] or ""))[: run.top]
    return {
        "known": run.adapters_known,
        "seen": sum(name is not None for name in groups),
        "top": [
            _adapter_row(name, [outcome for outcome, _ in group], sum(flag for _, flag in group))
            for name, group in top
        ],
    }


def _adapter_row(adapter: str | None, outcomes: Sequence[LoadOutcome], cold: int) -> dict[str, Any]:
    good = [outcome for outcome in outcomes if outcome.error is None]
    return {
        "adapter": adapter,
        "requests": len(outcomes),
        "failed": len(outcomes) - len(good),
        "cold": cold,
        "output_tokens": sum(outcome.output_tokens for outcome in good),
        "ttft": latency(outcome.ttft_s for outcome in good),
        "e2e": latency(outcome.e2e_s for outcome in good),
    }


def _generator(run: LoadRun, duration_s: float) -> dict[str, Any]:
    tokens = sum(run.meter.tokens_by_bin.values())
    lag = latency(outcome.lag_s for outcome in run.outcomes) if run.open_loop else None
    share = _per_s(run.cpu_s, duration_s)
    return {
        "cpu_s": run.cpu_s,
        "cpu_us_per_token": run.cpu_s / tokens * 1e6 if tokens else None,
        "cpu_share": share,
        "lag": lag,
        "kept_up": share <= CPU_SHARE_WARNING and (lag is None or lag["p99"] <= LAG_WARNING_S),
    }


def _timeline(run: LoadRun, duration_s: float) -> dict[str, Any]:
    bins = int(duration_s / BIN_S) + 1
    completed = Counter(
        int(outcome.ended_s / BIN_S) for outcome in run.outcomes if outcome.error is None
    )
    failed = Counter(
        int(outcome.ended_s / BIN_S) for outcome in run.outcomes if outcome.error is not None
    )
    counts = {"output_tokens": run.meter.tokens_by_bin, "completed": completed, "failed": failed}
    return {
        "bin_s": BIN_S,
        **{name: [counter[index] for index in range(bins)] for name, counter in counts.items()},
    }


def _warnings(run: LoadRun, made: Mapping[str, Any]) -> list[str]:
    generator, warnings = made["generator"], []
    if generator["lag"] and generator["lag"]["p99"] > LAG_WARNING_S:
        warnings.append(
            f"the generator sent requests up to {generator['lag']['p99'] * 1e3:.0f} ms "
            "late (p99): the offered load was not kept"
        )
    if generator["cpu_share"] > CPU_SHARE_WARNING:
        warnings.append(
            f"the generator used {generator['cpu_share']:.0%} of a core: its own limit "
            "may be what was measured"
        )
    if run.busy_share is not None and run.busy_share > BUSY_WARNING:
        warnings.append(
            f"the machine was {run.busy_share:.0%} busy: server, generator and "
            "everything else fought for cores"
        )
    if made["throughput"]["tokens_counted_by"] != "usage" and made["requests"]["succeeded"]:
        warnings.append(
            "the server did not report usage on every answer: tokens there are counted "
            "as content chunks"
        )
    if run.warm_up_failed:
        warnings.append(f"{run.warm_up_failed} of {run.warm_up} warm-up requests failed")
    return warnings


def table(made: Mapping[str, Any]) -> str:
    """The document as text for people: one screen, milliseconds."""
    requests, throughput, goodput = made["requests"], made["throughput"], made["goodput"]
    lines = [
        f"requests    {requests['sent']} sent, {requests['succeeded']} ok, "
        f"{requests['failed']} failed ({requests['error_rate']:.2%}) "
        f"in {made['duration_s']:.2f} s",
        f"throughput  {throughput['requests_per_s']:.2f} requests/s, "
        f"{throughput['output_tokens_per_s']:,.0f} output tokens/s",
    ]
    if goodput:
        bounds = ", ".join(
            f"{name[:-2].upper()} <= {bound * 1e3:g} ms"
            for name, bound in goodput["slo"].items()
            if bound is not None
        )
        lines.append(
            f"goodput     {goodput['requests_per_s']:.2f} requests/s "
            f"({goodput['share']:.1%}) within {bounds}"
        )
    lines += ["", f"{'ms':<12}{'count':>9}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}{'max':>10}"]
    labels = {
        "TTFT": "ttft",
        "  cold": "ttft_cold",
        "  warm": "ttft_warm",
        "ITL": "itl",
        "TPOT": "tpot",
        "E2E": "e2e",
    }
    if made["ttft"] is None:
        labels = {"E2E": "e2e", "  cold": "e2e_cold", "  warm": "e2e_warm"}
    if made["e2e"] is None and not made["generator"]["lag"]:
        lines[-2:] = []  # no times to show: no head for them
    lines += [
        _latency_line(label, made[key]) for label, key in labels.items() if made[key] is not None
    ]
    if made["generator"]["lag"]:
        lines.append(_latency_line("sent late", made["generator"]["lag"]))
    lines += _adapter_lines(made["adapters"])
    for title in ("workers", "tiers"):
        if made[title]:
            shown = list(made[title].items())[:8]
            lines.append(
                f"{title:<12}"
                + ", ".join(f"{name} {count}" for name, count in shown)
                + (", ..." if len(made[title]) > 8 else "")
            )
    if made["errors"]:
        lines += ["", f"{'errors':<24}{'count':>6}  first one's message"]
        lines += [
            f"  {kind:<22}{entry['count']:>6}  {entry['sample'][:100]}"
            for kind, entry in made["errors"].items()
        ]
    per_token = made["generator"]["cpu_us_per_token"]
    cost = f", {per_token:.1f} us/token" if per_token is not None else ""
    lines += ["", f"generator   {made['generator']['cpu_share']:.0%} of a core{cost}"]
    lines += [f"WARNING     {warning}" for warning in made["warnings"]]
    return "\n".join(lines)


def _latency_line(label: str, figures: Mapping[str, float]) -> str:
    return f"{label:<12}{figures['count']:>9,}" + "".join(
        f"{figures[name] * 1e3:>10.2f}" for name in ("mean", "p50", "p90", "p99", "max")
    )


def _adapter_lines(adapters: Mapping[str, Any], most: int = 10) -> list[str]:
    """The hottest adapters; nothing if only the base model was asked."""
    if not adapters["seen"]:
        return []
    lines = [
        "",
        f"{'adapter':<28}{'requests':>9}{'failed':>8}{'cold':>6}"
        f"{'TTFT p50':>10}{'p99':>10}{'E2E p50':>10}{'p99':>10}",
    ]
    for row in adapters["top"][:most]:
        cells = [
            f"{row[key][name] * 1e3:>10.2f}" if row[key] else f"{'-':>10}"
            for key, name in (("ttft", "p50"), ("ttft", "p99"), ("e2e", "p50"), ("e2e", "p99"))
        ]
        lines.append(
            f"{(row['adapter'] or '(base model)')[:27]:<28}{row['requests']:>9}"
            f"{row['failed']:>8}{row['cold']:>6}" + "".join(cells)
        )
    hidden = (
        adapters["seen"]
        + any(row["adapter"] is None for row in adapters["top"])
        - len(adapters["top"][:most])
    )
    return [*lines, f"... and {hidden} more"] if hidden > 0 else lines
