"""Shell. Processes that do jobs until a deadline: what is unfinished then is killed, and nothing
but that is lost.

Children are spawned, not forked, and end when the parent has gone, however it went: a job can last
minutes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Generic, TypeVar

from shared.runtime.parent_death import die_with_parent

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ended(Generic[T]):
    """`error` is a traceback, or what became of the process; empty if all went well. `cpu_s` is
    processor time.
    """

    job: T
    result: Any
    cpu_s: float
    error: str


@dataclass(slots=True)
class _PoolProcess(Generic[T]):
    process: SpawnProcess
    pipe: Connection
    job: T | None = None


class ProcessPool(Generic[T]):
    """`do(job)` runs in one of `size` processes; it must be a function of a module, and jobs and
    results picklable. Use as a context.
    """

    def __init__(
        self, do: Callable[[T], Any], size: int, ready: Callable[[], None] | None = None
    ) -> None:
        """`ready` runs once in each process."""
        self._do, self._ready = do, ready
        self._processes: list[_PoolProcess[T]] = [self._start_process() for _ in range(size)]

    def __enter__(self) -> ProcessPool[T]:
        return self

    def __exit__(self, *_: object) -> None:
        for member in self._processes:
            member.process.kill()
        for member in self._processes:
            member.process.join()
            member.pipe.close()

    @property
    def idle(self) -> int:
        return sum(member.job is None for member in self._processes)

    @property
    def jobs(self) -> list[T]:
        """Under way."""
        return [member.job for member in self._processes if member.job is not None]

    def start(self, job: T) -> None:
        member = next(member for member in self._processes if member.job is None)
        member.job = job
        member.pipe.send(job)

    def ended(self, until: float) -> Iterator[Ended[T]]:
        """Waits for at least one job to end, or until `until` on the monotonic clock: nothing comes
        then, or if nothing is under way.
        """
        busy = {member.pipe: member for member in self._processes if member.job is not None}
        for pipe in wait(list(busy), max(0.0, until - time.monotonic())) if busy else ():
            member = busy[pipe]  # type: ignore[index]
            job, member.job = member.job, None
            assert job is not None
            try:
                yield Ended(job, *member.pipe.recv())
            except EOFError:
                member.process.join()
                self._processes[self._processes.index(member)] = self._start_process()
                yield Ended(job, None, 0.0, f"its process ended with {member.process.exitcode}")

    def _start_process(self) -> _PoolProcess[T]:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_work, args=(theirs, self._do, self._ready, os.getpid()), daemon=True
        )
        process.start()
        theirs.close()
        return _PoolProcess(process, ours)


def _work(
    pipe: Connection, do: Callable[[Any], Any], ready: Callable[[], None] | None, parent: int
) -> None:
    die_with_parent(signal.SIGKILL, parent)
    if ready is not None:
        ready()
    while True:
        try:
            job = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        began = time.process_time()
        result, error = None, ""
        try:
            result = do(job)
        except Exception:  # whatever it is, the other jobs go on and somebody reads this
            error = traceback.format_exc()
        try:
            pipe.send((result, time.process_time() - began, error))
        except (BrokenPipeError, KeyboardInterrupt):
            return
