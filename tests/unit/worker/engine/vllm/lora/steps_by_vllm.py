"""Shell. Gives the same steps to vLLM's update_metadata and to a StepBlock, on the CPU. Prints how
many steps there were, and what differed.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
from vllm.lora.punica_wrapper import punica_gpu

from worker.engine.vllm.lora.step_block import INDICES, META, StepBlock

TOKENS, SLOTS, VOCAB = 700, 5, 1000
punica_gpu.LoRAKernelMeta = LoRAKernelMeta  # vLLM imports it where there is a GPU only


def wrapper(specialize: bool) -> Any:
    config = SimpleNamespace(max_loras=SLOTS, specialize_active_lora=specialize)
    made = punica_gpu.PunicaWrapperGPU(TOKENS, 64, "cpu", lora_config=config)
    for tensor in held(made).values():
        tensor.zero_()  # they are made without values
    return made


def held(of: Any) -> dict[str, torch.Tensor]:
    meta = {"token": of.token_mapping_meta, "prompt": of.prompt_mapping_meta}
    return {name: getattr(of, name) for name in INDICES} | {
        f"{kind}.{name}": getattr(m, name) for kind, m in meta.items() for name in META
    }


def steps() -> Iterator[tuple[LoRAMapping, list[int | None]]]:
    chance = random.Random(3)
    for step in range(30):
        id_of: list[int | None] = [chance.choice((None, 10 * slot + 7)) for slot in range(SLOTS)]
        ids = [0, *(i for i in id_of if i is not None)] if step % 7 else [0]
        requests = [(chance.choice(ids), chance.choice((1, 1, 1, 9, 40))) for _ in range(12)]
        tokens = tuple(adapter for adapter, count in requests for _ in range(count))
        yield LoRAMapping(tokens, tuple(a for a, _ in requests), is_prefill=True), id_of


def differ(specialize: bool) -> list[str]:
    theirs, ours = wrapper(specialize), wrapper(specialize)
    block = StepBlock(ours, SLOTS)
    found = set()
    for mapping, id_of in steps():
        theirs.update_metadata(mapping, id_of, SLOTS + 1, VOCAB)
        used = block.update(mapping, id_of, SLOTS + 1, VOCAB)
        lengths = {"token": len(mapping.index_mapping), "prompt": len(mapping.prompt_mapping)}
        none = not any(mapping.index_mapping)
        if list(used) != [s for s, i in enumerate(id_of) if i and i in mapping.index_mapping]:
            found.add("used")
        for name, one in held(theirs).items():
            # Behind the step's own tokens vLLM leaves what earlier steps wrote.
            of = "prompt" if "sampler" in name or name.startswith("prompt") else "token"
            count = lengths[of] if len(one) == TOKENS else len(one)
            count = 0 if none and name.partition(".")[2] in META[:2] else count
            if not torch.equal(one[:count], held(ours)[name][:count]):
                found.add(name)
        for name in ("no_lora_flag_cpu", "num_active_loras_cpu"):
            for meta in ("token_mapping_meta", "prompt_mapping_meta"):
                if getattr(getattr(theirs, meta), name) != getattr(getattr(ours, meta), name):
                    found.add(f"{meta}.{name}")
        if theirs.indices_len != ours.indices_len:
            found.add("indices_len")
        found |= tiles_differ(block, mapping, id_of)
    return sorted(found)


def tiles_differ(block: StepBlock, mapping: LoRAMapping, id_of: list[int | None]) -> set[str]:
    """Every token of an adapter is in exactly one tile, which is of its slot."""
    want = {
        token: id_of.index(adapter)
        for token, adapter in enumerate(mapping.index_mapping)
        if adapter
    }
    found = set()
    for slots, rows in (block.tiles[:2], block.tiles[2:]):
        pairs = [
            (token, slot)
            for slot, row in zip(slots.tolist(), rows.tolist(), strict=True)
            for token in row
            if token >= 0
        ]
        if sorted(pairs) != sorted(want.items()):
            found.add(f"tiles of {rows.shape[1]} rows")
    return found


if __name__ == "__main__":
    wrong = differ(specialize=False) + differ(specialize=True)
    json.dump({"steps": 60, "differ": wrong}, sys.stdout)
