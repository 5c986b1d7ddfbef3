"""Pure. Ray Serve 2.60's autoscaling written down as its formulas stand, in exact numbers: times
are whole milliseconds, the rest fractions.

Nothing here is shared with the code under test: every step is the plain reading of
serve/_private/autoscaling_metrics_merge.py and serve/autoscaling_policy.py.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction

Series = list[tuple[int, int]]


def measured(series: list[Series], how: str, now: int) -> Fraction:
    """All series as one step function, aggregated over the window."""
    told = [s for s in series if s]
    if not told:
        return Fraction(0)
    if len(told) == 1:
        events = [at for at, _ in told[0]]
        opens = events[0]
    else:
        changes = set()
        for s in told:
            values = [0, *[value for _, value in s]]
            changes |= {at for n, (at, value) in enumerate(s) if value != values[n]}
        if not changes:
            return Fraction(0)
        events = sorted(changes)
        all_told = max(s[0][0] for s in told)
        opens = max(all_told, events[0]) if all_told <= events[-1] else events[0]

    def total(at: int) -> int:
        return sum(next((v for t, v in reversed(s) if t <= at), 0) for s in told)

    if how != "mean":
        inside = [total(at) for at in events if at >= opens]
        return Fraction(max(inside) if how == "max" else min(inside))
    closes = now if now > events[-1] else events[-1] + 1
    cuts = [opens, *[at for at in events if at > opens], closes]
    area = sum(total(a) * (b - a) for a, b in itertools.pairwise(cuts))
    return Fraction(area, closes - opens)


@dataclass
class RayDeployment:
    """One deployment's configuration and the state of its policy."""

    least: int
    most: int
    target: Fraction
    up_delay: int
    down_delay: int
    zero_delay: int | None
    up: Fraction
    down: Fraction
    counter: int = 0
    timestamp: int | None = None

    def tick(self, running: int, wanted: int, total: Fraction, now: int) -> int:
        result = self._policy(running, wanted, total, now)
        return max(self.least, min(self.most, result))

    def _policy(self, running: int, wanted: int, total: Fraction, now: int) -> int:
        if running == 0 and total > 0:
            return max(math.ceil(1 * self.up), wanted)
        raw = Fraction(wanted) if running == 0 else running * (total / (self.target * running))
        scaled = self._factors(raw, running)
        if running == 0 and scaled > 0:
            return scaled
        return self._delays(max(0, scaled), wanted, now)

    def _factors(self, raw: Fraction, running: int) -> int:
        if running == 0:
            return math.ceil(raw)
        delta = raw - running
        scaled = math.ceil(running + (self.up if delta > 0 else self.down) * delta)
        if math.ceil(raw) < running and scaled == running:
            scaled -= 1
        return scaled

    def _delays(self, desired: int, current: int, now: int) -> int:
        result = current
        if desired > current:
            if self.counter < 0:
                self.counter, self.timestamp = 0, None
            self.counter += 1
            if self.timestamp is None:
                self.timestamp = now
            if now - self.timestamp >= self.up_delay:
                self.counter, self.timestamp = 0, None
                result = desired
        elif desired < current:
            if self.counter > 0:
                self.counter, self.timestamp = 0, None
            self.counter -= 1
            if current == 1:
                delay = self.down_delay if self.zero_delay is None else self.zero_delay
            else:
                delay = self.down_delay
                desired = max(1, desired)
            if self.timestamp is None:
                self.timestamp = now
            if now - self.timestamp >= delay:
                self.counter, self.timestamp = 0, None
                result = desired
        else:
            self.counter, self.timestamp = 0, None
        return result
