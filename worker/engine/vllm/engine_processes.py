"""Shell. The processes of an engine, which are EngineCore and its ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable

from shared.runtime.descendants import (
    command_line,
    descendants,
    kill_all,
    on_exit,
    out_of_memory_kills,
)


class EngineProcesses:
    """The processes that this one has got below it since the engine began to boot."""

    def __init__(self) -> None:
        self.pids: list[int] = []
        self._earlier: set[int] = set()  # processes below this one that are not the engine's
        self._forget_exits: list[Callable[[], None]] = []

    def boot(self) -> None:
        """The engine is about to start its processes."""
        self._earlier = set(descendants())

    def watch(self, on_end: Callable[[str], None]) -> None:
        """The engine has started. `on_end` is called with the reason when one of its processes
        ends. vLLM itself takes 9 s to notice that a rank was killed.
        """
        self.pids = [
            p
            for p in descendants()
            if p not in self._earlier and "resource_tracker" not in command_line(p)
        ]
        kills = out_of_memory_kills()

        def ended(pid: int) -> None:
            short = out_of_memory_kills() > kills
            why = ": the machine or container is out of memory" if short else ""
            on_end(f"process {pid} of the engine has ended{why}")

        self._forget_exits = [on_exit(p, functools.partial(ended, p)) for p in self.pids]

    def unwatch(self) -> None:
        """They are about to be told to end."""
        for forget in self._forget_exits:
            forget()

    def kill(self) -> None:
        """Kills them at once, with everything below them."""
        kill_all([below for p in self.pids for below in (*descendants(p), p)])
