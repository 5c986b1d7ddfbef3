"""Pure. How often streams are written to: after every engine step, or less often while the CPU is
short. The gap is bounded, and all streams are written to in the same steps.

A token costs the front end, the link, the gateway and the client's kernel about 40 microseconds,
most of it because it is sent by itself. The CPU may be the bottleneck, because front end and engine
share cores or because the front end fills its core. Then several tokens of a stream leave together.
The engine gets the time saved, and the gap between two events stays within the bound. Since all
streams are written to in the same steps, their frames share messages and wake-ups. The first and
the last tokens of a stream are never held back.
"""

from __future__ import annotations

BUSY_SHARE = 0.6
"""Share of a core that the front end's event loop may use. Above it, bursts queue."""
WAIT_SHARE = 0.15
"""Of the time, that the front end could run and had no core: it shares them with others who need
them.
"""
CALM = 0.5
"""Pressure is over below this share of both thresholds. Between the two nothing changes."""
FIRST_S = 0.01
"""The smallest gap that saves anything: two steps of a small model. It doubles at each look that
finds pressure.
"""
LOOK_S = 0.25
"""Time between two looks."""


class WriteInterval:
    """Decides when streams are written to. `most_s` is the longest gap between two events of a
    stream, in seconds; 0: every token is sent at once, always.

    `flush` says whether streams are written to in the next engine step.
    """

    __slots__ = ("_flushed_at", "_most_s", "flush", "gap_s")

    def __init__(self, most_s: float) -> None:
        self._most_s = most_s
        self._flushed_at = 0.0
        self.gap_s = 0.0
        self.flush = True

    def look(self, busy_share: float, wait_share: float) -> None:
        """Takes what the front end's thread has done since the last look: the share of the time
        that it ran on a core, and the share that it waited for one. Adapts the gap.
        """
        if busy_share > BUSY_SHARE or wait_share > WAIT_SHARE:
            self.gap_s = min(self._most_s, max(FIRST_S, 2 * self.gap_s))
        elif busy_share < CALM * BUSY_SHARE and wait_share < CALM * WAIT_SHARE:
            self.gap_s = self.gap_s / 2 if self.gap_s > FIRST_S else 0.0

    def stepped(self, now: float, step_s: float) -> None:
        """A step of the engine has ended. The next one ends about `step_s` from now."""
        if self.flush:
            self._flushed_at = now
        # flush now if waiting for the step after the next would exceed the gap
        self.flush = now + 1.5 * step_s - self._flushed_at >= self.gap_s
