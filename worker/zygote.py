"""Shell. The zygote: a parent process that imports vLLM once and forks workers on request. A worker
then starts without half a minute of imports.

It reads one JSON line per request from stdin, `{"argv": [...], "env": {...}}`, and answers `{"pid":
n}`. When a child ends it reports `{"exited": pid, "status": code}`; for a child that was killed the
code is 128 + the signal. It has no event loop and never uses a GPU, so a fork is safe. It ends when
its stdin is closed. A worker with several GPUs is not forked.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import warnings

from shared.runtime.process import PARENT_ENV, count_gpus, follow_parent
from shared.vllm_versions import cannot_import
from worker.__main__ import run
from worker.engine.factory import VLLM_CPU_ENV, VLLM_ENV, VLLM_GPU_ENV
from worker.engine.vllm.boot.installed import vllm_version


def preload() -> None:
    """Imports what every worker will need. Nothing here may start a thread."""
    gpu = count_gpus() > 0
    for key, value in (VLLM_ENV | (VLLM_GPU_ENV if gpu else VLLM_CPU_ENV)).items():
        os.environ.setdefault(key, value)
    warnings.simplefilter("ignore")
    import vllm.lora.model_manager
    import vllm.lora.worker_manager
    import vllm.model_executor.models.llama
    import vllm.v1.engine.core

    if gpu:
        import vllm.v1.worker.gpu_model_runner
        import vllm.v1.worker.gpu_worker
    else:
        import vllm.v1.worker.cpu_model_runner
        import vllm.v1.worker.cpu_worker  # noqa: F401

    from worker.engine.vllm.arguments import server_arguments

    server_arguments()


def spawn(argv: list[str], env: dict[str, str]) -> int:
    """Forks a worker with these arguments and this environment. Returns its process id."""
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
    """Writes one JSON line to stdout, in one call."""
    os.write(1, json.dumps(message).encode() + b"\n")


def reap() -> None:
    """Reports every child that has ended."""
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
    """Serves until stdin ends, then ends the process at once. Nothing is buffered, and an
    interpreter that has imported torch takes seconds to end in the usual way.
    """
    os._exit(_serve())


def _serve() -> int:
    follow_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # only our parent acts on a terminal's Ctrl-C
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it would take every worker along
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write)
    try:
        preload()
    except (ImportError, AttributeError) as exc:
        # the one message that a person must see
        print(f"loraplex: {cannot_import(vllm_version(), exc)}", file=sys.stderr)  # noqa: T201
        return 2
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
