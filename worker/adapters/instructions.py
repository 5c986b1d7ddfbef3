"""Pure. What residency tells the agent to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from shared.adapters.identity import AdapterRef
from shared.link.messages import Tier
from worker.engine.base import Loaded, Swap


@dataclass(frozen=True, slots=True)
class Fetch:
    """Bring the adapter to disk, validate it and prepare it in host memory; answer with `cached`
    once it is there, then `fetched`, or `failed`.
    """

    adapter: AdapterRef


@dataclass(frozen=True, slots=True)
class Start:
    """The request's adapter is in a slot: give the request to the engine. `came_from` is where the
    adapter was when the request came for it.
    """

    request: int
    adapter: Loaded
    came_from: Tier


@dataclass(frozen=True, slots=True)
class Reject:
    """The request cannot be served: its adapter failed."""

    request: int
    code: str
    message: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class CommandDone:
    """The command with this number is done: `Residency.cache` or `Residency.evict` took it."""

    request: int


Instruction: TypeAlias = Fetch | Swap | Start | Reject | CommandDone
"""Answer a Swap, of which only one is under way at a time, with `swapped`."""
