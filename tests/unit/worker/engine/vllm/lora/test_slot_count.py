from __future__ import annotations

import pytest

from worker.engine.vllm.lora.slot_count import LEAST_SLOTS, MOST_SLOTS, slot_bytes, slots_that_fit

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


def test_a_slot_is_as_large_as_an_adapter_of_every_layer() -> None:
    per_layer = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)
    assert slot_bytes(LLAMA_8B, 16) == 32 * 16 * per_layer * 2
    assert slot_bytes(LLAMA_8B, 64) == 4 * slot_bytes(LLAMA_8B, 16)
    assert slot_bytes({"text_config": LLAMA_8B}, 16) == slot_bytes(LLAMA_8B, 16)
    assert slot_bytes({**LLAMA_8B, "num_local_experts": 8}, 16) > 5 * slot_bytes(LLAMA_8B, 16)
    assert slot_bytes({"hidden_size": 4096}, 16) == 0


@pytest.mark.parametrize(
    ("memory_gb", "rank", "slots"),
    [(80, 16, 47), (80, 64, 11), (24, 16, 14), (24, 256, LEAST_SLOTS)],
)
def test_slots_follow_memory_and_rank(memory_gb: int, rank: int, slots: int) -> None:
    assert slots_that_fit(memory_gb * 10**9, slot_bytes(LLAMA_8B, rank)) == slots


def test_a_small_model_gets_no_more_slots_than_were_measured() -> None:
    small = {**LLAMA_8B, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    assert slots_that_fit(80 * 10**9, slot_bytes(small, 8)) == MOST_SLOTS
