"""Pure. What the agent asks of an engine, vLLM or simulated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Protocol

from shared.adapters.base_layers import BaseShapes
from shared.adapters.identity import AdapterRef
from shared.errors import InvalidAdapter
from worker.engine.hang_detection import EngineSigns


@dataclass(frozen=True, slots=True)
class Loaded:
    """A validated adapter on disk, as the engine gets it. `int_id` is unique for the life of the
    engine. The contents of `folder` never change. `fetch_s` and `check_s` are how long it took to
    bring its files here and to check them; 0.0 where that was done before.
    """

    ref: AdapterRef
    int_id: int
    folder: Path
    rank: int
    size_bytes: int
    fetch_s: float = 0.0
    check_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Swap:
    """One change of the slots, done in one stop of the engine. The adapters of `demote` leave their
    slots and stay in host memory, those of `unload` leave both, and those of `enter` get slots.
    """

    enter: tuple[Loaded, ...]
    demote: tuple[Loaded, ...] = ()
    unload: tuple[Loaded, ...] = ()


@dataclass(frozen=True, slots=True)
class Swapped:
    """The result of a swap: which adapters the engine refused, and how long its streams stood
    still. Nothing of a refused adapter stays in the engine.
    """

    refused: Mapping[AdapterRef, InvalidAdapter] = field(default_factory=dict)
    stall_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One request for the engine. Its adapter is in a slot before the engine gets the request and
    stays there until the call has ended.
    """

    path: str
    request_id: str
    body: bytes
    adapter: Loaded | None
    model: str = ""
    """The model's name in the answer. "": `base:name`, or the base."""
    created: int = 0
    """The time that the answer carries, in seconds since 1970. 0: now."""
    seen: bytes = b""
    """Tokens that the client has seen already (see shared/link/token_ids.py). The answer is
    rendered from its start, and only what follows these tokens is sent.
    """
    movable: bool = False
    """Whether the answer's tokens are wanted beside its bytes, so that it can go on on another
    worker.
    """
    method: str = "POST"
    content_type: str = "application/json"
    answer_id: str = ""
    """The id of the answer, if the engine is to store it for later requests. The ids of its parts
    follow from it.
    """
    traceparent: str = ""
    """The span that the engine's own spans belong to. Its flag says whether they are wanted. "":
    the gateway makes no traces.
    """
    tracestate: str = ""
    """What goes with it for other tracing systems."""
    background: bool = False
    """Whether the client asks later for what the engine stores. The answer that it gets at once may
    be whole long before.
    """
    cache_salt: str = ""
    """The engine's prefix cache is shared with requests of the same one alone."""
    on_seen: Callable[[bytes], None] | None = None
    """Takes the bytes of a stream that its client has already, rendered once more, before the first
    ones that it has not. None: nobody wants them.
    """


class Storing(Enum):
    """Whether an engine stores an answer for later requests."""

    NOT = "not"
    ORIGINAL = "original"  # it has made the answer, or makes it
    COPY = "copy"


class Reply(Protocol):
    """Where the engine puts the answer. No call but `room` waits.

    `head` or `answered` comes first, once. The last call, `head` or `more`, has `end=True`.
    `tokens` are those that the engine has rendered since the call before. Bytes that depend on a
    token never come later than the call with that token.
    """

    prompt_tokens: int
    output_tokens: int
    finish_reasons: str
    """Why each choice has ended, with commas between them."""

    def head(self, status: int, sse: bool, data: bytes, end: bool, tokens: bytes = b"") -> None: ...
    def answered(self, status: int, data: bytes) -> None:
        """In place of `head`: the client's answer is whole. What follows until the end is made in
        the background, and yields tokens by `progress` alone.
        """
        ...

    def more(self, data: bytes, end: bool, tokens: bytes = b"") -> None: ...
    async def room(self) -> None:
        """Waits until more bytes may follow. For an answer that comes in large pieces."""
        ...

    def progress(self, tokens: bytes) -> None:
        """Tokens of an answer that is sent whole at its end."""
        ...

    def stored(self, copy: bytes) -> None:
        """The engine stores the answer, and `copy` is for another worker. Comes before the end."""
        ...

    def lines(self, lines: bytes) -> None:
        """Header lines of an answer that is neither JSON nor an event stream, before `head`."""
        ...


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Figures as of the engine's last step: requests, tokens, the share of KV cache in use (0 to
    1), and measured rates (0 until something was measured).
    """

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    prefill_tokens_per_s: float = 0.0
    step_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What is known of the engine once it has started."""

    name: str
    capacity: int
    slots: int
    max_lora_rank: int
    host_places: int = 0
    """How many adapters fit the engine's host memory (the CPU tier), those in slots included. If it
    is not more than `slots`, there is no CPU tier.
    """
    layers: BaseShapes | None = None
    """What adapters may change in the model. None if the engine takes no adapters, or only
    simulates them.
    """
    tasks: tuple[str, ...] = ()
    """What the model can do, in vLLM's words (`generate`, `embed`, ...)."""
    max_model_len: int = 0
    """The model's context length in tokens."""


class Engine(Protocol):
    """One model with LoRA slots. The agent has at most one `swap` under way. `prepare` and `serve`
    run concurrently, each call in a task of its own.

    `serve` returns when the answer is complete. Cancelling its task aborts the generation. An error
    of the request itself is an answer (status and body), not an exception. `serve` raises:
        EngineFailure: the engine is dead.
        CannotContinue: this engine would not go on from what the client has seen.
        AnswerIncomplete: the answer stopped in its middle, without an `end`.
    """

    @property
    def stage(self) -> str:
        """What its start is at, in a few words for a person."""
        ...

    async def start(self) -> EngineFacts: ...
    async def serve(self, call: EngineRequest, reply: Reply) -> None: ...
    def read_ahead(self, ref: AdapterRef, int_id: int, folder: Path) -> None:
        """The files are complete, but not checked yet. The engine may begin to bring their values
        into host memory. Nothing uses them before `prepare` with the same id; otherwise `forget`
        follows.
        """
        ...

    def forget(self, int_id: int) -> None:
        """Drops what was read ahead."""
        ...

    async def prepare(self, adapter: Loaded) -> None:
        """Brings the weights into host memory, ready for a slot, while the engine runs on. Raises
        InvalidAdapter if the engine refuses them.
        """
        ...

    async def swap(self, swap: Swap) -> Swapped:
        """Changes the slots. The result names the adapters that the engine refused; a refused
        adapter harms no other. Raises EngineFailure.
        """
        ...

    def stores(self, answer_id: str) -> Storing:
        """Whether it stores this answer for later requests."""
        ...

    def copies(self) -> Iterator[tuple[str, bytes]]:
        """The ids of all whole answers that it stores, each with a copy for another worker."""
        ...

    def keep_copy(self, answer_id: str, copy: bytes) -> None:
        """Stores an answer that another worker has made. `copy` is what that one's `stored` got. It
        is dropped if this engine cannot read it.
        """
        ...

    def stats(self) -> EngineStats: ...
    def signs(self) -> EngineSigns:
        """What shows whether the engine makes progress."""
        ...

    async def ping(self) -> None:
        """Returns once the engine's own loop has answered, between two steps."""
        ...

    def died(self, callback: Callable[[str], None]) -> None:
        """`callback` is called once, with a reason, if the engine dies by itself."""
        ...

    def broken(self) -> None:
        """The engine hangs: `stop` must not wait for it."""
        ...

    async def stop(self) -> None: ...
