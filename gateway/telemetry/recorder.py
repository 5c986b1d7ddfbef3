"""Pure. Remembers the last hour of one gateway process in bounded memory: numbers in steps of ten
seconds, and the last requests one by one.

It is called once per ended request, and once a second for the state of the fleet. It costs nothing
per token.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from heapq import merge
from itertools import islice, takewhile
from typing import TypeAlias

import msgspec

from gateway.advisor.traffic import TrafficCounter
from gateway.telemetry.ended_request import EndedRequest

STEP_S = 10.0
STEPS = 360
"""One hour."""
MAX_REQUESTS = 500
"""Requests that are kept one by one. Each takes about 1 KB, or up to 10 KB with its candidates."""
MAX_REFUSED = 200
"""Requests that were turned away, kept apart: a flood of them shall not push out all others."""
MAX_WORKERS = 1000
"""Workers whose restarts and moved streams are counted by name."""
MAX_NEWS = 50
"""Requests that have ended since the last look at `news`. In a busier second only the newest stay.
"""
MAX_CODES = 64
"""Error codes that are counted by name in one step. shared/errors.py has fewer."""
EXPLAINED_PER_S = 10.0
"""Decisions per second that are kept with all their candidates. To price every one of 64 workers
takes about 0.3 ms, so this costs less than a hundredth of a core.
"""
BOUNDS_S = tuple(0.001 * 2 ** (n / 4) for n in range(68))
"""Histogram bounds for times to the first token, from 1 ms to 110 s. Each is a fifth above the one
before, so a quantile is off by a tenth at most.
"""
Series: TypeAlias = dict[str, list[float | None]]


class LatencyHistogram(msgspec.Struct, array_like=True):
    """Counts values by the two bounds of BOUNDS_S between which they lie."""

    counts: list[int] = msgspec.field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    total: int = 0

    def plus(self, other: LatencyHistogram) -> LatencyHistogram:
        counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        return LatencyHistogram(counts, self.total + other.total)

    def observe(self, value: float) -> None:
        self.counts[bisect_left(BOUNDS_S, value)] += 1
        self.total += 1

    def quantile(self, share: float) -> float | None:
        """An estimate: the geometric mean of the two bounds around the quantile. None: there are no
        values.
        """
        left = share * self.total
        for at, count in enumerate(self.counts):
            left -= count
            if count and left <= 0:
                low, high = BOUNDS_S[max(0, at - 1)], BOUNDS_S[min(at, len(BOUNDS_S) - 1)]
                return float((low * high) ** 0.5)
        return None


class Interval(msgspec.Struct, array_like=True):
    """One step of ten seconds. `queued` and `ongoing` are the highest values seen in it. `errors`
    counts by error code. `itl_s` is the sum of `itl_n` times between tokens.
    """

    number: int
    warm: LatencyHistogram = msgspec.field(default_factory=LatencyHistogram)
    cold: LatencyHistogram = msgspec.field(default_factory=LatencyHistogram)
    errors: dict[str, int] = msgspec.field(default_factory=dict)
    requests: int = 0
    output_tokens: int = 0
    prompt_tokens: int = 0
    loads: int = 0
    evictions: int = 0
    moved: int = 0
    queued: int = 0
    ongoing: int = 0
    itl_n: int = 0
    itl_s: float = 0.0

    def plus(self, other: Interval) -> Interval:
        """The same step of two processes. Both see all loads and evictions of the fleet; of all
        else, each sees its own.
        """
        sums = {name: getattr(self, name) + getattr(other, name) for name in SUMMED}
        codes = dict.fromkeys((*self.errors, *other.errors))
        return Interval(
            self.number,
            self.warm.plus(other.warm),
            self.cold.plus(other.cold),
            {code: self.errors.get(code, 0) + other.errors.get(code, 0) for code in codes},
            loads=max(self.loads, other.loads),
            evictions=max(self.evictions, other.evictions),
            **sums,
        )


SUMMED = (
    *("requests", "output_tokens", "prompt_tokens", "moved", "queued", "ongoing"),
    *("itl_n", "itl_s"),
)
encode_steps = msgspec.json.Encoder().encode
decode_steps = msgspec.json.Decoder(list[Interval]).decode


def merged(steps: Iterable[Interval]) -> dict[int, Interval]:
    """Number -> the step of all processes."""
    found: dict[int, Interval] = {}
    for step in steps:
        known = found.get(step.number)
        found[step.number] = step if known is None else known.plus(step)
    return found


class Recorder:
    """All times are seconds on the dispatcher's clock, as in EndedRequest."""

    def __init__(self, most_requests: int = MAX_REQUESTS) -> None:
        self._requests: deque[EndedRequest] = deque(maxlen=most_requests)
        self._steps: deque[Interval] = deque(maxlen=STEPS)
        self._refused: deque[EndedRequest] = deque(maxlen=MAX_REFUSED)
        self._news: deque[EndedRequest] | None = None
        self._lives: dict[str, int] = {}
        self.restarts: dict[str, int] = {}
        """Worker -> how often a new life of it has come since this process began to look."""
        self.moved_from: dict[str, int] = {}
        """Worker -> streams that it had begun and another one went on with."""
        self._changes: dict[tuple[str, int], tuple[int, int]] = {}
        self._explained_at = -1.0 / EXPLAINED_PER_S
        self.traffic = TrafficCounter()

    # ---- recording -------------------------------------------------------------------------------

    def explains(self, now: float) -> bool:
        """Whether the candidates of a decision made at `now` should be kept."""
        if now - self._explained_at < 1.0 / EXPLAINED_PER_S:
            return False
        self._explained_at = now
        return True

    def ended(self, ended: EndedRequest) -> None:
        """Records a request that the dispatcher had let in."""
        self._requests.append(ended)
        if self._news is not None:
            self._news.append(ended)
        step = self._step(ended.t_end)
        step.requests += 1
        step.moved += ended.moves
        step.prompt_tokens += ended.prompt_tokens
        step.output_tokens += ended.output_tokens
        done, ttft_s = ended.done, ended.first_token_s
        if ended.t_sent and done is not None:
            self.traffic.current(ended.base, ended.t_end).add(
                ended.adapter,
                ended.t_end - ended.t_sent,
                ended.t_head - ended.t_sent if ttft_s is not None else None,
                done.load_s or None,
                done.prompt_tokens,
                done.output_tokens,
            )
        if ttft_s is not None:
            (step.cold if done is not None and done.load_s > 0 else step.warm).observe(ttft_s)
            if done is not None and not ended.moves and done.output_tokens > 1:
                step.itl_s += ended.t_end - ended.t_head
                step.itl_n += done.output_tokens - 1

    def refused(self, ended: EndedRequest) -> None:
        """Records a request that was not let in."""
        self._refused.append(ended)
        if self._news is not None:
            self._news.append(ended)

    def moved(self, worker: str) -> None:
        """Counts a stream that has lost this worker and goes on elsewhere."""
        if worker not in self.moved_from and len(self.moved_from) >= MAX_WORKERS:
            del self.moved_from[next(iter(self.moved_from))]  # pods have a new name each time
        self.moved_from[worker] = self.moved_from.pop(worker, 0) + 1  # it is the newest now

    def error(self, code: str, now: float) -> None:
        """Counts an error that the gateway answered, whichever path was asked."""
        errors = self._step(now).errors
        if code in errors or len(errors) < MAX_CODES:
            errors[code] = errors.get(code, 0) + 1

    def sample(
        self,
        now: float,
        queued: int,
        ongoing: int,
        changes: Mapping[tuple[str, int], tuple[int, int]],
    ) -> None:
        """Records the state of the fleet at `now`. `changes` maps (worker, epoch) to the loads into
        its slots and the evictions from them so far.
        """
        step = self._step(now)
        step.queued = max(step.queued, queued)
        step.ongoing = max(step.ongoing, ongoing)
        for life, (loads, evictions) in changes.items():
            self._note_life(*life)
            loads_before, evictions_before = self._changes.get(life, (0, 0))
            step.loads += loads - loads_before
            step.evictions += evictions - evictions_before
        self._changes = dict(changes)

    def _note_life(self, worker: str, epoch: int) -> None:
        known = self._lives.pop(worker, None)  # those that are there stay behind those that are not
        if known is None and len(self._lives) >= MAX_WORKERS:
            oldest = next(iter(self._lives))
            del self._lives[oldest]
            self.restarts.pop(oldest, None)
        elif known is not None and known != epoch:
            self.restarts[worker] = self.restarts.get(worker, 0) + 1
        self._lives[worker] = epoch

    # ---- reading ---------------------------------------------------------------------------------

    def follow(self, wanted: bool) -> None:
        """Whether `news` are kept. While nobody looks they are not."""
        self._news = deque(maxlen=MAX_NEWS) if wanted else None

    def news(self) -> list[EndedRequest]:
        """The requests that have ended since the last call, the newest first."""
        found = list(reversed(self._news or ()))
        if self._news is not None:
            self._news.clear()
        return found

    def since(self, time: float) -> list[EndedRequest]:
        """The requests that have ended after `time`, the newest first; MAX_NEWS at most."""
        return newest(takewhile(lambda e: e.t_end > time, self._newest()), MAX_NEWS)

    def requests(
        self, *, tenant: str = "", adapter: str = "", worker: str = "", status: str = ""
    ) -> Iterator[EndedRequest]:
        """The requests that match all filters, the newest first. `status` is an outcome or an error
        code. An empty filter matches every request.
        """
        for ended in self._newest():
            if (
                (not tenant or ended.tenant == tenant)
                and (not adapter or adapter in (ended.adapter, f"{ended.base}:{ended.adapter}"))
                and (not worker or ended.worker == worker)
                and (not status or status in _statuses(ended))
            ):
                yield ended

    def find(self, request_id: str) -> EndedRequest | None:
        """The newest request with this id, or None. Clients choose ids, so two requests may have
        the same.
        """
        return next((e for e in self._newest() if e.request_id == request_id), None)

    def _newest(self) -> Iterator[EndedRequest]:
        """All that are kept, the newest first."""
        refused, let_in = reversed(self._refused), reversed(self._requests)
        return merge(refused, let_in, key=lambda e: e.t_end, reverse=True)

    @property
    def steps(self) -> Sequence[Interval]:
        """The last hour, oldest first, without the steps in which nothing happened."""
        return list(self._steps)

    def series(self, now: float, steps: int = STEPS, others: Iterable[Interval] = ()) -> Series:
        """Column -> one value per step, for the last `steps` steps up to the current one. None:
        nothing was recorded in that step. `others` are the steps of other processes.
        """
        last = int(now // STEP_S)
        by_number = merged((*self._steps, *others))
        # each process sees all of them, but not in the same step; its first one may be half a step
        for own in islice(self._steps, 1, None):
            by_number[own.number].loads = own.loads
            by_number[own.number].evictions = own.evictions
        rows = [_row(by_number.get(n)) for n in range(last - steps + 1, last + 1)]
        return {name: [row[at] for row in rows] for at, name in enumerate(COLUMNS)}

    def errors(self, now: float, others: Iterable[Interval] = ()) -> dict[str, int]:
        """Error code -> number of errors in the last hour, the most frequent first."""
        total: dict[str, int] = {}
        for step in (*self._steps, *others):
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


def _statuses(ended: EndedRequest) -> tuple[str, ...]:
    if ended.engine_status:
        return ended.outcome, str(ended.engine_status)
    return ended.outcome, ended.code


def newest(found: Iterable[EndedRequest], most: int) -> list[EndedRequest]:
    return list(islice(found, most))
