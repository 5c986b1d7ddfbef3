"""Pure. How long things take on a simulated worker: this project's rows for one H200 in
docs/PERFORMANCE.md and bench/results/gpu-8b.md (Llama-8B shape, bf16, vLLM 0.32, adapters of rank
16, prompts of about 130 tokens).

Decode: the time between two tokens of 1, 64, 256 and 512 streams over 16 adapters. Prefill: 63
prompts more in one burst take 362 ms longer to the first token (64 streams, mean of three calls,
beside one stream). A step with a prompt in it: beside 32 streams their longest gap is 20.2 ms for a
warm prompt, where a step takes 7.4 and the prompt 5.7. Such a step does not run as one CUDA graph.
Outside: a warm request alone has its first token after 20.5 ms; its step accounts for the rest.

vLLM schedules a step while the one before it runs (`async_scheduling`). So a request that comes
during a step is in the next but one.

Loads: running streams stand still for 6.6 ms (vLLM: 26.6). A cold adapter's first token comes 92 ms
later than a warm one's (vLLM: 24). The stop and the wait for it are 14 ms of them. The rest is done
beside the engine, one adapter after another: checking, reading, casting and pinning.

`python -m bench.routing.calibration` compares what all of it gives with the rows.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from shared.link.messages import Tier

MIB = 1 << 20
PROMPT = 130
"""Tokens of a prompt in the rows."""
Loader: TypeAlias = Literal["vllm", "own"]
"""How workers load adapters: as vLLM does, or as this project's do."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds, tokens, bytes. `decode` is (running sequences, step time) in ascending order: linear
    between, flat below, extended above.
    """

    decode: tuple[tuple[int, float], ...] = (
        (1, 0.0059),
        (64, 0.0089),
        (256, 0.0144),
        (512, 0.0241),
    )
    prefill_tokens_per_s: float = 63 * PROMPT / (0.382 - 0.020)
    mixed_s: float = 0.0202 - 0.0074 - 0.0057
    """What a step with a prompt in it takes longer, however short the prompt is."""
    outside_s: float = 0.0205 - 0.0059 - (0.0202 - 0.0074 - 0.0057) - 0.0057
    """Of a warm TTFT, what the engine is not busy with: HTTP, tokenizing, hand-overs."""
    scheduled_ahead: bool = True
    """Each step is scheduled while the one before it runs."""
    step_tokens: int = 8192
    """vLLM's max_num_batched_tokens for a server on this class of GPU; longer prompts are prefilled
    in chunks.
    """
    max_sequences: int = 256
    load_s: float = 0.0266
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
    heartbeat_soon_s: float = 0.001
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

    def prefill_step_s(self, sequences: int, prompt_tokens: int) -> float:
        """One engine step that decodes `sequences` sequences, those of its prompts included."""
        return self.step_s(sequences) + self.mixed_s + prompt_tokens / self.prefill_tokens_per_s

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
        else replace(Timing(), load_s=0.0066, prepare_s=0.078, activate_s=0.001)
    )
