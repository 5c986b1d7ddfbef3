"""Pure. How often streams are written to: after every engine step, unless the CPU is short; then
less often, within a bound, all in the same step.

A token costs the front end, the link, the gateway and the client's kernel some 40 microseconds,
most of it for being sent by itself. Where the CPU is what everybody waits for (front end and engine
on the same cores, or a front end that fills its core), several tokens of a stream leave together
instead: the engine gets the time, and the gap between two events stays within what was allowed. All
streams are written to in the same steps, so that their frames share messages and wake-ups. The
first and the last words of a stream are never held back.
"""

from __future__ import annotations

BUSY_SHARE = 0.6
"""Of a core, for the front end's event loop: beyond it, bursts queue."""
WAIT_SHARE = 0.15
"""Of the time, that the front end could run and had no core: it shares them with others who need
them.
"""
CALM = 0.5
"""Of both thresholds, below which pressure is over; in between nothing changes."""
FIRST_S = 0.01
"""The least gap that is worth anything, two steps of a small model; from there it doubles at each
look that finds pressure.
"""
LOOK_S = 0.25
"""Between two looks."""


class Pacing:
    """`most_s`: seconds that may lie between two events of a stream; 0: every token is sent at
    once, always.

    `flush` says whether streams are written to in the engine step that comes next.
    """

    __slots__ = ("_flushed_at", "_most_s", "flush", "gap_s")

    def __init__(self, most_s: float) -> None:
        self._most_s = most_s
        self._flushed_at = 0.0
        self.gap_s = 0.0
        self.flush = True

    def look(self, busy_share: float, wait_share: float) -> None:
        """What the front end's thread has done since the last look: its shares of time on a core
        and in line for one.
        """
        if busy_share > BUSY_SHARE or wait_share > WAIT_SHARE:
            self.gap_s = min(self._most_s, max(FIRST_S, 2 * self.gap_s))
        elif busy_share < CALM * BUSY_SHARE and wait_share < CALM * WAIT_SHARE:
            self.gap_s = self.gap_s / 2 if self.gap_s > FIRST_S else 0.0

    def stepped(self, now: float, step_s: float) -> None:
        """A step of the engine is over; the next one will end about `step_s` from now."""
        if self.flush:
            self._flushed_at = now
        # else the step after that would be too late
        self.flush = now + 1.5 * step_s - self._flushed_at >= self.gap_s
