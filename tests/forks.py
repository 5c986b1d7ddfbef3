"""Shell. Gateways, simulated workers and commands for tests, forked from a process that has
imported all of them.

An interpreter of its own would spend most of a second of CPU time on imports, and hundreds of tests
start two to five such processes. A forked one has its own pid, sockets, environment and log, and it
ends as any program does. `loraplex serve`, real vLLM and measured processes start from nothing.

`python -m tests.forks FD` is that process, one per test process. Each message on FD is one JSON
object, with the files for stdout, stderr and the exit status beside it. The answer is the new
process's pid. It ends when FD is closed.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from gateway.http import headers

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("gateway.__main__", "worker.__main__", "gateway.cli.main")
MESSAGE_BYTES = 1 << 17
"""Larger than any environment and arguments of a test."""


class ForkedProcess:
    """What tests use of `asyncio.subprocess.Process`. It belongs to no event loop."""

    def __init__(self, pid: int, ended: int) -> None:
        self.pid = pid
        self._ended = ended
        self._status: int | None = None

    @property
    def returncode(self) -> int | None:
        """The exit status once it has ended: -n if signal n ended it."""
        if self._status is None and self._has_ended():
            self._status = int(os.read(self._ended, 16))
            os.close(self._ended)
        return self._status

    def _has_ended(self) -> bool:
        looked = select.poll()  # `select` takes no descriptor above 1023
        looked.register(self._ended, select.POLLIN)
        return bool(looked.poll(0))

    async def wait(self) -> int:
        while (status := self.returncode) is None:
            loop, readable, ended = asyncio.get_running_loop(), asyncio.Event(), os.dup(self._ended)
            loop.add_reader(ended, readable.set)
            try:
                await readable.wait()
            finally:
                loop.remove_reader(ended)
                os.close(ended)
        return status


def fork(
    module: str, argv: Sequence[str], env: Mapping[str, str], out: int, err: int
) -> ForkedProcess:
    """Runs `main()` of one of MODULES with these arguments and this environment. `out` and `err`
    get what it prints.
    """
    server = _server()
    ended, tells_end = os.pipe()
    request = json.dumps({"module": module, "argv": list(argv), "env": dict(env)}).encode()
    socket.send_fds(server, [request], [out, err, tells_end])
    os.close(tells_end)
    return ForkedProcess(int(server.recv(32)), ended)


async def loraplex(*argv: str, env: Mapping[str, str]) -> tuple[int, str, str]:
    """The command `loraplex`: its exit status, stdout and stderr."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = fork("gateway.cli.main", argv, env, out.fileno(), err.fileno())
        status = await process.wait()
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read().decode())
        return status, said[0], said[1]


@functools.cache
def _server() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        argv = [sys.executable, "-m", "tests.forks", str(theirs.fileno())]
        subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
    return ours


def _serve(requests: socket.socket) -> None:
    for module in MODULES:
        importlib.import_module(module)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork takes one thread along, not others"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the parents below leave no zombies
    while True:
        data, files, _, _ = socket.recv_fds(requests, MESSAGE_BYTES, 3)
        if not data:
            return
        if os.fork() == 0:
            _start(requests, json.loads(data), *files)
        for file in files:
            os.close(file)


def _start(requests: socket.socket, request: Any, out: int, err: int, tells_end: int) -> NoReturn:
    """The parent of the process that is asked for: tells its pid, waits, and tells how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        requests.close()
        os.dup2(out, 1)
        os.dup2(err, 2)
        _become(request["module"], request["argv"], request["env"])
    requests.send(str(pid).encode())
    requests.close()
    _, status = os.waitpid(pid, 0)
    os.write(tells_end, str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def _become(module: str, argv: list[str], env: dict[str, str]) -> NoReturn:
    """Does what the program does, up to its end."""
    os.environ.clear()
    os.environ.update(env)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    headers._OF_THIS_PROCESS = secrets.token_hex(8)  # as if it had imported that itself
    sys.exit(sys.modules[module].main(argv))


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
