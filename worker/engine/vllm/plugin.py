"""Shell. Runs in every process that vLLM starts. It ends the process when its parent ends, and
corrects the kernels. loraplex/start.py has both ways to it: vLLM's entry point, and the start of a
spawned process.

Without it, a worker that is killed leaves EngineCore alive as an orphan that holds the GPU. With
vLLM 0.32 that was seen for more than 20 s.
"""

from __future__ import annotations

import os
import signal

from loraplex.start import WORKER_PID_ENV
from shared.runtime.parent_death import die_with_parent
from worker.engine.vllm import patches


def register() -> None:
    """Prepares this process if it belongs to a worker of ours; else does nothing. The worker
    process itself must outlive its parent until it has drained.
    """
    worker = os.environ.get(WORKER_PID_ENV)
    if worker is None:
        return
    if int(worker) != os.getpid():
        die_with_parent(signal.SIGKILL)
        if not _lives(int(worker)):  # the parent ended before the kernel was asked to watch it
            os.kill(os.getpid(), signal.SIGKILL)
    patches.apply()


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
