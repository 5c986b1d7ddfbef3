"""Pure. The instructions that residency gives its driver."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from shared.adapters.identity import AdapterRef
from shared.link.messages import Tier
from worker.engine.base import Loaded, Swap


@dataclass(frozen=True, slots=True)
class Fetch:
    """Bring the adapter to disk, validate it and prepare it in host memory. The driver answers with
    `cached` once the files are on disk, and then with `fetched`. If anything fails it answers
    `failed`.
    """

    adapter: AdapterRef


@dataclass(frozen=True, slots=True)
class Start:
    """Give the request to the engine: its adapter is in a slot. `came_from` is where the adapter
    was when the request came. `slot_wait_s` is how long the request has waited for a slot that
    others used.
    """

    request: int
    adapter: Loaded
    came_from: Tier
    slot_wait_s: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class Reject:
    """The request cannot be served: its adapter failed."""

    request: int
    code: str
    message: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class CommandDone:
    """The operator's command with this number is done."""

    request: int


Instruction: TypeAlias = Fetch | Swap | Start | Reject | CommandDone
"""The driver answers a Swap with `swapped`. Only one Swap is under way at a time."""
