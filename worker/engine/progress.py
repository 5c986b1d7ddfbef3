"""Pure. Whether an engine makes progress, judged from outside.

An engine that hangs (a stuck kernel, a stopped process, a rank that no longer answers) says
nothing of it, and vLLM does not notice. Two signs tell. A ping waits in the engine's own loop, so
an answer means that the loop turns. Steps are counted, so running requests without a step mean that
it turns for nothing. Both may be late for a good reason: a long prompt is one step. So the bound
grows with the prompt tokens that wait, by the speed that was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

PREFILL_FACTOR = 2.0
"""A prefill may take so many times what the measured speed says: attention grows faster than the
prompt, and other requests share the step.
"""
ANSWER_S = 2.0
"""A loop that turns answers a ping within this; far less as a rule."""
LOOK_S = 0.25
"""Between two looks."""
STOOD_STILL_S = 1.5
"""If a look comes this late, this process stood still, not the engine: the time does not count."""


@dataclass(frozen=True, slots=True)
class EngineSigns:
    """What is seen of the engine now. `steps` have been done so far; `running` requests are in its
    batch; `prefill_tokens` wait for their prefill, which does `prefill_tokens_per_s` (0: unknown).
    """

    steps: int = 0
    running: int = 0
    prefill_tokens: int = 0
    prefill_tokens_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Healthy:
    """It makes progress, or has nothing to do and answers."""


@dataclass(frozen=True, slots=True)
class Suspect:
    """It may hang: nothing new should go there, and what is there should go on elsewhere."""

    reason: str


@dataclass(frozen=True, slots=True)
class Hung:
    """It hangs for good: it should be killed."""

    reason: str


Verdict: TypeAlias = Healthy | Suspect | Hung


class ProgressWatch:
    """Call `look` every LOOK_S. `suspect_s` without a sign beyond the longest prefill make the
    engine suspect, `kill_s` more hung. Times are of one monotonic clock.
    """

    def __init__(self, suspect_s: float, kill_s: float, now: float) -> None:
        self._suspect_s, self._kill_s = suspect_s, kill_s
        self._looked_at = now
        self._pinged_at: float | None = None  # the ping that is not answered yet
        self._steps = 0
        self._stepped_at = now  # or nothing ran then
        self._idle_in_doubt = False

    def pinged(self, now: float) -> None:
        """A ping has been sent; there is one at a time."""
        self._pinged_at = now

    def answered(self) -> None:
        self._pinged_at = None

    def look(self, signs: EngineSigns, now: float) -> Verdict:
        self._forgive(now)
        # once in doubt for want of steps, only a step is a sign: its requests have been taken away
        moved = signs.steps != self._steps or not (signs.running or self._idle_in_doubt)
        if moved:
            self._steps, self._stepped_at, self._idle_in_doubt = signs.steps, now, False
        bound_s = self._suspect_s + PREFILL_FACTOR * _prefill_s(signs)
        silent_s = 0.0 if self._pinged_at is None else now - self._pinged_at
        stuck_s = now - self._stepped_at
        longest_s = max(silent_s, stuck_s)
        if longest_s <= bound_s:
            return Healthy()
        if stuck_s <= bound_s or silent_s > ANSWER_S:
            reason = f"the engine has not answered for {silent_s:.1f} s"
        else:
            self._idle_in_doubt = True
            reason = f"requests run, but the engine has made no step for {stuck_s:.1f} s"
        return Hung(reason) if longest_s > bound_s + self._kill_s else Suspect(reason)

    def _forgive(self, now: float) -> None:
        late_s, self._looked_at = now - self._looked_at - LOOK_S, now
        if late_s > STOOD_STILL_S:
            self._stepped_at += late_s
            if self._pinged_at is not None:
                self._pinged_at += late_s


def _prefill_s(signs: EngineSigns) -> float:
    if not signs.prefill_tokens_per_s:
        return 0.0
    return signs.prefill_tokens / signs.prefill_tokens_per_s
