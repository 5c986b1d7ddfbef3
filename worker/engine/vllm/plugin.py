"""Shell. Runs in every process that vLLM starts (entry point `vllm.general_plugins`): ties its life
to its parent's, and corrects the kernels.

Without this a worker that is killed leaves EngineCore alive, an orphan that holds the GPU (seen for
more than 20 s with vLLM 0.32).
"""

from __future__ import annotations

import os
import signal

from shared.runtime.parent_death import die_with_parent
from worker.engine.vllm import patches

WORKER_PID_ENV = "LORAPLEX_WORKER_PID"


def register() -> None:
    """Does nothing in a vLLM that is not ours. The worker process itself outlives its parent until
    it has drained.
    """
    worker = os.environ.get(WORKER_PID_ENV)
    if worker is None:
        return
    patches.apply()
    if int(worker) == os.getpid():
        return
    die_with_parent(signal.SIGKILL)
