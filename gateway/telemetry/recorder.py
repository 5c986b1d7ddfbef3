"""Pure. What one gateway process remembers of the last hour, in a memory that does not grow: its
numbers in steps of ten seconds, and its last requests one by one.

It is told of a request once, at its end, and of the fleet once a second. A token costs nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import islice
from typing import TypeAlias

from gateway.telemetry.ended_request import EndedRequest

STEP_S = 10.0
STEPS = 360
"""An hour."""
MAX_REQUESTS = 500
"""Kept one by one; each is about 1 KB, with the candidates of its decision up to 10."""
MAX_CODES = 64
"""Codes of errors that are counted by name in one step; shared.errors has fewer."""
EXPLAINED_PER_S = 10.0
"""Decisions whose candidates are kept. To price every worker of 64 takes about 0.3 ms, which is
then below a hundredth of a core; a client that looks for its request in a busy second still finds
what its own worker was expected to cost.
"""
BOUNDS_S = tuple(0.001 * 2 ** (n / 4) for n in range(68))
"""Of the times to the first token: 1 ms to 110 s, each a fifth above the one before, so that a
quantile is wrong by a tenth at most.
"""
Series: TypeAlias = dict[str, list[float | None]]


class Spread:
    """How often values fell between two bounds."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.total = 0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(BOUNDS_S, value)] += 1
        self.total += 1

    def quantile(self, share: float) -> float | None:
        """The middle (of the logarithm) of the bounds that it lies between; None without values."""
        left = share * self.total
        for at, count in enumerate(self.counts):
            left -= count
            if count and left <= 0:
                low, high = BOUNDS_S[max(0, at - 1)], BOUNDS_S[min(at, len(BOUNDS_S) - 1)]
                return float((low * high) ** 0.5)
        return None


class Interval:
    """Ten seconds. `queued` and `ongoing` are the highest that were seen; `code` counts errors by
    their code.
    """

    __slots__ = (
        "cold",
        "errors",
        "evictions",
        "itl_n",
        "itl_s",
        "loads",
        "moved",
        "number",
        "ongoing",
        "output_tokens",
        "prompt_tokens",
        "queued",
        "requests",
        "warm",
    )

    def __init__(self, number: int) -> None:
        self.number = number
        self.warm, self.cold = Spread(), Spread()
        self.errors: dict[str, int] = {}
        self.requests = self.output_tokens = self.prompt_tokens = 0
        self.loads = self.evictions = self.moved = self.queued = self.ongoing = self.itl_n = 0
        self.itl_s = 0.0


class Recorder:
    """Times are seconds on the dispatcher's clock, as in EndedRequest."""

    def __init__(self, most_requests: int = MAX_REQUESTS) -> None:
        self._requests: deque[EndedRequest] = deque(maxlen=most_requests)
        self._steps: deque[Interval] = deque(maxlen=STEPS)
        self._loaded: dict[tuple[str, int], Set[object]] = {}
        self._explained_at = -1.0 / EXPLAINED_PER_S

    # ---- being told ------------------------------------------------------------------------------

    def explains(self, now: float) -> bool:
        """Whether the candidates of a decision that is made now are to be kept."""
        if now - self._explained_at < 1.0 / EXPLAINED_PER_S:
            return False
        self._explained_at = now
        return True

    def ended(self, ended: EndedRequest) -> None:
        """A request that the dispatcher had let in."""
        self._requests.append(ended)
        step = self._step(ended.t_end)
        step.requests += 1
        step.moved += ended.moves
        done = ended.done
        if ended.t_head and ended.streamed:
            ttft_s = ended.t_head - ended.t_start
            (step.cold if done is not None and done.load_s > 0 else step.warm).observe(ttft_s)
        if done is None:
            return
        step.prompt_tokens += done.prompt_tokens
        step.output_tokens += done.output_tokens
        told = ended.t_head and ended.streamed and not ended.moves
        if told and done.output_tokens > 1:
            step.itl_s += ended.t_end - ended.t_head
            step.itl_n += done.output_tokens - 1

    def refused(self, ended: EndedRequest) -> None:
        """A request that was not let in."""
        self._requests.append(ended)

    def error(self, code: str, now: float) -> None:
        """An error that the gateway answered, to whatever request."""
        errors = self._step(now).errors
        if code in errors or len(errors) < MAX_CODES:
            errors[code] = errors.get(code, 0) + 1

    def sample(
        self,
        now: float,
        queued: int,
        ongoing: int,
        loaded: Mapping[tuple[str, int], Set[object]],
    ) -> None:
        """The fleet as of now. `loaded`: by worker and its epoch, what is in its slots; a set
        that was given is never changed afterwards.
        """
        step = self._step(now)
        step.queued = max(step.queued, queued)
        step.ongoing = max(step.ongoing, ongoing)
        for life, keys in loaded.items():
            before = self._loaded.get(life)
            if before is not None and before is not keys:
                step.loads += len(keys - before)
                step.evictions += len(before - keys)
            elif before is None:
                step.loads += len(keys)
        self._loaded = dict(loaded)

    # ---- telling ---------------------------------------------------------------------------------

    def requests(
        self, *, tenant: str = "", adapter: str = "", worker: str = "", status: str = ""
    ) -> Iterator[EndedRequest]:
        """Newest first. `status` is an outcome or an error's code; what is empty is not asked."""
        for ended in reversed(self._requests):
            if (
                (not tenant or ended.tenant == tenant)
                and (not adapter or adapter in (ended.adapter, f"{ended.base}:{ended.adapter}"))
                and (not worker or ended.worker == worker)
                and (not status or status in (ended.outcome, ended.code))
            ):
                yield ended

    def find(self, request_id: str) -> EndedRequest | None:
        """The newest one of that id: clients may choose theirs."""
        return next((e for e in reversed(self._requests) if e.request_id == request_id), None)

    def series(self, now: float, steps: int = STEPS) -> Series:
        """The last `steps`, the one of now at the end; None where nothing was recorded."""
        last = int(now // STEP_S)
        by_number = {step.number: step for step in self._steps}
        rows = [_row(by_number.get(n)) for n in range(last - steps + 1, last + 1)]
        return {name: [row[at] for row in rows] for at, name in enumerate(COLUMNS)}

    def errors(self, now: float) -> dict[str, int]:
        """Of the last hour, by code."""
        total: dict[str, int] = {}
        for step in self._steps:
            if step.number > now // STEP_S - STEPS:
                for code, count in step.errors.items():
                    total[code] = total.get(code, 0) + count
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    def _step(self, now: float) -> Interval:
        number = int(now // STEP_S)
        steps = self._steps
        if steps and steps[-1].number >= number:
            return steps[-1]
        steps.append(Interval(number))
        return steps[-1]


COLUMNS = (
    "ttft_warm_p50_ms",
    "ttft_warm_p95_ms",
    "ttft_cold_p50_ms",
    "ttft_cold_p95_ms",
    "itl_ms",
    "output_tokens_per_s",
    "prompt_tokens_per_s",
    "requests_per_s",
    "queued",
    "ongoing",
    "loads",
    "evictions",
    "moved",
    "errors",
)


def _row(step: Interval | None) -> Sequence[float | None]:
    if step is None:
        return (None,) * len(COLUMNS)
    return (
        _ms(step.warm.quantile(0.5)),
        _ms(step.warm.quantile(0.95)),
        _ms(step.cold.quantile(0.5)),
        _ms(step.cold.quantile(0.95)),
        _ms(step.itl_s / step.itl_n) if step.itl_n else None,
        step.output_tokens / STEP_S,
        step.prompt_tokens / STEP_S,
        step.requests / STEP_S,
        step.queued,
        step.ongoing,
        step.loads,
        step.evictions,
        step.moved,
        sum(step.errors.values()),
    )


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)


def newest(found: Iterable[EndedRequest], most: int) -> list[EndedRequest]:
    return list(islice(found, most))
