"""Pure. How many adapter slots a GPU has room for, if the config names no number.

vLLM reserves every slot for the largest rank, and for every layer that an adapter may change. Only
then does it divide the rest into KV cache. A layer of rank r from n to m numbers takes r (n + m).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHARE = 0.05
"""Share of the GPU's memory for slots. It holds 47 slots of rank 16 for an 8B model on 80 GB. The
weights leave 55 GB there, so the KV cache loses a thirteenth.
"""
LEAST_SLOTS = 4
"""With fewer slots every batch would wait for one. Whoever has less memory names the number."""
MOST_SLOTS = 64
"""More slots have not been measured. What the kernels launch grows with their number."""
BYTES = 2  # bf16
DEFAULT_RANK = 16  # vLLM's max_lora_rank


def slot_bytes(config: Mapping[str, Any], rank: int) -> int:
    """Bytes of one slot, by the numbers in a model's config.json. 0 if they are missing."""
    text = config.get("text_config")
    if isinstance(text, Mapping) and "hidden_size" not in config:
        config = text
    hidden, layers, heads = (
        int(config.get(key) or 0)
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")
    )
    if not hidden or not layers or not heads:
        return 0
    head = int(config.get("head_dim") or hidden // heads)
    queries = head * heads
    keys = head * int(config.get("num_key_value_heads") or heads)
    attention = 2 * (hidden + queries) + 2 * (hidden + keys)  # q and o, k and v
    experts = int(config.get("num_local_experts") or config.get("num_experts") or 1)
    inner = config.get("moe_intermediate_size") or config.get("intermediate_size")
    feed_forward = 3 * experts * (hidden + int(inner or 4 * hidden))  # gate, up and down
    return layers * rank * (attention + feed_forward) * BYTES


def slots_that_fit(memory_bytes: int, one_slot_bytes: int) -> int:
    """How many slots fit into SHARE of the memory."""
    wanted = int(SHARE * memory_bytes / one_slot_bytes)
    return max(LEAST_SLOTS, min(MOST_SLOTS, wanted))
