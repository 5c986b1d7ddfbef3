"""Pure. What gateway processes tell their supervisor, and what it tells them: one JSON line each.

A report is a full snapshot: losing any one is harmless. Requests are those of the process that
reports alone, so that the sum over all processes counts each once.
"""

from __future__ import annotations

import msgspec

MAX_ADAPTERS = 4096
"""Names of adapters in one report. With more in flight than this, slots are long since short."""
MAX_LINE_BYTES = 4 << 20


class HeldAdapter(msgspec.Struct, frozen=True, array_like=True):
    """An adapter in a slot of a worker that is in use: in flight, or in steady use."""

    name: str
    digest: str


class WorkerLoad(msgspec.Struct, frozen=True, kw_only=True):
    """One worker as a gateway process sees it. `requests` are those of this process; `seq` grows
    with the worker's heartbeats.
    """

    serving: bool
    epoch: int = 0
    seq: int = 0
    requests: int = 0
    capacity: int = 0
    slots: int = 0
    kv_usage: float = 0.0
    waiting_tokens: int = 0
    prefill_tokens_per_s: float = 0.0
    load_s: float = 0.0
    in_use: tuple[HeldAdapter, ...] = ()

    def with_requests(self, requests: int) -> WorkerLoad:
        return msgspec.structs.replace(self, requests=requests)


class ModelLoad(msgspec.Struct, frozen=True, kw_only=True):
    """One base model in one gateway process. `adapters` are the names in flight or waiting."""

    queued: int = 0
    queued_tokens: int = 0
    adapters: tuple[str, ...] = ()
    workers: dict[str, WorkerLoad] = {}


class LoadReport(msgspec.Struct, frozen=True, tag="load"):
    process: str
    models: dict[str, ModelLoad]


class Move(msgspec.Struct, frozen=True, array_like=True):
    """Load the adapter on this worker: the one that has it is about to leave."""

    adapter: HeldAdapter
    worker: str


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One base model as the supervisor sees it. `start_s` is how long its workers took to start,
    None before the first; `eta_s` when the next one is expected to serve, None if none starts.
    """

    wanted: int
    serving: int = 0
    starting: int = 0
    draining: int = 0
    min_replicas: int = 0
    max_replicas: int = 0
    scales: bool = False
    reason: str = ""
    cause: str = ""
    held_by: str = ""
    held_s: float = 0.0
    ongoing: float = 0.0
    target_ongoing: float = 0.0
    start_s: float | None = None
    eta_s: float | None = None
    retiring: tuple[str, ...] = ()
    moves: tuple[Move, ...] = ()


class ScalingStatus(msgspec.Struct, frozen=True, tag="status"):
    models: dict[str, ModelStatus]


encode = msgspec.json.Encoder().encode
decode_report = msgspec.json.Decoder(LoadReport).decode
decode_status = msgspec.json.Decoder(ScalingStatus).decode
DecodeError = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
