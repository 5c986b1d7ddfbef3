"""Shell. A parent that imports vLLM once and forks workers on request: on CPU hosts a worker then
boots in seconds instead of half a minute.

Reads one JSON line per request on stdin, `{"argv": [...], "env": {...}}`, answers `{"pid": n}`, and
reports `{"exited": pid, "status": code}` for every child (128 + signal for a killed one). It has
one thread and no event loop, so that a fork is safe; it ends when its stdin does. Never used on GPU
hosts: a fork of a process that has touched torch was seen to hang there.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import warnings

from shared.runtime.process import PARENT_ENV, follow_parent
from worker.__main__ import run
from worker.engine.factory import VLLM_CPU_ENV, VLLM_ENV


def preload() -> None:
    """Imports what every worker will need; nothing here may start a thread."""
    for key, value in (VLLM_ENV | VLLM_CPU_ENV).items():
        os.environ.setdefault(key, value)
    warnings.simplefilter("ignore")
    import vllm.lora.model_manager
    import vllm.lora.worker_manager
    import vllm.model_executor.models.llama
    import vllm.v1.engine.core
    import vllm.v1.worker.cpu_model_runner
    import vllm.v1.worker.cpu_worker  # noqa: F401

    import worker.engine.vllm.engine  # noqa: F401


def spawn(argv: list[str], env: dict[str, str]) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    devnull = os.open(os.devnull, os.O_RDWR)
    os.dup2(devnull, 0)
    os.dup2(2, 1)
    os.environ.update(env, **{PARENT_ENV: str(parent)})
    run(argv)
    raise AssertionError("run() ends the process")


def say(message: dict[str, object]) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


def reap() -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        say(
            {
                "exited": pid,
                "status": 128 + os.WTERMSIG(status)
                if os.WIFSIGNALED(status)
                else os.WEXITSTATUS(status),
            }
        )


def main() -> None:
    """Ends the process itself. Nothing is buffered, and an interpreter that has imported torch
    takes seconds to end in the usual way.
    """
    os._exit(_serve())


def _serve() -> int:
    follow_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for whoever started us
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write)
    preload()
    say(
        {
            "ready": os.getpid(),
            "threads": len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 1,
        }
    )
    buffer = b""
    while True:
        readable, _, _ = select.select([0, wake_read], [], [])
        if wake_read in readable:
            os.read(wake_read, 4096)
            reap()
        if 0 in readable:
            data = os.read(0, 65536)
            if not data:
                return 0
            buffer += data
            while b"\n" in buffer:
                line, buffer = buffer.split(b"\n", 1)
                request = json.loads(line)
                say({"pid": spawn(request["argv"], request["env"])})


if __name__ == "__main__":
    main()
