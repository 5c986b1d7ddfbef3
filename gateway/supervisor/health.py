"""Pure. Judges from pulses and exits which processes hang, and which models cannot start."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gateway.supervisor.restarts import FAILED_STARTS_LIMIT

START_SILENCE_S = 60.0
"""A process that has not served yet may be silent for so long. Imports hold the interpreter for
tens of seconds where many processes share few cores.
"""


@dataclass(slots=True)
class ProcessHealth:
    """The health of one process from its start to its end. Times are on the supervisor's monotonic
    clock. `healthy_since` is None until the process serves.
    """

    process: str
    pid: int
    last_sign_at: float
    """When its last pulse came, or when it was started."""
    epoch: int = 0
    healthy_since: float | None = None
    reason: str = ""
    stage: str = ""

    def pulse(self, healthy: bool, reason: str, now: float, stage: str = "") -> None:
        self.last_sign_at, self.stage = now, stage
        self.reason = reason or self.reason
        if healthy and self.healthy_since is None:
            self.healthy_since = now

    def healthy_s(self, now: float) -> float:
        """For how long it has served."""
        return 0.0 if self.healthy_since is None else now - self.healthy_since

    def hangs(self, hang_s: float, now: float) -> bool:
        """Whether it has been silent for too long. Either it is stopped, or its event loop is
        blocked.
        """
        allowed_s = hang_s if self.healthy_since is not None else max(hang_s, START_SILENCE_S)
        return now - self.last_sign_at > allowed_s


@dataclass(frozen=True, slots=True)
class WorkerHealth:
    """One supervised worker. `failed_starts` counts those in a row, `reason` is the last one's."""

    model: str
    healthy: bool
    failed_starts: int
    reason: str


def models_that_cannot_start(workers: Iterable[WorkerHealth]) -> dict[str, str]:
    """Model -> the reason. A model cannot start when none of its workers serves, and every one has
    failed FAILED_STARTS_LIMIT times in a row.
    """
    by_model: dict[str, list[WorkerHealth]] = {}
    for worker in workers:
        by_model.setdefault(worker.model, []).append(worker)
    return {
        model: next((w.reason for w in group if w.reason), "its workers end at once")
        for model, group in by_model.items()
        if not any(w.healthy for w in group)
        and all(w.failed_starts >= FAILED_STARTS_LIMIT for w in group)
    }
