"""Shell. Child processes of ours. They are started directly or by a zygote, waited for, and ended
with a signal and a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Mapping, Sequence
from typing import Protocol

from loraplex.start import command
from shared.errors import ConfigError
from shared.runtime.process import PARENT_ENV


class Child(Protocol):
    pid: int

    async def wait(self) -> int:
        """The exit status. 128 + n for a child that signal n ended."""
        ...


class DirectChild:
    """A child that this process started itself. It has a session of its own, so a terminal's Ctrl-C
    reaches only this process.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    async def wait(self) -> int:
        status = await self._process.wait()
        return status if status >= 0 else 128 - status


async def start(argv: Sequence[str], env: Mapping[str, str]) -> Child:
    """Starts a child directly. Raises ConfigError if this machine has no room for another one."""
    return DirectChild(await _spawn(argv, env, stdin=asyncio.subprocess.DEVNULL))


async def _spawn(
    argv: Sequence[str], env: Mapping[str, str], *, stdin: int, stdout: int | None = None
) -> asyncio.subprocess.Process:
    full = {**os.environ, **env, PARENT_ENV: str(os.getpid())}
    try:
        return await asyncio.create_subprocess_exec(
            *argv, env=full, stdin=stdin, stdout=stdout, start_new_session=True
        )
    except OSError as exc:  # too many open files or processes, or too little memory
        raise ConfigError(f"no process can be started: {exc.strerror or exc}") from exc


class ForkedChild:
    """A child that the zygote forked."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def wait(self) -> int:
        return await asyncio.shield(self.ended)


class Zygote:
    """`worker.zygote` and its children. End it with `close()`: the zygote ends and its children
    drain.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._children: dict[int, ForkedChild] = {}
        self._answers: asyncio.Queue[int] = asyncio.Queue()
        self._asking = asyncio.Lock()
        self._reader: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, env: Mapping[str, str]) -> Zygote:
        """Starts the zygote and waits until it has imported vLLM (6 to 15 s). The zygote ends if
        that is cancelled. Raises ConfigError if it cannot be started or cannot import vLLM.
        """
        pipe = asyncio.subprocess.PIPE
        process = await _spawn(command("worker.zygote"), env, stdin=pipe, stdout=pipe)
        self = cls(process)
        assert process.stdout is not None
        try:
            ready = await process.stdout.readline()
        except asyncio.CancelledError:
            process.kill()
            raise
        if not ready:
            raise ConfigError("vLLM cannot be imported; the reason is above")
        self._reader = asyncio.create_task(self._read(), name="zygote")
        return self

    async def start(self, argv: Sequence[str], env: Mapping[str, str]) -> Child:
        """Forks a worker. `argv` are the arguments of `worker`."""
        assert self._process.stdin is not None
        async with self._asking:
            if self._process.returncode is None:
                self._process.stdin.write(
                    json.dumps({"argv": list(argv), "env": dict(env)}).encode() + b"\n"
                )
            pid = await self._answers.get()
        if pid < 0:
            self._answers.put_nowait(-1)  # for the next caller
            raise ConfigError(
                "the process that forks the workers (worker.zygote) has ended; start again"
            )
        return self._children[pid]

    @property
    def ended(self) -> bool:
        return self._process.returncode is not None

    def kill(self) -> None:
        """Kills the zygote at once. The kernel then sends SIGTERM to its children."""
        if not self.ended:
            self._process.kill()

    async def close(self) -> None:
        if self._process.returncode is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
        await self._process.wait()
        if self._reader is not None:
            await self._reader

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            message = json.loads(line)
            if "pid" in message:
                self._children[message["pid"]] = ForkedChild(message["pid"])
                self._answers.put_nowait(message["pid"])
            elif "exited" in message:
                child = self._children.pop(message["exited"], None)
                if child is not None and not child.ended.done():
                    child.ended.set_result(message["status"])
        # The kernel sends them SIGTERM. How they end can no longer be known.
        for child in self._children.values():
            if not child.ended.done():
                child.ended.set_result(128 + signal.SIGTERM)
        self._answers.put_nowait(-1)


def send_signal(child: Child, sig: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child.pid, sig)


def kill_group(child: Child) -> None:
    """Sends SIGKILL to the child and to all that it has started. Each child of ours leads a process
    group.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


async def end(child: Child, grace_s: float, kill_s: float) -> int:
    """Sends SIGTERM, and after `grace_s` SIGKILL to the whole process group. Returns the exit
    status.
    """
    send_signal(child, signal.SIGTERM)
    try:
        async with asyncio.timeout(grace_s):
            return await child.wait()
    except TimeoutError:
        kill_group(child)
    async with asyncio.timeout(kill_s):
        return await child.wait()
