"""Shell. A LoRA layer on a CPU, one core: ours and vLLM's kernels, microseconds per layer and step.
`make bench-micro ARGS="-k cpu_lora"`.
"""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

SHAPES = {
    "192x512, rank 16, 8 slots": (192, 512, 16, 8),
    "896x896, rank 32, 16 slots": (896, 896, 32, 16),
}
TOKENS = (1, 16, 64, 256)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernels", ["loraplex", "vllm"])
def test_a_layer(benchmark: Any, kernels: str, shape: str, tokens: int) -> None:
    size_in, size_out, rank, slots = SHAPES[shape]
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    a, b = torch.randn(slots, 1, rank, size_in), torch.randn(slots, 1, size_out, rank)
    x, y = torch.randn(tokens, size_in), torch.zeros(tokens, size_out)
    own = torch.randint(0, slots, (tokens,))
    try:
        if kernels == "loraplex":
            from worker.engine.vllm.lora.cpu_lora import Rows, add

            rows = Rows(own.tolist())
            benchmark(lambda: add(y, x, [a], [b], 1.0, [size_out], rows))
        else:
            ops = pytest.importorskip("vllm.lora.ops.torch_ops.lora_ops")
            buffer = torch.zeros(tokens, rank)

            def layer() -> None:
                ops.bgmv_shrink(x, a, buffer, own)
                ops.bgmv_expand_slice(buffer, b, y, own, 0, size_out)

            benchmark(layer)
    finally:
        torch.set_num_threads(threads)
