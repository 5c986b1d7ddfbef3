"""Pure. The messages between gateway processes and their supervisor about load: one JSON line each.

A report is a full snapshot, so losing any one is harmless. Each process reports only its own
requests, so the sum over all processes counts each request once.
"""

from __future__ import annotations

import msgspec

MAX_ADAPTERS = 4096
"""The most adapter names in one report. With more in flight, slots have been short for a long
time.
"""
MAX_LINE_BYTES = 4 << 20


class HeldAdapter(msgspec.Struct, frozen=True, array_like=True):
    """An adapter in a worker's slot, or on its way there."""

    name: str
    digest: str


class WorkerLoad(msgspec.Struct, frozen=True, kw_only=True):
    """One worker as one gateway process sees it. `requests` are those of this process alone. `seq`
    grows with every heartbeat of the worker. Of a worker that retires, `movable` are those of the
    requests that another worker can continue. Adapters `in_use` have requests in flight or are in
    steady use, the busiest first; `idle` are the others in its slots, while a worker of the model
    leaves.
    """

    serving: bool
    epoch: int = 0
    seq: int = 0
    requests: int = 0
    capacity: int = 0
    slots: int = 0
    kv_usage: float = 0.0
    prefill_tokens_per_s: float = 0.0
    load_s: float = 0.0
    in_use: tuple[HeldAdapter, ...] = ()
    movable: int = 0
    idle: tuple[HeldAdapter, ...] = ()

    def with_requests(self, requests: int) -> WorkerLoad:
        return msgspec.structs.replace(self, requests=requests)


class ModelLoad(msgspec.Struct, frozen=True, kw_only=True):
    """One base model in one gateway process. `adapters` are the names with requests in flight or
    waiting.
    """

    queued: int = 0
    queued_tokens: int = 0
    adapters: tuple[str, ...] = ()
    workers: dict[str, WorkerLoad] = {}


class LoadReport(msgspec.Struct, frozen=True, tag="load"):
    """The load of one gateway process, by base model."""

    process: str
    models: dict[str, ModelLoad]


class AdapterHandover(msgspec.Struct, frozen=True, array_like=True):
    """The adapter should be loaded on this worker, since the only worker that has it is about to
    leave.
    """

    adapter: HeldAdapter
    worker: str


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One base model as the supervisor sees it.

    `start_s` is how long its workers take to start (None: none has started yet). `eta_s` is when
    the next one is expected to serve (None: none is starting). `retiring` are workers that take
    nothing new. For `without_gpus` of the wanted workers this machine has no GPUs now. The fields
    of the last decision are explained there.
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
    recommended: int = 0
    needs: dict[str, int] = {}
    start_s: float | None = None
    eta_s: float | None = None
    retiring: tuple[str, ...] = ()
    handovers: tuple[AdapterHandover, ...] = ()
    without_gpus: int = 0


class ScalingStatus(msgspec.Struct, frozen=True, tag="status"):
    """The supervisor's word to all gateway processes, by base model."""

    models: dict[str, ModelStatus]


encode = msgspec.json.Encoder().encode
decode_report = msgspec.json.Decoder(LoadReport).decode
decode_status = msgspec.json.Decoder(ScalingStatus).decode
DecodeError = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
