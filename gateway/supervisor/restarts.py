"""Pure. When a process that has ended is started again, and when its like is called unable to
start.

Three kinds of end are told apart. A process that had served well and was killed from outside (by a
signal: an operator, the kernel short of memory) is started again at once. So is one that served for
a while and then failed. One that fails before it served, or soon after, is in a crash loop: each
try waits longer than the one before, with chance in it so that many do not start in step.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

FIRST_WAIT_S, MAX_WAIT_S = 1.0, 30.0
JITTER = 0.5
"""Share of a wait that chance may take off."""
PROVEN_S = 30.0
"""A process that failed by itself after serving so long starts anew without a wait."""
PROVEN_KILLED_S = 2.0
"""The same for one that a signal ended: what kills from outside says little about the process, but
the kernel's out-of-memory killer also looks like this, and a loop of it must slow down.
"""
HOPELESS_TRIES = 2
"""Failed starts in a row after which a model that nobody serves is called unable to start."""
SIGNALLED = 128
"""Exit statuses above it: ended by signal number (status - 128)."""


@dataclass(frozen=True, slots=True)
class End:
    """How one life of a process ended. `healthy_s`: how long it had served (0: never)."""

    status: int
    healthy_s: float


@dataclass(slots=True)
class RestartHistory:
    """Of one process to be kept alive. `failures` counts the fruitless lives in a row."""

    failures: int = 0

    def wait_s(self, end: End, rng: random.Random) -> float:
        """How long to wait before the next start. Takes note of the end."""
        proven_s = PROVEN_KILLED_S if end.status > SIGNALLED else PROVEN_S
        if end.healthy_s >= proven_s or (end.status == 0 and end.healthy_s):
            self.failures = 0
            return 0.0
        self.failures += 1
        # the exponent is bounded: a loop may go on for weeks
        wait_s = min(MAX_WAIT_S, FIRST_WAIT_S * 2.0 ** min(self.failures - 1, 16))
        return wait_s * (1 - JITTER * rng.random())


def describe_end(status: int, signals: dict[int, str]) -> str:
    """For a log line or a person: `ended with status 1`, `killed by SIGKILL`."""
    if status > SIGNALLED:
        number = status - SIGNALLED
        return f"killed by {signals.get(number, f'signal {number}')}"
    return f"ended with status {status}"
