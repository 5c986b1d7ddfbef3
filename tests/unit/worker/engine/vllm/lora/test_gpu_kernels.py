"""Pure. The GPU's kernels for adapters in Triton's interpreter, and how their launches are cut. On
a GPU: `python -m bench.engine.lora_kernel`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from worker.engine.vllm.lora import tile_kernel
from worker.engine.vllm.lora.step_metadata import most_tiles, rows_of_a_tile

ROOT = Path(__file__).parents[6]


def test_each_token_gets_the_product_of_its_own_adapter_where_that_has_weights() -> None:
    script = Path(__file__).with_name("interpreted_kernels.py")
    done = subprocess.run(
        [sys.executable, script], cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert all(difference < 1e-4 for difference in json.loads(done.stdout)), done.stdout


def test_a_layer_gives_each_token_its_adapter_in_steps_of_few_and_of_many_tokens() -> None:
    script = Path(__file__).with_name("interpreted_layer.py")
    env = {"PYTHONPATH": str(ROOT), "PATH": "", "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    steps = json.loads(done.stdout.splitlines()[-1])
    assert min(n for n, _ in steps) == 1 and max(n for n, _ in steps) > 512
    assert all(difference < 4e-3 for _, difference in steps), steps  # float16 rounds that much


def test_it_takes_the_place_of_vllm_s_layers() -> None:
    """All names of vLLM that it replaces are there, and the operator's schema is one of torch's."""
    script = (
        "from worker.engine.vllm.lora import gpu_lora\n"
        "from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU as wrapper\n"
        "gpu_lora.install(); gpu_lora.install()\n"
        "import torch; assert wrapper.loraplex and torch.ops.vllm.loraplex_lora_linear.default\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


HEAD = """
import torch
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU as wrapper
from worker.engine.vllm.lora import gpu_lora
from worker.engine.vllm.lora.presence import Presence

asked = []
wrapper.add_lora_logits = lambda self, *more, **named: asked.append(more)
torch.cuda.is_current_stream_capturing = lambda: False
gpu_lora.install()
a, b, other = torch.zeros(3, 1, 4, 8), torch.zeros(3, 1, 9, 4), torch.zeros(3, 1, 4, 8)
head = gpu_lora._Layers.presence = Presence([((a,), (b,))], 3)
step = object.__new__(wrapper)

def asks(slots, first):
    step.wanted = head.wanted(slots)
    asked.clear()
    step.add_lora_logits(torch.zeros(2, 9), torch.zeros(2, 8), first, b, 1.0)
    return len(asked)

assert asks([1], a) == 1, "before anything is written"
for slot in range(3):
    head.write(slot, {b.untyped_storage().data_ptr(): 4} if slot == 2 else {})
assert asks([0, 1], a) == 0 and asks([], a) == 0
assert asks([0, 2], a) == 1
assert asks([0], other) == 1, "a head that is not known"
torch.cuda.is_current_stream_capturing = lambda: True
assert asks([0], a) == 1, "a graph is for any adapters"
"""


def test_a_head_is_left_out_only_if_no_adapter_of_the_step_has_one() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HEAD], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 64, 512, 513, 8192])
@pytest.mark.parametrize("slots", [1, 16, 64])
def test_the_scratch_has_room_for_every_launch(tokens: int, slots: int) -> None:
    scratch = tile_kernel.TileScratch.make(8192, slots, 3, 16, "cpu")
    rows = rows_of_a_tile(tokens)
    groups = 3 * most_tiles(tokens, slots, rows)
    parts = tile_kernel.splits(groups) if rows == 16 else tile_kernel.LARGE_SPLITS
    assert groups <= scratch.arrived.size(1)
    assert parts == 1 or groups * parts * rows * 16 <= scratch.partial.numel()
    assert parts & (parts - 1) == 0, "arrivals are counted modulo a power of two"
