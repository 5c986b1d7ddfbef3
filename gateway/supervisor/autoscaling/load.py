"""Pure. The load of one model over time: one step function per source, and one number for the
window that looks back from now.

This is Ray Serve's measurement (2.60, serve/_private/autoscaling_metrics_merge.py). Every source
holds its last value until its next one. The window opens when every source has told a value, and
closes now. A mean is weighted by time; a maximum or minimum is taken of the values told inside the
window. Times of several sources are rounded to 10 ms, those of a lone source are not.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, TypeAlias

Aggregation: TypeAlias = Literal["mean", "max", "min"]
Point: TypeAlias = tuple[float, float]
"""(time in seconds, value)."""
Key: TypeAlias = tuple[str, str]
"""(source, what it tells of): a gateway process, and its queue or one worker."""

ROUNDED_PER_S = 100
"""Ray rounds times to 10 ms before it adds several series."""
POINTS_PER_WINDOW = 500
"""Of one series at most; a finer picture changes no decision."""
SHORTEST_S = 1e-3
"""How long the last value counts at least (Ray's own guard against a clock that went back)."""


def total_over_time(series: Sequence[Sequence[Point]]) -> list[Point]:
    """The sum of all step functions, at every moment at which one of them changes."""
    told = [points for points in series if points]
    if len(told) < 2:
        return list(told[0]) if told else []
    change_at: dict[float, float] = {}
    for points in told:
        before = 0.0
        for time_s, value in points:
            if value != before:
                at = math.floor(time_s * ROUNDED_PER_S + 0.5) / ROUNDED_PER_S
                change_at[at] = change_at.get(at, 0.0) + value - before
                before = value
    total = 0.0
    summed = []
    for at in sorted(change_at):
        total += change_at[at]
        summed.append((at, total))
    return summed


def aggregate(series: Sequence[Sequence[Point]], how: Aggregation, now: float) -> float:
    """The load as one number. 0 where nobody has told anything."""
    total = total_over_time(series)
    if not total:
        return 0.0
    told = [points for points in series if points]
    opens = total[0][0]
    if len(told) > 1:
        all_told = max(points[0][0] for points in told)
        if all_told <= total[-1][0]:
            opens = max(opens, all_told)
    if how != "mean":
        inside = [value for at, value in total if at >= opens]
        return (max if how == "max" else min)(inside)
    return _mean(total, opens, max(now, total[-1][0] + SHORTEST_S))


def _mean(total: Sequence[Point], opens: float, closes: float) -> float:
    weighted = 0.0
    first = bisect_right(total, opens, key=lambda point: point[0]) - 1
    for n in range(first, len(total)):
        start = max(opens, total[n][0])
        end = total[n + 1][0] if n + 1 < len(total) else closes
        weighted += total[n][1] * (end - start)
    return weighted / (closes - opens)


class LoadWindow:
    """What all sources have told of one model within the last `look_back_s` seconds."""

    def __init__(self, look_back_s: float, how: Aggregation) -> None:
        self._look_back_s = look_back_s
        self._how = how
        self._series: dict[Key, list[Point]] = {}

    def record(self, source: str, values: Mapping[str, float], now: float) -> None:
        """All that the source knows at `now`. What it does not name any more is over."""
        for key in [k for k in self._series if k[0] == source and k[1] not in values]:
            del self._series[key]
        oldest = now - self._look_back_s
        for name, value in values.items():
            points = self._series.setdefault((source, name), [])
            spacing = self._look_back_s / POINTS_PER_WINDOW
            if len(points) > 1 and now - points[-2][0] < spacing:
                points.pop()
            points.append((now, value))
            del points[: bisect_right(points, oldest, key=lambda point: point[0])]

    def forget(self, source: str) -> None:
        """The source has ended, or has been silent for too long: what it told counts no more."""
        for key in [k for k in self._series if k[0] == source]:
            del self._series[key]

    def value(self, now: float, names: Collection[str] | None = None) -> float:
        """The load as of `now`; with `names`, of those alone."""
        series = [
            points for (_, name), points in self._series.items() if names is None or name in names
        ]
        return aggregate(series, self._how, now)
