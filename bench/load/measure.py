"""Pure. What a load run counts and keeps: gaps between tokens, the outcome of each request, and
figures of a set of times.

Times are seconds from the start of the load, unless another origin is named. All latencies count
from the moment at which a request was *scheduled*, not from when it was sent. So a stalled server,
or a stalled generator, cannot hide the requests that it delayed ("coordinated omission", Gil Tene,
"How NOT to measure latency").
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SMALLEST_GAP_S = 1e-6
BUCKET_RATIO = 1.02
"""Neighbouring buckets of the gap histogram differ by 2%, so a percentile is within 1% of the true
one; 1,050 buckets reach 1,000 s.
"""
BIN_S = 0.25


class Histogram:
    """Counts of positive times in buckets of equal ratio: bounded memory, however many tokens are
    streamed.
    """

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self.count = 0
        self.sum_s = 0.0
        self.max_s = 0.0

    def add(self, time_s: float) -> None:
        self.counts[_bucket(time_s)] += 1
        self.count += 1
        self.sum_s += time_s
        if time_s > self.max_s:
            self.max_s = time_s

    def percentile(self, share: float) -> float:
        """The time that `share` (0 to 1) of the times do not exceed. Raises: ValueError if there
        are none.
        """
        if not self.count:
            raise ValueError("no times")
        rank, seen = math.ceil(share * self.count) or 1, 0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            if seen >= rank:
                return min(_bucket_s(bucket), self.max_s)
        raise AssertionError("the counts do not add up")

    def cdf(self) -> tuple[list[float], list[float]]:
        times_s, shares, seen = [], [], 0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            times_s.append(_bucket_s(bucket))
            shares.append(seen / self.count)
        return times_s, shares


_LOG_RATIO = math.log(BUCKET_RATIO)


def _bucket(time_s: float) -> int:
    return (
        0 if time_s <= SMALLEST_GAP_S else 1 + int(math.log(time_s / SMALLEST_GAP_S) / _LOG_RATIO)
    )


def _bucket_s(bucket: int) -> float:
    return 0.0 if bucket == 0 else SMALLEST_GAP_S * BUCKET_RATIO ** (bucket - 0.5)


class Meter:
    """What is counted while answers stream in: gaps between content chunks, and tokens per bin of
    the clock that starts at `start_s`.
    """

    def __init__(self, start_s: float = 0.0) -> None:
        self.start_s = start_s
        self.gaps = Histogram()
        self.gap = self.gaps.add
        self.tokens_by_bin: Counter[int] = Counter()

    def tokens(self, count: int, now: float) -> None:
        self.tokens_by_bin[int((now - self.start_s) / BIN_S)] += count


@dataclass(frozen=True, slots=True)
class LoadOutcome:
    """How one request went. `adapter` None is the base model; `error` None is success, else its
    kind; `output_tokens` as the server's usage says (`by_usage`), else content chunks; `cold` as
    the answer's headers say, None if they do not.
    """

    adapter: str | None
    scheduled_s: float
    started_s: float
    ended_s: float
    first_byte_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    status: int | None = None
    error: str | None = None
    detail: str = ""
    output_tokens: int = 0
    prompt_tokens: int = 0
    by_usage: bool = False
    cold: bool | None = None
    tier: str | None = None
    worker: str | None = None

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self._from_s

    @property
    def e2e_s(self) -> float:
        return self.ended_s - self._from_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None for an answer that was not streamed or
        has one token.
        """
        if self.first_token_s is None or self.last_token_s is None or self.output_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.output_tokens - 1)

    @property
    def lag_s(self) -> float:
        return max(0.0, self.started_s - self.scheduled_s)

    @property
    def _from_s(self) -> float:
        # The timer may fire a fraction of a millisecond early: then the request's life starts when
        # it was sent.
        return min(self.scheduled_s, self.started_s)


@dataclass(frozen=True, slots=True)
class Slo:
    """What a good request keeps within; None: not asked. `itl_s` bounds a request's mean time per
    output token after the first.
    """

    ttft_s: float | None = None
    itl_s: float | None = None
    e2e_s: float | None = None

    def asked(self) -> bool:
        return (self.ttft_s, self.itl_s, self.e2e_s) != (None, None, None)

    def kept_by(self, outcome: LoadOutcome) -> bool:
        return outcome.error is None and all(
            bound is None or (seen is not None and seen <= bound)
            for bound, seen in (
                (self.ttft_s, outcome.ttft_s),
                # One token has no gap, so it breaks no bound on gaps.
                (self.itl_s, outcome.tpot_s if outcome.output_tokens > 1 else 0.0),
                (self.e2e_s, outcome.e2e_s),
            )
        )


@dataclass(frozen=True, slots=True)
class LoadRun:
    """Everything a load run leaves behind. `warmed`: the adapters that the warm-up touched;
    `about`: what the JSON says about the run as given.
    """

    outcomes: Sequence[LoadOutcome]
    meter: Meter
    slo: Slo
    open_loop: bool
    cpu_s: float
    busy_share: float | None = None
    adapters_known: int = 0
    warmed: frozenset[str | None] = frozenset()
    warm_up: int = 0
    warm_up_failed: int = 0
    top: int = 20
    about: Mapping[str, Any] = field(default_factory=dict)


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value at `share` (0 to 1) of an ascending sequence, linear between neighbours (numpy's
    default). Raises: ValueError if it is empty.
    """
    if not ordered:
        raise ValueError("no values")
    at = share * (len(ordered) - 1)
    below = int(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (at - below)


def latency(times_s: Iterable[float | None]) -> dict[str, float] | None:
    """{count, mean, p50, p90, p99, max} of the times that there are, None if there are none."""
    ordered = sorted(time_s for time_s in times_s if time_s is not None)
    if not ordered:
        return None
    shares = {f"p{round(share * 100)}": percentile(ordered, share) for share in (0.5, 0.9, 0.99)}
    return {
        "count": len(ordered),
        "mean": sum(ordered) / len(ordered),
        **shares,
        "max": ordered[-1],
    }


def gap_latency(gaps: Histogram) -> dict[str, float] | None:
    if not gaps.count:
        return None
    shares = {f"p{round(share * 100)}": gaps.percentile(share) for share in (0.5, 0.9, 0.99)}
    return {"count": gaps.count, "mean": gaps.sum_s / gaps.count, **shares, "max": gaps.max_s}


def cold_flags(outcomes: Sequence[LoadOutcome], warmed: frozenset[str | None]) -> list[bool]:
    """Whether each request met a cold adapter: as its answer's headers say, else whether it is the
    first scheduled one of an adapter that the warm-up left out. The base model is never cold.
    """
    seen: set[str | None] = set(warmed)
    flags = [False] * len(outcomes)
    for index in sorted(range(len(outcomes)), key=lambda index: outcomes[index].scheduled_s):
        outcome = outcomes[index]
        first = outcome.adapter is not None and outcome.adapter not in seen
        seen.add(outcome.adapter)
        flags[index] = first if outcome.cold is None else outcome.cold
    return flags
