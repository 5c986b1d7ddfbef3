"""Pure. The load of one model over time. Each source is a step function, and the window that ends
now gives one number.

This is Ray Serve's measurement (2.60, serve/_private/autoscaling_metrics_merge.py). A source keeps
its last value until its next report. The window opens once every source has reported, and ends now.
A mean is weighted by time. A maximum or minimum is taken over the values reported inside the
window. Times of several sources are rounded to 10 ms; the times of a single source are not.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, TypeAlias

Aggregation: TypeAlias = Literal["mean", "max", "min"]
LoadPoint: TypeAlias = tuple[float, float]
"""(time in seconds, value)."""
SourceKey: TypeAlias = tuple[str, str]
"""(source, series): a gateway process, and its queue or one worker."""

ROUNDED_PER_S = 100
"""Ray rounds times to 10 ms before it adds up several sources."""
POINTS_PER_WINDOW = 500
"""The most points that one series keeps. More of them would change no decision."""
SHORTEST_S = 1e-3
"""The last value counts for at least this long. It is Ray's guard against a clock that goes
back.
"""


def total_over_time(series: Sequence[Sequence[LoadPoint]]) -> list[LoadPoint]:
    """The sum of all step functions, with a point at every moment at which one of them changes."""
    reported = [points for points in series if points]
    if len(reported) < 2:
        return list(reported[0]) if reported else []
    change_at: dict[float, float] = {}
    for points in reported:
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


def aggregate(series: Sequence[Sequence[LoadPoint]], how: Aggregation, now: float) -> float:
    """The load as one number. 0 if no source has reported."""
    total = total_over_time(series)
    if not total:
        return 0.0
    reported = [points for points in series if points]
    opens = total[0][0]
    if len(reported) > 1:
        all_reported_from = max(points[0][0] for points in reported)
        if all_reported_from <= total[-1][0]:
            opens = max(opens, all_reported_from)
    if how != "mean":
        inside = [value for at, value in total if at >= opens]
        return (max if how == "max" else min)(inside)
    return _mean(total, opens, max(now, total[-1][0] + SHORTEST_S))


def _mean(total: Sequence[LoadPoint], opens: float, closes: float) -> float:
    weighted = 0.0
    first = bisect_right(total, opens, key=lambda point: point[0]) - 1
    for n in range(first, len(total)):
        start = max(opens, total[n][0])
        end = total[n + 1][0] if n + 1 < len(total) else closes
        weighted += total[n][1] * (end - start)
    return weighted / (closes - opens)


class LoadWindow:
    """The reports of all sources on one model within the last `look_back_s` seconds."""

    def __init__(self, look_back_s: float, how: Aggregation) -> None:
        self._look_back_s = look_back_s
        self._how = how
        self._series: dict[SourceKey, list[LoadPoint]] = {}

    def record(self, source: str, values: Mapping[str, float], now: float) -> None:
        """Notes all values of one source at `now`. A series that is missing from `values` has
        ended.
        """
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
        """The source has ended or was silent for too long. Its values no longer count."""
        for key in [k for k in self._series if k[0] == source]:
            del self._series[key]

    def value(self, now: float, names: Collection[str] | None = None) -> float:
        """The load at `now`. With `names`, only those series count."""
        series = [
            points for (_, name), points in self._series.items() if names is None or name in names
        ]
        return aggregate(series, self._how, now)
