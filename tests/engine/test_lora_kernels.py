"""Shell. vLLM's LoRA kernels take their launch configs from our tables, at the place where it looks them up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from worker import vllm_patches

SHAPES = {"17": {"1": {"64": {"4096": {"16": {"block_m": 16}}}}, "3": {"64": {"4096": {"16": {"block_m": 32}}}}}}


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "Some_GPU_1_SHRINK.json").write_text(json.dumps(SHAPES))
    monkeypatch.setattr(vllm_patches, "KERNELS", tmp_path)
    return tmp_path


def test_a_layer_of_more_slices_than_the_table_has_gets_the_nearest(tables: Path) -> None:
    table = vllm_patches.kernel_table(tables, "Some GPU-1", "shrink", None)
    assert table is not None and table["17"]["4"] == SHAPES["17"]["3"] and table["17"]["1"] == SHAPES["17"]["1"]


def test_a_gpu_without_tables_keeps_the_guess_of_vllm(tables: Path) -> None:
    assert vllm_patches.kernel_table(tables, "Other GPU", "shrink", None) is None
    assert vllm_patches.kernel_table(tables, "Some GPU-1", "expand", True) is None


def test_vllm_finds_the_table_of_its_gpu_and_of_no_other_kernel(
    vllm_environment: None, tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from vllm.lora.ops.triton_ops import utils

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU-1")
    monkeypatch.setattr(utils, "load_lora_op_config", utils.load_lora_op_config)  # put back after the test
    vllm_patches._lora_kernels_fit_the_gpu()
    ours = utils.get_lora_op_configs.__wrapped__
    assert ours("shrink", 9, 50, 4096, 16, 1) == {"block_m": 16}
    assert ours("shrink", 17, 64, 4096, 16, 4) == {"block_m": 32}
    assert ours("expand", 17, 64, 4096, 16, 1, True)["block_n"] == 128, "no table: vLLM's own guess"
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tables))
    assert "block_m" in ours("shrink", 17, 64, 4096, 16, 1)
