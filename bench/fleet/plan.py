"""Pure. What is measured, in which order, and how much of it fits into the time that there is."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

PARTS = ("scale", "base", "policies", "kill", "mixed")
POLICIES = ("expected-ttft", "ray", "residency-p2c")
OURS = POLICIES[0]
SHARES = (0.70, 0.95)
KILL_SHARE = 0.70
SWITCH_S = 4.0
"""A gateway ends, the next one starts, its workers are back."""


@dataclass(frozen=True, slots=True)
class FleetRow:
    """One load. `share` is of the capacity that the row `scale` of as many workers found, `rps` are
    requests/s for each worker; neither: a closed loop.
    """

    part: str
    workers: int
    policy: str = OURS
    share: float | None = None
    repetition: int = 0
    rps: float | None = None

    @property
    def saturated(self) -> bool:
        return self.share is None and self.rps is None

    @property
    def key(self) -> str:
        rate = (
            "saturated"
            if self.saturated
            else f"{self.share:.0%}"
            if self.share is not None
            else f"{self.rps:g}rps"
        )
        return f"{self.part}/{self.workers}/{self.policy}/{rate}/{self.repetition}"


@dataclass(frozen=True, slots=True)
class FleetTimes:
    """Seconds. Of each load the first `warm_s` do not count, `measure_s` do, and what is in flight
    then ends within about `tail_s`.

    `flush_s`: every adapter is asked for once, before the first load of a gateway. `serve_again_s`:
    a worker boots.
    """

    warm_s: float
    measure_s: float
    tail_s: float
    flush_s: float
    serve_again_s: float
    least_measure_s: float

    def of(self, row: FleetRow, *, first_of_gateway: bool) -> float:
        """What a row takes."""
        start_s = SWITCH_S + self.flush_s if first_of_gateway else 0.0
        more_s = self.serve_again_s if row.part in ("kill", "mixed") else 0.0
        more_s += self.warm_s if row.part == "kill" else 0.0  # the load settles again
        return start_s + self.warm_s + self.measure_s + self.tail_s + more_s


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """`rows` run in this order. `left_out` do not fit and wait for another call."""

    rows: tuple[FleetRow, ...]
    times: FleetTimes
    left_out: tuple[FleetRow, ...] = ()


def rows(
    parts: Collection[str],
    workers: Sequence[int],
    policies: Sequence[str],
    repetitions: int,
    rps: Sequence[float] = (),
    shares: Sequence[float] = SHARES,
) -> list[FleetRow]:
    """The policies take turns at each load, so that a machine that drifts drifts for all of them.
    Every other turn is the other way round, so that neighbours share a gateway. `rps`: instead of
    `shares` of the capacity.
    """
    made: list[FleetRow] = []
    most = max(workers)
    if "scale" in parts:
        made += [FleetRow("scale", n) for n in sorted(workers)]
    if "base" in parts:
        made += [FleetRow("base", n) for n in sorted(workers)]
    if "policies" in parts:
        paces = [(None, rate) for rate in rps] if rps else [(share, None) for share in shares]
        for again in range(repetitions):
            for nth, (share, rate) in enumerate(paces, again):
                made += [
                    FleetRow("policies", most, policy, share, again, rate)
                    for policy in (reversed(policies) if nth % 2 else policies)
                ]
    if "kill" in parts:
        made.append(
            FleetRow("kill", most, OURS, None if rps else KILL_SHARE, rps=min(rps) if rps else None)
        )
    if "mixed" in parts:
        made.append(FleetRow("mixed", most))
    return made


def with_capacity(wanted: Sequence[FleetRow], done: Collection[str]) -> list[FleetRow]:
    """The rows that are not done yet; a share of a capacity that nobody has measured has its
    measurement before it.
    """
    left = [row for row in wanted if row.key not in done]
    needed = {FleetRow("scale", row.workers) for row in left if row.share is not None}
    missing = [
        row
        for row in sorted(needed, key=lambda row: row.workers)
        if row.key not in done and row not in left
    ]
    return missing + left


def gateways(planned: Sequence[FleetRow]) -> Iterator[tuple[FleetRow, bool]]:
    """Each row, and whether a gateway starts for it: neighbours of one policy and size share
    theirs.
    """
    before: FleetRow | None = None
    for row in planned:
        one = replace(row, share=None, rps=None)
        yield row, before is None or row.saturated or one != replace(before, share=None, rps=None)
        before = row


def seconds(planned: Sequence[FleetRow], times: FleetTimes) -> float:
    return sum(times.of(row, first_of_gateway=first) for row, first in gateways(planned))


def fit(wanted: Sequence[FleetRow], times: FleetTimes, left_s: float | None) -> FleetPlan:
    """What takes at most `left_s`: fewer repetitions, then less measured time, then fewer rows, the
    last ones left out first.
    """
    if left_s is None:
        return FleetPlan(tuple(wanted), times)
    kept = list(wanted)
    for fewer in range(max((row.repetition for row in kept), default=0), 0, -1):
        if seconds(kept, times) <= left_s:
            break
        kept = [row for row in kept if row.repetition < fewer]
    while kept and seconds(kept, replace(times, measure_s=times.least_measure_s)) > left_s:
        kept.pop()
    each_s = (left_s - seconds(kept, replace(times, measure_s=0.0))) / len(kept) if kept else 0.0
    times = replace(times, measure_s=min(times.measure_s, max(times.least_measure_s, each_s)))
    return FleetPlan(tuple(kept), times, tuple(row for row in wanted if row not in kept))
