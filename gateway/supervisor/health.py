"""Pure. Which processes hang, and which models cannot start, as far as pulses and ends tell."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gateway.supervisor.restarts import HOPELESS_TRIES

START_SILENCE_S = 60.0
"""A process that has not served yet may be silent so long: imports hold the interpreter for tens of
seconds where many share few cores.
"""


@dataclass(slots=True)
class ProcessHealth:
    """What is known of one life of one process. Times are of the supervisor's monotonic clock."""

    process: str
    pid: int
    heard_at: float
    """When it was started, or its last pulse came."""
    epoch: int = 0
    healthy_since: float | None = None
    reason: str = ""

    def pulse(self, healthy: bool, reason: str, now: float) -> None:
        self.heard_at = now
        self.reason = reason or self.reason
        if healthy and self.healthy_since is None:
            self.healthy_since = now

    def healthy_s(self, now: float) -> float:
        return 0.0 if self.healthy_since is None else now - self.healthy_since

    def hangs(self, hang_s: float, now: float) -> bool:
        """It has been silent for too long: stopped, or its event loop stands still."""
        allowed_s = hang_s if self.healthy_since is not None else max(hang_s, START_SILENCE_S)
        return now - self.heard_at > allowed_s


@dataclass(frozen=True, slots=True)
class Trial:
    """One worker to keep alive, as the verdict on its model needs it."""

    model: str
    healthy: bool
    failures: int
    reason: str


def verdicts(trials: Iterable[Trial]) -> dict[str, str]:
    """Model -> why it cannot start: every worker of it has failed HOPELESS_TRIES times in a row
    without serving, and none serves.
    """
    by_model: dict[str, list[Trial]] = {}
    for trial in trials:
        by_model.setdefault(trial.model, []).append(trial)
    return {
        model: next((t.reason for t in of if t.reason), "its workers end at once")
        for model, of in by_model.items()
        if not any(t.healthy for t in of) and all(t.failures >= HOPELESS_TRIES for t in of)
    }
