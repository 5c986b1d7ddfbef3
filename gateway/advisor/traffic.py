"""Pure. The traffic of a base model as the advisor needs it: how often each adapter is asked for,
and how long a request holds its place. It is counted while a gateway runs, or read from its access
log.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, TypeAlias

import msgspec

from gateway.advisor.times import Times

WINDOW_S = 1800.0
"""Half of what is looked back on: the window that fills, and the one before it."""
MAX_NAMES = 20_000
"""Of adapters, in one window."""


@dataclass(slots=True)
class Traffic:
    """`counts` are requests by adapter; `others` are those for the base model, or beyond MAX_NAMES.
    `held` is how long requests held a worker's place, without the wait for their adapter. `warm`
    are their times from there to the first token when the adapter was in its slot. `loads` are the
    times that others waited for their adapter, for a free slot too.
    """

    span_s: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    others: int = 0
    held: Times = field(default_factory=Times)
    warm: Times = field(default_factory=Times)
    loads: Times = field(default_factory=Times)
    prompt_tokens: int = 0
    output_tokens: int = 0

    @property
    def requests(self) -> int:
        return self.others + sum(self.counts.values())

    def add(
        self,
        adapter: str | None,
        held_s: float,
        ttft_s: float | None,
        load_s: float | None,
        prompt_tokens: int = 0,
        output_tokens: int = 0,
    ) -> None:
        """One request that has ended, `held_s` after its worker got it. `load_s` None: its adapter
        was in a slot. `ttft_s` None: it was not streamed.
        """
        if adapter is not None and (adapter in self.counts or len(self.counts) < MAX_NAMES):
            self.counts[adapter] = self.counts.get(adapter, 0) + 1
        else:
            self.others += 1
        self.held.add(max(0.0, held_s - (load_s or 0.0)))
        self.prompt_tokens += prompt_tokens
        self.output_tokens += output_tokens
        if load_s is not None:
            self.loads.add(load_s)
        elif ttft_s is not None:
            self.warm.add(ttft_s)

    def plus(self, other: Traffic) -> Traffic:
        counts = dict(self.counts)
        for adapter, count in other.counts.items():
            counts[adapter] = counts.get(adapter, 0) + count
        return Traffic(
            self.span_s + other.span_s,
            counts,
            self.others + other.others,
            self.held.plus(other.held),
            self.warm.plus(other.warm),
            self.loads.plus(other.loads),
            self.prompt_tokens + other.prompt_tokens,
            self.output_tokens + other.output_tokens,
        )


class TrafficCounter:
    """Counts the last half to full hour of every base model."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._now: dict[str, Traffic] = {}
        self._before: dict[str, Traffic] = {}
        self._before_s = 0.0
        """How long the window before lasted. A model that nobody asked for then was seen as long.
        """

    def current(self, base: str, now: float) -> Traffic:
        """To which a request that ends now is to be added."""
        if self._began is None:
            self._began = now
        elif (lasted_s := now - self._began) >= WINDOW_S:
            # it goes on until the next request, and what it counted came in its first WINDOW_S
            old = lasted_s >= 2 * WINDOW_S
            self._before, self._before_s = ({}, WINDOW_S) if old else (self._now, lasted_s)
            self._now, self._began = {}, now
        current = self._now.get(base)
        if current is None:
            current = self._now[base] = Traffic()
        return current

    def traffic(self, base: str, now: float) -> Traffic:
        """What has been counted of this model."""
        if self._began is None:
            return Traffic()
        span = Traffic(now - self._began + self._before_s)
        current = self._now.get(base, Traffic()).plus(span)
        before = self._before.get(base)
        return current if before is None else current.plus(before)


Milliseconds: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
Tokens: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=10**12)]


class LoggedRequest(msgspec.Struct):
    """The fields of an access log line that are read here."""

    ts: Annotated[float, msgspec.Meta(ge=0, le=1e12)] = 0.0
    event: str = ""
    model: str | None = None
    adapter: str | None = None
    queue_ms: Milliseconds | None = None
    load_ms: Milliseconds | None = None
    ttft_ms: Milliseconds | None = None
    total_ms: Milliseconds | None = None
    prompt_tokens: Tokens | None = None
    output_tokens: Tokens | None = None
    streamed: bool = True
    """Of an answer that is not, the first token comes with the last."""


_decode = msgspec.json.Decoder(LoggedRequest).decode


def from_access_log(lines: Iterable[str | bytes]) -> tuple[Mapping[str, Traffic], int]:
    """The traffic of each base model, and how many lines cannot be read. Lines of other events are
    passed over, and those of requests that a running gateway would not count. The lines may be in
    any order: logs that were rotated are often put together newest first.
    """
    found: dict[str, Traffic] = {}
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    unreadable = 0
    for line in lines:
        if not line.strip():
            continue
        try:
            seen = _decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            unreadable += 1
            continue
        if seen.event != "request" or not seen.model or seen.total_ms is None:
            continue
        if seen.queue_ms is None or seen.load_ms is None:
            continue  # it was refused, or it ended before its worker said what it took
        base = seen.model if seen.adapter is None else seen.model.partition(":")[0]
        traffic = found.setdefault(base, Traffic())
        began = seen.ts - seen.total_ms / 1000
        first[base] = min(began, first.get(base, began))
        last[base] = max(seen.ts, last.get(base, seen.ts))
        traffic.span_s = last[base] - first[base]
        queued_s, load_s = seen.queue_ms / 1000, seen.load_ms / 1000
        ttft_s = None
        if seen.streamed and seen.ttft_ms is not None:
            ttft_s = max(0.0, seen.ttft_ms / 1000 - queued_s)
        traffic.add(
            seen.adapter,
            seen.total_ms / 1000 - queued_s,
            ttft_s,
            load_s or None,
            seen.prompt_tokens or 0,
            seen.output_tokens or 0,
        )
    return found, unreadable
