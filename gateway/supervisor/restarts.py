"""Pure. The back-off of restarts, and when a model counts as unable to start.

There are three kinds of end. A process that had served and was killed by a signal is restarted at
once. An operator may have sent it, or the kernel when memory was short. A process that failed after
serving for a while is restarted at once, too. A process that fails before it serves, or soon after,
is in a crash loop. Each wait is then twice the one before. Chance shortens it, so that many
processes do not start in step.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

FIRST_WAIT_S, MAX_WAIT_S = 1.0, 30.0
JITTER = 0.5
"""A wait is shortened at random by at most this share."""
PROVEN_S = 30.0
"""A process that failed by itself after serving for this long is restarted without a wait."""
PROVEN_KILLED_S = 2.0
"""The same bound for a process that a signal ended. Such an end says little about the process. But
the kernel's out-of-memory killer looks the same, and a loop of it must slow down.
"""
FAILED_STARTS_LIMIT = 2
"""After so many failed starts in a row, a model that no worker serves counts as unable to start."""
SIGNALLED = 128
"""An exit status above this means: ended by signal number (status - 128)."""


@dataclass(frozen=True, slots=True)
class ProcessExit:
    """How a process ended. `healthy_s` is how long it had served before (0: it never served).
    `from_outside`: somebody else's signal ended it, which says nothing about the process.
    """

    status: int
    healthy_s: float
    from_outside: bool = False


@dataclass(slots=True)
class RestartHistory:
    """The restarts of one supervised process. `failures` counts the ends in a row that made it
    wait. `failed_starts` are those of them that were its own.
    """

    failures: int = 0
    failed_starts: int = 0

    def wait_s(self, end: ProcessExit, rng: random.Random) -> float:
        """Notes the exit, and returns the seconds to wait before the next start."""
        proven_s = PROVEN_KILLED_S if end.status > SIGNALLED else PROVEN_S
        if end.healthy_s >= proven_s or (end.status == 0 and end.healthy_s):
            self.failures = self.failed_starts = 0
            return 0.0
        self.failures += 1
        self.failed_starts += not end.from_outside
        # the exponent is bounded: a loop may go on for weeks
        wait_s = min(MAX_WAIT_S, FIRST_WAIT_S * 2.0 ** min(self.failures - 1, 16))
        return wait_s * (1 - JITTER * rng.random())


def describe_exit(status: int, signals: dict[int, str]) -> str:
    """The exit in words: `ended with status 1`, `killed by SIGKILL`. `signals` maps numbers to
    names.
    """
    if status > SIGNALLED:
        number = status - SIGNALLED
        return f"killed by {signals.get(number, f'signal {number}')}"
    return f"ended with status {status}"
