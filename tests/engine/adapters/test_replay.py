"""Shell. An adapter that is read with a template has the same bits as one that vLLM reads.
Templates are used only where that is certain.
"""

from __future__ import annotations

import gc
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

from worker.engine.vllm.lora import files
from worker.engine.vllm.lora.files import read_tensors
from worker.engine.vllm.tensor_replay.file_templates import (
    MAX_TEMPLATES,
    FileTemplates,
    TracedLoRAModel,
    template_key,
    tensors,
)

files.install()

MODULES = ["q_proj", "o_proj", "down_proj"]
RANK, SIZE = 8, 24
PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "r": RANK,
    "lora_alpha": 16,
    "target_modules": MODULES,
    "bias": "none",
}


def adapter(folder: Path, seed: int, dtype: torch.dtype = torch.bfloat16, **config: Any) -> Path:
    folder.mkdir()
    draw = torch.Generator().manual_seed(seed)
    held = {}
    for layer in range(2):
        for module in MODULES:
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            held[f"{name}.lora_A.weight"] = torch.randn(RANK, SIZE, generator=draw).to(dtype)
            held[f"{name}.lora_B.weight"] = torch.randn(SIZE, RANK, generator=draw).to(dtype)
    save_file(held, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**PLAIN, **config}))
    return folder


def theirs(folder: Path, made_by: type[LoRAModel] = LoRAModel) -> Any:
    """What vLLM's add_adapter does for a model without packed modules."""
    helper = PEFTHelper.from_local_dir(str(folder), 4096)
    made = made_by.from_local_checkpoint(
        str(folder), set(MODULES), helper, lora_model_id=1, device="cpu", dtype=torch.bfloat16
    )
    for weights in made.loras.values():
        weights.optimize()
    return made


class Reader:
    """FileTemplates, with a count of how often vLLM was asked."""

    def __init__(self) -> None:
        self.templates = FileTemplates(torch.bfloat16)
        self.asked = 0

    def read(self, folder: Path) -> Any:
        def ask() -> Any:
            self.asked += 1
            return theirs(folder, TracedLoRAModel)

        return self.templates.read(folder, 7, ask)


def bits(lora: Any) -> list[torch.Tensor]:
    return [tensor for _, _, tensor in tensors(lora)]


def same(one: Any, other: Any) -> bool:
    pairs = list(zip(bits(one), bits(other), strict=True))
    return (
        list(one.loras) == list(other.loras)
        and len(pairs) == 2 * 2 * len(MODULES)
        and all(torch.equal(a, b) for a, b in pairs)
    )


@pytest.mark.parametrize(
    ("dtype", "config"),
    [
        (torch.bfloat16, {}),
        (torch.bfloat16, {"lora_alpha": RANK}),  # nothing to scale
        (torch.bfloat16, {"lora_alpha": 3}),
        (torch.float32, {"lora_alpha": 3}),
        (torch.float16, {"use_rslora": True}),
        (torch.bfloat16, {"alpha_pattern": {"o_proj": 5, "layers.1.self_attn.q_proj": 64}}),
    ],
    ids=repr,
)
def test_the_second_adapter_of_a_template_is_what_vllm_would_have_made_and_vllm_is_not_asked(
    tmp_path: Path, dtype: torch.dtype, config: dict[str, Any]
) -> None:
    reader = Reader()
    for seed in range(3):
        folder = adapter(tmp_path / str(seed), seed, dtype, **config)
        read = reader.read(folder)
        assert read.id == 7 and read.block.dtype is torch.bfloat16 and same(read, theirs(folder))
    assert reader.asked == 1


def test_the_order_in_which_peft_wrote_its_modules_makes_no_new_template(tmp_path: Path) -> None:
    reader = Reader()
    reader.read(adapter(tmp_path / "a", 0))
    reader.read(
        adapter(
            tmp_path / "b", 1, target_modules=MODULES[::-1], base_model_name_or_path="elsewhere"
        )
    )
    assert reader.asked == 1


@pytest.mark.parametrize(
    "other",
    [
        {"lora_alpha": 32},
        {"use_rslora": True},
        {"alpha_pattern": {"o_proj": 5}},
        {"alpha_pattern": {"self_attn.o_proj": 7, "o_proj": 5}},
    ],
    ids=repr,
)
def test_another_scaling_is_another_template(tmp_path: Path, other: dict[str, Any]) -> None:
    reader = Reader()
    reader.read(adapter(tmp_path / "a", 0, alpha_pattern={"o_proj": 5, "self_attn.o_proj": 7}))
    folder = adapter(tmp_path / "b", 1, **other)
    assert same(reader.read(folder), theirs(folder)) and reader.asked == 2


def test_copies_of_the_bases_weights_take_no_memory(tmp_path: Path) -> None:
    """They may be 8 GiB, pinned in host memory for each version of the adapter that somebody asks
    for.
    """
    reader = Reader()
    for seed in range(2):
        plain, folder = adapter(tmp_path / f"p{seed}", seed), adapter(tmp_path / f"c{seed}", seed)
        held = load_file(folder / "adapter_model.safetensors")
        for name in ("model.embed_tokens", "lm_head", "model.x.embed_tokens.base_layer"):
            held[f"base_model.model.{name}.weight"] = torch.ones(4000, SIZE, dtype=torch.bfloat16)
        save_file(held, folder / "adapter_model.safetensors")
        read = reader.read(folder)
        assert same(read, theirs(plain))
        assert {t.untyped_storage().nbytes() < 40_000 for t in bits(read)} == {True}
    assert reader.asked == 2


def test_copies_of_the_bases_weights_are_not_even_read(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", 0)
    held = load_file(folder / "adapter_model.safetensors")
    copy = {"base_model.model.lm_head.weight": torch.ones(4000, SIZE, dtype=torch.bfloat16)}
    save_file(held | copy, folder / "adapter_model.safetensors")
    assert read_tensors(folder).keys() == held.keys()


@pytest.mark.parametrize(
    "config",
    [
        b'{"x":[' + b"[]," * 10_000_000 + b"[]]}",
        b'{"x":[' + b"[]," * 300_000 + b"[]]}",
        b"{" + b'"x":' * 5000,
        b"[]",
        b"",
    ],
    ids=["28 MiB", "900 KiB", "deep", "list", "empty"],
)
def test_a_config_that_is_not_checked_yet_does_not_hold_the_steps(
    tmp_path: Path, config: bytes
) -> None:
    """It is read ahead, in the process that runs the steps. 28 MiB of JSON held them for 12 s."""
    folder = adapter(tmp_path / "a", 0)
    assert template_key(folder) is not None
    (folder / "adapter_config.json").write_bytes(config)
    gc.freeze()  # what the process has of other tests is no part of it
    try:
        began = time.thread_time()
        assert template_key(folder) is None
        assert time.thread_time() - began < 1.0
    finally:
        gc.unfreeze()


def test_a_file_of_two_dtypes_is_vllms_business_each_time(tmp_path: Path) -> None:
    reader = Reader()
    for seed in range(2):
        folder = adapter(tmp_path / str(seed), seed)
        held = load_file(folder / "adapter_model.safetensors")
        first = sorted(held)[0]
        save_file({**held, first: held[first].float()}, folder / "adapter_model.safetensors")
        assert same(reader.read(folder), theirs(folder))
    assert reader.asked == 2


def test_a_file_that_was_cut_off_is_refused_and_nothing_is_read_beyond_its_end(
    tmp_path: Path,
) -> None:
    reader = Reader()
    reader.read(adapter(tmp_path / "a", 0))
    file = adapter(tmp_path / "b", 1) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(RuntimeError, match="shorter"):
        reader.read(file.parent)


def test_adapters_of_two_templates_with_equal_places_share_their_layout(tmp_path: Path) -> None:
    reader = Reader()
    one, two = (
        reader.read(adapter(tmp_path / "a", 0)),
        reader.read(adapter(tmp_path / "b", 1, lora_alpha=32)),
    )
    assert two.layout is one.layout and reader.asked == 2


def test_a_template_in_use_outlives_any_number_of_others(tmp_path: Path) -> None:
    reader = Reader()
    usual = adapter(tmp_path / "usual", 0)
    reader.read(usual)
    for n in range(MAX_TEMPLATES + 2):
        reader.read(adapter(tmp_path / str(n), n, lora_alpha=100 + n))
        reader.read(usual)
    assert reader.asked == 1 + MAX_TEMPLATES + 2
