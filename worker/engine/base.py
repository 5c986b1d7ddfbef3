"""Pure. What the agent asks of an engine, whichever it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from shared.adapters.base_layers import BaseShapes
from shared.adapters.identity import AdapterRef
from shared.errors import InvalidAdapter
from worker.engine.progress import EngineSigns


@dataclass(frozen=True, slots=True)
class Loaded:
    """A validated adapter on disk, as the engine gets it. `int_id` is unique for the life of the
    engine; `folder` never changes its content.
    """

    ref: AdapterRef
    int_id: int
    folder: Path
    rank: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Swap:
    """In one stop of the engine: `demote` leave their slots (and stay in host memory), `unload`
    leave altogether, `enter` get slots.
    """

    enter: tuple[Loaded, ...]
    demote: tuple[Loaded, ...] = ()
    unload: tuple[Loaded, ...] = ()


@dataclass(frozen=True, slots=True)
class Swapped:
    """What became of a swap: the adapters that the engine refused, of which nothing has stayed, and
    how long its streams stood still.
    """

    refused: Mapping[AdapterRef, InvalidAdapter] = field(default_factory=dict)
    stall_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One request for the engine. `adapter` is resident when the engine sees it and stays so until
    the call has ended.
    """

    path: str
    request_id: str
    body: bytes
    adapter: Loaded | None
    model: str = ""
    """What the answer calls the model; "": `base:name`, or the base."""
    created: int = 0
    """The time that the answer carries, in seconds since 1970; 0: now."""
    seen: bytes = b""
    """Tokens that the client has seen already (see shared/link/token_ids.py): the answer is
    rendered from the start, and only what follows them is sent.
    """
    movable: bool = False
    """Whether the answer's tokens are wanted beside its bytes."""
    method: str = "POST"
    content_type: str = "application/json"
    kept_id: str = ""
    """The id of the answer, where the engine is to keep it for later requests."""


class Reply(Protocol):
    """Where the engine puts the answer. `head` comes first, once; `end=True` comes last, once, in
    either. `tokens` are those that the engine was asked to render since the call before; bytes that
    depend on a token come no later than in the call with it. None of them waits.
    """

    prompt_tokens: int
    output_tokens: int

    def head(self, status: int, sse: bool, data: bytes, end: bool, tokens: bytes = b"") -> None: ...
    def more(self, data: bytes, end: bool, tokens: bytes = b"") -> None: ...
    def progress(self, tokens: bytes) -> None:
        """Tokens of an answer that is sent whole at its end."""
        ...

    def lines(self, lines: bytes) -> None:
        """Before `head`: header lines of an answer that is neither JSON nor an event stream."""
        ...


@dataclass(frozen=True, slots=True)
class EngineStats:
    """As of the engine's last step: requests, tokens, the share of KV cache in use, and measured
    rates (0 where nothing was measured yet).
    """

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    waiting_tokens: int = 0
    prefill_tokens_per_s: float = 0.0
    step_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What the engine turned out to be once it had started."""

    name: str
    capacity: int
    slots: int
    max_lora_rank: int
    host_places: int = 0
    """Adapters that fit the engine's host memory, those in slots included; the CPU tier. At most
    `slots` means: there is none.
    """
    layers: BaseShapes | None = None
    """What adapters may change in the model; None where the engine does not apply them (simulated)
    or takes none.
    """
    tasks: tuple[str, ...] = ()
    """What the model can do, in vLLM's words."""
    max_model_len: int = 0
    """Its context in tokens."""


class Engine(Protocol):
    """One model with LoRA slots. The agent has one `swap` under way at a time; `prepare` and
    `serve` run concurrently, one task per call.

    `serve` returns when the answer is complete; cancelling the task that runs it aborts generation.
    Errors of the request itself are answers (status and body); EngineFailure means that the engine
    is dead; CannotContinue, that what the client has seen is not what this engine would go on from;
    AnswerIncomplete, that an answer ended in its middle, without an `end`.
    """

    async def start(self) -> EngineFacts: ...
    async def serve(self, call: EngineRequest, reply: Reply) -> None: ...
    async def prepare(self, adapter: Loaded) -> None:
        """Brings the weights into host memory beside the step loop, ready for a slot. Raises
        InvalidAdapter if the engine refuses them.
        """
        ...

    async def swap(self, swap: Swap) -> Swapped:
        """Raises EngineFailure only: one adapter's fault is told in the answer and harms no
        other.
        """
        ...

    def stats(self) -> EngineStats: ...
    def signs(self) -> EngineSigns:
        """Whether it makes progress."""
        ...

    async def ping(self) -> None:
        """Returns once the engine's own loop has answered: between two steps."""
        ...

    def died(self, callback: Callable[[str], None]) -> None:
        """Calls back once with a reason if the engine dies by itself."""
        ...

    def broken(self) -> None:
        """It hangs: `stop` need not wait for it."""
        ...

    async def stop(self) -> None: ...
