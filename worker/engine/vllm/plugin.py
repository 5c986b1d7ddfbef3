"""Shell. Runs in every process that vLLM starts: ends it when its parent ends, and corrects the
kernels. Both ways to it lie in loraplex/start.py: vLLM's entry point, and the start of a spawned
process.

Without this a worker that is killed leaves EngineCore alive, an orphan that holds the GPU (seen for
more than 20 s with vLLM 0.32).
"""

from __future__ import annotations

import os
import signal

from loraplex.start import WORKER_PID_ENV
from shared.runtime.parent_death import die_with_parent
from worker.engine.vllm import patches


def register() -> None:
    """Does nothing in a vLLM that is not ours. The worker process itself outlives its parent until
    it has drained.
    """
    worker = os.environ.get(WORKER_PID_ENV)
    if worker is None:
        return
    if int(worker) != os.getpid():
        die_with_parent(signal.SIGKILL)
        if not _lives(int(worker)):  # it ended before the kernel was asked
            os.kill(os.getpid(), signal.SIGKILL)
    patches.apply()


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
