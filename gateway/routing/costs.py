"""Pure. What an operation on a worker costs, in seconds. Figures come from the worker's heartbeats
where it has measured, and from named constants where it has not.
"""

from __future__ import annotations

from gateway.fleet.worker_view import WorkerView
from shared.link.messages import Tier

MIB = 1 << 20
PREFILL_TOKENS_PER_S = 20_000.0
"""Assumed until a worker has measured its own rate. An 8B model on an H200 (vLLM 0.32) reads 12,000
to 32,000 tokens/s, depending on the batch.
"""
STEP_S = 0.012
"""The same engine's step with 16 sequences."""
LOAD_S = 0.060
LOAD_BYTES = 26 * MIB
"""A load from disk into a slot, with the files in the page cache, takes 60 ms for 26 MiB (rank 16,
8B model, H200). All of it runs inside the engine's loop.
"""
ACTIVATE_S = 0.005
"""A move from the CPU tier into a slot."""
FETCH_S = 0.250
"""A download from the store to disk: 26 MiB over a 1 Gbit/s link, and the store's latency. It
delays the request but not the engine.
"""
SERVICE_S = 2.0
OUTPUT_TOKENS = 128
"""Service time and output length of a request, assumed until some requests have ended."""
WEIGHT = 0.05
"""Weight of the newest request in the moving averages of service time and output length. A request
twenty back counts a third of it.
"""


def prefill_rate(worker: WorkerView) -> float:
    return worker.beat.prefill_tokens_per_s or PREFILL_TOKENS_PER_S


def step_s(worker: WorkerView) -> float:
    return worker.beat.step_s or STEP_S


def stalling_load_s(worker: WorkerView, tier: Tier, size_bytes: int) -> float:
    """The part of a load that runs inside the engine's loop; nothing else runs there meanwhile."""
    if tier is Tier.GPU:
        return 0.0
    if tier is Tier.CPU:
        return worker.beat.stall_s or ACTIVATE_S
    measured = worker.beat.stall_s
    if measured:
        return (
            measured * (size_bytes / worker.beat.load_bytes)
            if size_bytes and worker.beat.load_bytes
            else measured
        )
    return max(ACTIVATE_S, LOAD_S * size_bytes / LOAD_BYTES) if size_bytes else LOAD_S


def load_s(worker: WorkerView, tier: Tier, size_bytes: int) -> float:
    """Time until the adapter's files are in a slot: the work beside the engine's loop and the part
    inside it.
    """
    stalling_s, beat = stalling_load_s(worker, tier, size_bytes), worker.beat
    if tier <= Tier.CPU or not beat.stall_s:
        return stalling_s
    return stalling_s * max(1.0, beat.load_s / beat.stall_s)


def load_elsewhere_s(worker: WorkerView, size_bytes: int, running: float) -> float:
    """What a load from disk costs on a worker like this: the request's own time, and the time that
    the `running` requests stand still.
    """
    return (
        load_s(worker, Tier.DISK, size_bytes)
        + stalling_load_s(worker, Tier.DISK, size_bytes) * running
    )


def fetch_s(worker: WorkerView, tier: Tier) -> float:
    """The part of a load that delays only the requests that wait for this adapter."""
    return (worker.beat.fetch_s or FETCH_S) if tier is Tier.REMOTE else 0.0


class ServiceTimes:
    """Moving averages over the ended requests of one base model: seconds on a worker, tokens of
    output.
    """

    def __init__(self) -> None:
        self.service_s = SERVICE_S
        self.output_tokens = float(OUTPUT_TOKENS)

    def note(self, service_s: float, output_tokens: int) -> None:
        self.service_s += WEIGHT * (service_s - self.service_s)
        if output_tokens:
            self.output_tokens += WEIGHT * (output_tokens - self.output_tokens)
