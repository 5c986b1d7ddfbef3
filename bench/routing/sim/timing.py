"""Pure. How long things take on a simulated worker: a table measured on one H200 (Llama-8B shape,
bf16, vLLM 0.32, 16 slots of rank 16).

Decode: mean time between tokens of N streams over 16 adapters, 128 tokens in and out. Prefill: the
same runs' TTFTs, all streams sent at once: 363 ms for 64 prompts and 170 ms for 16, so 48 prompts
of 128 tokens more took 193 ms more: 31,800 tokens/s. (Quotients of a single run mix in what does
not grow with the prompt: 22,600 tokens/s from 64 prompts alone, 12,000 from 16.) One warm request
alone had its first token after 18-23 ms; its step and its prompt account for 6.7 + 4.0 ms, the rest
is the server around the engine, which delays but does not occupy it. Loads: a cold adapter of 26
MiB took 60 ms, all of it inside the engine's loop. This project's workers read, cast and pin it
beside the loop, one after another, in 27 to 45 ms; running streams then stand still for 5.3 to 6.6
ms (median of `bench.engine.gpu --rows stall` on an H100 and an H200), of which the copy into the
slot is half a millisecond.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from shared.link.messages import Tier

MIB = 1 << 20
Loader: TypeAlias = Literal["vllm", "own"]
"""How workers load adapters: as vLLM does, or as this project's do."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds, tokens, bytes. `decode` is (running sequences, step time) in ascending order: linear
    between, flat below, extended above.
    """

    decode: tuple[tuple[int, float], ...] = ((1, 0.0067), (16, 0.0122), (64, 0.0153), (256, 0.0293))
    prefill_tokens_per_s: float = 48 * 128 / (0.363 - 0.170)
    outside_s: float = 0.0205 - 0.0067 - 128 * (0.363 - 0.170) / (48 * 128)
    """Of a warm TTFT, what the engine is not busy with: HTTP, tokenizing, hand-overs."""
    step_tokens: int = 8192
    """vLLM's max_num_batched_tokens for a server on this class of GPU; longer prompts are prefilled
    in chunks.
    """
    max_sequences: int = 256
    load_s: float = 0.060
    prepare_s: float = 0.0
    """Before it, beside the engine and one adapter after another; 0: `load_s` is all of it."""
    load_bytes: int = 26 * MIB
    """The size that `load_s`, `prepare_s` and `fetch_remote_s` are for; they grow with the
    bytes.
    """
    activate_s: float = 0.004
    """A load from the CPU tier."""
    fetch_remote_s: float = 0.150
    """From the store to disk. Does not stall the engine."""
    fetch_disk_s: float = 0.001
    """Finding it in the disk cache."""
    link_s: float = 0.0002
    """A message from gateway to worker. (What comes back is there at once: the table's TTFTs
    include it.)
    """
    beat_soon_s: float = 0.001
    """A changed residency is told after this long, so that changes at the same moment share a
    heartbeat.
    """

    def step_s(self, sequences: int) -> float:
        """One engine step that decodes `sequences` sequences."""
        table = self.decode
        if sequences <= table[0][0]:
            return table[0][1]
        at = min(bisect_right(table, (sequences, float("inf"))), len(table) - 1)
        (few, few_s), (many, many_s) = table[at - 1], table[at]
        return few_s + (many_s - few_s) * (sequences - few) / (many - few)

    def load_from_s(self, tier: Tier, size_bytes: int) -> float:
        """What a load stalls the engine for."""
        return self.activate_s if tier is Tier.CPU else self.load_s * size_bytes / self.load_bytes

    def prepared_in_s(self, size_bytes: int) -> float:
        return self.prepare_s * size_bytes / self.load_bytes

    def fetch_s(self, tier: Tier, size_bytes: int) -> float:
        """Until the adapter is at hand for a load, the engine undisturbed."""
        if tier is Tier.CPU:
            return 0.0
        return (
            self.fetch_disk_s
            if tier is Tier.DISK
            else self.fetch_remote_s * size_bytes / self.load_bytes
        )

    def most_requests_per_s(
        self, prompt_tokens: float, output_tokens: float, load_s_per_request: float = 0.0
    ) -> float:
        """A bound for one worker: what a batch that is always full completes, with so much of its
        time lost to loads.
        """
        decode_s = output_tokens * self.step_s(self.max_sequences) / self.max_sequences
        return 1.0 / (decode_s + prompt_tokens / self.prefill_tokens_per_s + load_s_per_request)


def timing_of(loads: Loader) -> Timing:
    return (
        Timing()
        if loads == "vllm"
        else replace(Timing(), load_s=0.006, prepare_s=0.036, activate_s=0.001)
    )
