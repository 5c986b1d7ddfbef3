"""Shell. The times of requests are taken on a monotonic clock. People and collectors read them as
seconds since 1970.
"""

from __future__ import annotations

import time
from collections.abc import Callable

READS = 8
CLOSE_S = 20e-6
"""Two reads of a clock that are this close had nothing in between. It takes less than 1 us."""


def wall_offset(
    clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
) -> float:
    """Add it to a time on `clock` to get seconds since 1970.

    The two clocks cannot be read at once, and a process that is put aside in between would shift
    all times by as much. So the wall clock is read between two reads of the other one. The closest
    pair of a few counts, and its middle is off by half its distance at most.
    """
    closest, offset = float("inf"), 0.0
    for _ in range(READS):
        before = clock()
        now = wall()
        after = clock()
        if after - before < closest:
            closest, offset = after - before, now - (before + after) / 2
        if closest <= CLOSE_S:
            break
    return offset
