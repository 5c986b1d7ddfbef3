"""Shell. How every process of Loraplex starts: `python -P .../loraplex/start.py MODULE ARGUMENTS`.

The packages `gateway`, `worker`, `shared` and `bench` have common names. A user's own folder or
PYTHONPATH may hold modules of the same names, so each process first claims ours.

`python -m MODULE` would not do: it puts the current folder first on `sys.path`. Being a script has
a second use. A process that vLLM spawns runs its parent's script again, as `__mp_main__`. So it
claims the packages too, and it asks the kernel to end it with its parent. No installed entry point
is needed for that.

This module imports nothing of ours before the names are claimed.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder

PACKAGES = ("loraplex", "gateway", "worker", "shared", "bench")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
"""The folder that holds our packages: `site-packages`, or a checkout."""
STOPPED = 130
"""The exit status of a command that Ctrl-C has ended, as shells have it."""
WORKER_PID_ENV = "LORAPLEX_WORKER_PID"
"""Set by a worker for the processes that vLLM starts for it: the worker's own process id."""


class OwnPackages:
    """Finds our packages in ROOT, whatever else of the same name is on `sys.path`."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: object = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [ROOT]) if name in self._names else None


def claim(*names: str) -> None:
    """From now on these packages are ours in this process.

    Raises:
        ImportError: this process has imported another package of that name already.
    """
    for name in names:
        module = sys.modules.get(name)
        places = [*getattr(module, "__path__", ()), getattr(module, "__file__", None)]
        foreign = [p for p in places if p and not _is_ours(p, name)]
        if foreign:
            raise ImportError(
                f"Loraplex has a package `{name}`, and this process has imported {foreign[0]} "
                "under that name; rename yours, or use the command `loraplex serve` instead"
            )
    sys.meta_path.insert(0, OwnPackages(names))


def _is_ours(place: str, name: str) -> bool:
    ours = os.path.realpath(os.path.join(ROOT, name))
    return (os.path.realpath(place) + os.sep).startswith(ours + os.sep)


def command(module: str, *arguments: str) -> list[str]:
    """The command line that runs `main()` of our module in a process of its own."""
    return [sys.executable, "-P", os.path.join(ROOT, "loraplex", "start.py"), module, *arguments]


@contextlib.contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    """Inside, Ctrl-C ends this process at once, without a traceback: there is nothing to tidy up.
    A process that was told to ignore it, as a shell does for its background jobs, goes on to.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _stop)
    yield
    signal.signal(signal.SIGINT, before)


def _stop(signum: int, frame: object) -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"stopped\n")
    os._exit(STOPPED)


def cli() -> int:
    """The `loraplex` command."""
    _open_streams()
    with _ended_by_ctrl_c():
        claim(*PACKAGES)
        main = importlib.import_module("gateway.cli.main").main
    status = int(main())
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)  # the interpreter's own end would print a traceback
    return status


def _open_streams() -> None:
    """Cron jobs and scripts may close the standard streams. A socket would take such a number, and
    libuv ends a process that closes a socket of that number.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (for the process's life)


def register() -> None:
    """vLLM calls this in every process it starts (entry point `vllm.general_plugins`). It does
    nothing in a vLLM that no worker of ours started.
    """
    if WORKER_PID_ENV in os.environ:
        claim(*PACKAGES)
        importlib.import_module("worker.engine.vllm.plugin").register()


def _main() -> int:
    module = sys.argv.pop(1)
    with _ended_by_ctrl_c():
        claim(*PACKAGES)
        # for what this process starts in turn with `python -m`, as vLLM does
        os.environ["PYTHONSAFEPATH"] = "1"
        loaded = importlib.import_module(module)
        if hasattr(loaded, "__path__"):
            loaded = importlib.import_module(f"{module}.__main__")
    return int(loaded.main())


if __name__ == "__main__":
    sys.exit(_main())
if __name__ == "__mp_main__":
    register()
