"""Pure. What residency tells the agent to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from shared.adapters import AdapterRef
from shared.wire import Tier
from worker.engine import Loaded


@dataclass(frozen=True, slots=True)
class Fetch:
    """Bring the adapter to disk and validate it; answer with `fetched` or `failed`."""

    adapter: AdapterRef


@dataclass(frozen=True, slots=True)
class Load:
    """Take `demote` out of its slot (it stays in host memory), unload `evict` and `drop` (answer `unloaded` for each), then load.

    Answer with `loaded` or `failed`.
    """

    adapter: Loaded
    evict: Loaded | None
    demote: Loaded | None = None
    drop: tuple[Loaded, ...] = ()


@dataclass(frozen=True, slots=True)
class Start:
    """The request's adapter is resident (or it needs none): give it to the engine. `waited_for` says what the adapter came from."""

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
class Unload:
    """Take the adapter out of the engine altogether, before any load that is given later; answer with `unloaded`."""

    adapter: Loaded


@dataclass(frozen=True, slots=True)
class Tended:
    """What `cache` or `evict` asked for under this number is so."""

    request: int


Instruction: TypeAlias = Fetch | Load | Start | Reject | Unload | Tended
