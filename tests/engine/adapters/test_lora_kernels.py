"""Shell. vLLM's LoRA kernels take their launch configs from our tables, at the place where it looks
them up.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import ROOT
from worker.engine.factory import VLLM_CPU_ENV, VLLM_ENV
from worker.engine.vllm import patches

SHAPES = {
    "17": {
        "1": {"64": {"4096": {"16": {"block_m": 16}}}},
        "3": {"64": {"4096": {"16": {"block_m": 32}}}},
    }
}


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    (tmp_path / "Some_GPU_1_SHRINK.json").write_text(json.dumps(SHAPES))
    return tmp_path


def test_a_layer_of_more_slices_than_the_table_has_gets_the_nearest(tables: Path) -> None:
    table = patches.kernel_table(tables, "Some GPU-1", "shrink", None)
    assert (
        table is not None
        and table["17"]["4"] == SHAPES["17"]["3"]
        and table["17"]["1"] == SHAPES["17"]["1"]
    )


def test_a_gpu_without_tables_keeps_the_guess_of_vllm(tables: Path) -> None:
    assert patches.kernel_table(tables, "Other GPU", "shrink", None) is None
    assert patches.kernel_table(tables, "Some GPU-1", "expand", True) is None


def test_the_tables_that_come_along_serve_every_layer_of_a_llama_at_16_slots() -> None:
    for gpu in set(patches.RELATIVES.values()):
        shrink = patches.kernel_table(patches.KERNELS, gpu, "shrink", None)
        expand = patches.kernel_table(patches.KERNELS, gpu, "expand", True)
        assert shrink is not None and expand is not None
        for slices in ("1", "2", "3"):
            for tokens in ("4", "64", "256", "2048"):
                for table in (shrink, expand):
                    assert all(
                        config["block_m"] > 0
                        for by_n in table["17"][slices][tokens].values()
                        for config in by_n.values()
                    )


PROGRAM = """
import json, sys
from pathlib import Path
import torch
from vllm.lora.ops.triton_ops import utils
from worker.engine.vllm import patches

torch.cuda.get_device_name = lambda: sys.argv[2]
torch.cuda.get_device_capability = lambda: (9, 9)
patches.RELATIVES = {(9, 9): "Some GPU-1"} if len(sys.argv) > 3 else {}
patches.KERNELS = Path(sys.argv[1])
patches._lora_kernels_fit_the_gpu()
ours = utils.get_lora_op_configs
said = [
    ours("shrink", 9, 50, 4096, 16, 1),
    ours("shrink", 17, 64, 4096, 16, 4),
    ours("expand", 17, 64, 4096, 16, 1, True),
]
print(json.dumps(said))
"""


@pytest.mark.parametrize(
    "gpu", [["Some GPU-1"], ["Its relative", "has none"]], ids=["its own", "of a relative"]
)
def test_vllm_finds_the_table_of_its_gpu_and_of_no_other_kernel(
    tables: Path, gpu: list[str]
) -> None:
    """In a process of its own: what it changes in vLLM must not stay."""
    env = {**os.environ, **VLLM_ENV, **VLLM_CPU_ENV, "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tables), *gpu],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=env,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    nearest, slices, expand = json.loads(done.stdout.splitlines()[-1])
    assert nearest == {"block_m": 16} and slices == {"block_m": 32}
    assert expand["block_n"] == 128, "no table: vLLM's own guess"


RESUMED = """
import sys
from pathlib import Path
from worker.engine.vllm.tune_kernels import Table

path = Path(sys.argv[1])
Table(path).put((17, 3, 64, 4096, 16), {"block_m": 16})
again = Table(path)
assert (17, 3, 64, 4096, 16) in again and (17, 3, 1, 4096, 16) not in again
again.put((17, 1, 64, 4096, 16), {"block_m": 32})
"""


def test_a_table_is_whole_after_every_shape_and_the_next_run_goes_on_with_it(
    tmp_path: Path,
) -> None:
    env = {**os.environ, **VLLM_ENV, **VLLM_CPU_ENV, "VLLM_LOGGING_LEVEL": "ERROR"}
    path = tmp_path / "Some_GPU_1_SHRINK.json"
    subprocess.run(
        [sys.executable, "-c", RESUMED, str(path)], check=True, cwd=ROOT, env=env, timeout=120
    )
    table = patches.kernel_table(tmp_path, "Some GPU-1", "shrink", None)
    assert (
        table is not None
        and [*table["17"]] == ["1", "3"]
        and table["17"]["3"]["64"] == {"4096": {"16": {"block_m": 16}}}
    )
    assert [*tmp_path.iterdir()] == [path]


def test_tuning_without_a_gpu_says_what_it_needs(tmp_path: Path) -> None:
    env = {**os.environ, **VLLM_ENV, **VLLM_CPU_ENV, "CUDA_VISIBLE_DEVICES": ""}
    argv = [sys.executable, "-m", "worker.engine.vllm.tune_kernels", "--out", str(tmp_path / "out")]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, env=env, timeout=120)
    assert (
        done.returncode == 2 and "no CUDA device" in done.stderr and "Traceback" not in done.stderr
    )
    assert not (tmp_path / "out").exists()


BASE_ROWS = """
import torch
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu
from worker.engine.vllm import patches

patches.apply()
weights, rows, own = torch.ones(2, 1, 4, 8), torch.ones(3, 8), torch.tensor([1, -1, 0])
for kernel in (lora_ops.bgmv_shrink, punica_cpu.bgmv_shrink):
    made = torch.empty(3, 4)
    kernel(rows, weights, made, own, 1.0)
    assert made.tolist() == [[8.0] * 4, [0.0] * 4, [8.0] * 4], made
"""


def test_on_a_cpu_a_base_row_gets_nothing_of_the_last_slot_in_the_kernels_that_stay_vllms() -> None:
    env = {**os.environ, **VLLM_ENV, **VLLM_CPU_ENV, "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(
        [sys.executable, "-c", BASE_ROWS],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=env,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
