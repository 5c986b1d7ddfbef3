"""Pure. Judges from outside whether an engine makes progress.

An engine may hang: a stuck kernel, a stopped process, a rank that no longer answers. It then says
nothing, and vLLM does not notice. Two signs tell. A ping waits in the engine's own loop, so an
answer shows that the loop turns. The steps are counted, so requests that run without a new step
show that the loop does no work. Both signs may be late for a good reason, because a long prompt is
one step. So the time limit grows with the prompt tokens that wait, at the speed that was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

PREFILL_FACTOR = 2.0
"""A prefill may take this many times as long as the measured speed says. Attention grows faster
than the prompt, and other requests share the step.
"""
ANSWER_S = 2.0
"""A healthy loop answers a ping within this time, usually far sooner."""
LOOK_S = 0.25
"""Time between two looks."""
STOOD_STILL_S = 1.5
"""If a look comes later than this, this process stood still, not the engine. That time does not
count.
"""


@dataclass(frozen=True, slots=True)
class EngineSigns:
    """What is seen of the engine at one moment. `steps`: done since the start. `running`: requests
    in its batch. `prefill_tokens`: prompt tokens that wait. `prefill_tokens_per_s`: the measured
    speed of prefill (0: unknown).
    """

    steps: int = 0
    running: int = 0
    prefill_tokens: int = 0
    prefill_tokens_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Healthy:
    """The engine makes progress, or it has nothing to do and answers."""


@dataclass(frozen=True, slots=True)
class Suspect:
    """The engine may hang. It should get no new requests, and its open ones should move."""

    reason: str


@dataclass(frozen=True, slots=True)
class Hung:
    """The engine hangs for good and should be killed."""

    reason: str


EngineVerdict: TypeAlias = Healthy | Suspect | Hung


class ProgressWatch:
    """Call `look` every LOOK_S. The engine is suspect after `suspect_s` without a sign, and hung
    after `kill_s` more; the time of the longest waiting prefill is added. All times are of one
    monotonic clock.
    """

    def __init__(self, suspect_s: float, kill_s: float, now: float) -> None:
        self._suspect_s, self._kill_s = suspect_s, kill_s
        self._looked_at = now
        self._pinged_at: float | None = None  # when the open ping was sent
        self._steps = 0
        self._stepped_at = now  # the last step, or the last time that nothing ran
        self._idle_in_doubt = False

    def pinged(self, now: float) -> None:
        """A ping has been sent. Only one is open at a time."""
        self._pinged_at = now

    def answered(self) -> None:
        """The engine has answered the ping."""
        self._pinged_at = None

    def look(self, signs: EngineSigns, now: float) -> EngineVerdict:
        """The verdict as of now."""
        self._forgive(now)
        # Its requests are taken away once it is suspect. From then on only a step clears it, not
        # being idle.
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
        """If this process itself stood still, that time is taken off the engine's silence."""
        late_s, self._looked_at = now - self._looked_at - LOOK_S, now
        if late_s > STOOD_STILL_S:
            self._stepped_at += late_s
            if self._pinged_at is not None:
                self._pinged_at += late_s


def _prefill_s(signs: EngineSigns) -> float:
    """How long the waiting prompt tokens take at the measured speed."""
    if not signs.prefill_tokens_per_s:
        return 0.0
    return signs.prefill_tokens / signs.prefill_tokens_per_s
