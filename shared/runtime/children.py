"""Shell. Child processes of ours: started directly or by a zygote, waited for, and ended with a
signal and a deadline.
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
        """The exit status; 128 + n for a child that signal n ended."""
        ...


class Direct:
    """A child that this process started itself, in a session of its own, so that a terminal's
    Ctrl-C reaches only us.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    async def wait(self) -> int:
        status = await self._process.wait()
        return status if status >= 0 else 128 - status


async def start(argv: Sequence[str], env: Mapping[str, str]) -> Child:
    full = {**os.environ, **env, PARENT_ENV: str(os.getpid())}
    process = await asyncio.create_subprocess_exec(
        *argv, env=full, stdin=asyncio.subprocess.DEVNULL, start_new_session=True
    )
    return Direct(process)


class Forked:
    """A child that the zygote forked."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def wait(self) -> int:
        return await asyncio.shield(self.ended)


class Zygote:
    """`worker.zygote` and its children. Leave by `close()`: the zygote ends and its
    children drain.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._children: dict[int, Forked] = {}
        self._answers: asyncio.Queue[int] = asyncio.Queue()
        self._asking = asyncio.Lock()
        self._reader: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, env: Mapping[str, str]) -> Zygote:
        """Starts it and waits until it has imported vLLM (6 to 15 s). Raises ConfigError if it
        cannot.
        """
        process = await asyncio.create_subprocess_exec(
            *command("worker.zygote"),
            env={**os.environ, **env, PARENT_ENV: str(os.getpid())},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        self = cls(process)
        assert process.stdout is not None
        if not await process.stdout.readline():
            raise ConfigError(
                "vLLM cannot be imported (see above); install loraplex[cpu] or "
                "loraplex[gpu], or use llm_engine: sim"
            )
        self._reader = asyncio.create_task(self._read(), name="zygote")
        return self

    async def start(self, argv: Sequence[str], env: Mapping[str, str]) -> Child:
        """Forks a worker; `argv` are the arguments of `worker`."""
        assert self._process.stdin is not None
        async with self._asking:
            if self._process.returncode is None:
                self._process.stdin.write(
                    json.dumps({"argv": list(argv), "env": dict(env)}).encode() + b"\n"
                )
            pid = await self._answers.get()
        if pid < 0:
            self._answers.put_nowait(-1)  # for whoever asks next
            raise ConfigError(
                "the process that forks the workers (worker.zygote) has ended; start again"
            )
        return self._children[pid]

    @property
    def ended(self) -> bool:
        return self._process.returncode is not None

    def kill(self) -> None:
        """At once; its children get SIGTERM from the kernel."""
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
                self._children[message["pid"]] = Forked(message["pid"])
                self._answers.put_nowait(message["pid"])
            elif "exited" in message:
                child = self._children.pop(message["exited"], None)
                if child is not None and not child.ended.done():
                    child.ended.set_result(message["status"])
        # the kernel sends them SIGTERM; nobody can tell us how they end
        for child in self._children.values():
            if not child.ended.done():
                child.ended.set_result(128 + signal.SIGTERM)
        self._answers.put_nowait(-1)


def send_signal(child: Child, sig: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child.pid, sig)


def kill_group(child: Child) -> None:
    """SIGKILL to the child and all that it has started: each child of ours leads a group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


async def end(child: Child, grace_s: float, kill_s: float) -> int:
    """SIGTERM, and after `grace_s` SIGKILL to its whole process group."""
    send_signal(child, signal.SIGTERM)
    try:
        async with asyncio.timeout(grace_s):
            return await child.wait()
    except TimeoutError:
        kill_group(child)
    async with asyncio.timeout(kill_s):
        return await child.wait()
