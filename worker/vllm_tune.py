"""Shell. `python -m worker.vllm_tune`: finds how vLLM's LoRA kernels should be launched on this GPU, and writes the tables that workers use.

    python -m worker.vllm_tune --out worker/lora_kernels --slots 16 --rank 16

vLLM (0.32) launches its two kernels with one guess for every GPU and shape: 64 splits of K in blocks of 256, where a hidden size of 4,096 has
work for 16; the rest add zeros to memory, once per adapter in the batch. The tables have vLLM's own format (VLLM_TUNED_CONFIG_FOLDER) and are
found by worker/vllm_patches.py. Shapes are those of a Llama layer; vLLM takes the nearest for others. Every candidate's result is compared with
that of vLLM's own guess before its time counts. Takes 4 minutes on an H200.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
from vllm.lora.ops.triton_ops import lora_expand_op, lora_shrink_op, utils
from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta

from worker.vllm_patches import gpu_file

Config: TypeAlias = dict[str, Any]

TOKENS = (1, 4, 16, 32, 64, 128, 256, 512, 2048, 8192)
LAYERS = 8
"""Copies of the weights that one measurement goes through: more than the GPU's cache holds, as in a model."""
TOLERANCE = 0.05
GAIN = 0.97
"""A candidate must be that much faster than vLLM's guess; noise is not worth a table entry."""


def shrink_candidates(tokens: int, k: int) -> Iterator[Config]:
    """block_k x split_k covers K at most once: what is beyond adds zeros."""
    rows = (16, 32) if tokens <= 512 else (32, 64)
    for block_m, block_k, split_k, stages in itertools.product(rows, (64, 128, 256), (1, 4, 8, 16, 32), (2, 4)):
        if block_k * split_k <= k:
            yield {**_SHRINK, "block_m": block_m, "block_k": block_k, "split_k": split_k, "num_stages": stages}


def expand_candidates(tokens: int, rank: int) -> Iterator[Config]:
    rows = (16, 32, 64) if tokens <= 512 else (32, 64, 128)
    for block_m, block_n, warps in itertools.product(rows, (64, 128, 256), (2, 4, 8)):
        yield {**_EXPAND, "block_m": block_m, "block_n": block_n, "block_k": max(16, min(64, rank)), "num_warps": warps}


_SHRINK: Config = {"block_n": 16, "num_warps": 4, "num_ctas": 1, "group_size_m": 8, "max_nreg": None}
_EXPAND: Config = {"num_ctas": 1, "num_stages": 2, "max_nreg": None}


class Bench:
    """The two kernels on random weights of `slots` adapters, each with its share of the tokens."""

    def __init__(self, slots: int, rank: int, hidden: int, outs: list[int], tokens: int) -> None:
        utils._LORA_A_PTR_DICT.clear()  # keyed by addresses, which the next weights may get again
        utils._LORA_B_PTR_DICT.clear()
        g = torch.Generator("cuda").manual_seed(0)
        self.tokens, self.rank, self.outs = tokens, rank, outs
        self.x = torch.randn(tokens, hidden, device="cuda", generator=g).bfloat16()
        self.mid = torch.randn(len(outs), tokens, rank, device="cuda", generator=g)
        self.y = torch.zeros(tokens, sum(outs), device="cuda", dtype=torch.bfloat16)
        self.a = [[self._weights(slots, rank, hidden, g) for _ in outs] for _ in range(LAYERS)]
        self.b = [[self._weights(slots, n, rank, g) for n in outs] for _ in range(LAYERS)]
        meta = LoRAKernelMeta.make(slots, tokens, "cuda")
        meta.prepare_tensors(torch.arange(tokens, device="cuda", dtype=torch.int32) % slots)
        self.meta = meta.meta_args(tokens, False)

    @staticmethod
    def _weights(*shape: Any) -> torch.Tensor:
        *size, g = shape
        return (torch.randn(size[0], 1, *size[1:], device="cuda", generator=g) * 0.02).bfloat16()

    def shrink(self, layer: int) -> torch.Tensor:
        lora_shrink_op._lora_shrink(self.x, self.a[layer], self.mid, *self.meta, 1.0)
        return self.mid

    def expand(self, layer: int) -> torch.Tensor:
        lora_expand_op._lora_expand(self.mid, self.b[layer], self.y, *self.meta, offset_start=0, add_inputs=True)
        return self.y

    def result(self, op: Callable[[int], torch.Tensor]) -> torch.Tensor:
        self.y.zero_()
        return op(0).float().clone()


def microseconds(op: Callable[[int], torch.Tensor]) -> float:
    """Per launch, in a CUDA graph as the engine runs it; the least of five."""
    for layer in range(LAYERS):  # vLLM looks addresses up at first use, which a graph cannot hold
        op(layer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(LAYERS):
            op(layer)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    times: list[float] = []
    for _ in range(5):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / LAYERS)
    return min(times)


def best(op: Callable[[int], torch.Tensor], bench: Bench, default: Config, candidates: Iterator[Config]) -> tuple[Config, float, float]:
    """(the fastest config that gives the same result, its time, the default's time)."""
    use(default)
    right = bench.result(op)
    scale = right.abs().max().item() or 1.0
    usual_us = microseconds(op)
    found, found_us = default, usual_us * GAIN
    for candidate in candidates:
        use(candidate)
        try:
            if (bench.result(op) - right).abs().max().item() > TOLERANCE * scale:
                continue
            took_us = microseconds(op)
        except Exception:  # triton raises its own errors for what this GPU cannot launch (registers, shared memory): not a candidate then
            torch.cuda.synchronize()
            continue
        if took_us < found_us:
            found, found_us = candidate, took_us
    return found, min(found_us, usual_us), usual_us


def use(config: Config) -> None:
    """The next launches take it."""
    chosen: Callable[..., Config] = lambda *_, **__: config  # noqa: E731
    lora_shrink_op.get_lora_op_configs = lora_expand_op.get_lora_op_configs = chosen


def tune(slots: int, rank: int, hidden: int, kv: int, intermediate: int, seconds: float) -> tuple[Config, Config]:
    """The two tables: [slots + 1][slices][tokens][k][n] -> config."""
    shapes = {
        "qkv": (hidden, [hidden, kv, kv]),
        "o": (hidden, [hidden]),
        "gate_up": (hidden, [intermediate] * 2),
        "down": (intermediate, [hidden]),
    }
    shrink: Config = {}
    expand: Config = {}
    until = time.monotonic() + seconds
    # The sizes of decoding first, should the time be short.
    for tokens in sorted(TOKENS, key=lambda t: (t > 512, -t)):
        for name, (k, outs) in shapes.items():
            if time.monotonic() > until:
                print(f"out of time before {name} with {tokens} tokens", flush=True)
                return shrink, expand
            bench = Bench(slots, rank, k, outs, tokens)
            guess = utils.get_lora_op_configs("shrink", slots + 1, tokens, k, rank, len(outs))
            down, down_us, was_down_us = best(bench.shrink, bench, guess, shrink_candidates(tokens, k))
            guess = utils.get_lora_op_configs("expand", slots + 1, tokens, max(outs), rank, len(outs), True)
            up, up_us, was_up_us = best(bench.expand, bench, guess, expand_candidates(tokens, rank))
            _put(shrink, down, slots + 1, len(outs), tokens, k, rank)
            _put(expand, up, slots + 1, len(outs), tokens, rank, max(outs))
            print(f"{name:8} {tokens:5} tokens  shrink {was_down_us:7.1f} -> {down_us:6.1f} us {_short(down)}", flush=True)
            print(f"{'':21}  expand {was_up_us:7.1f} -> {up_us:6.1f} us {_short(up)}", flush=True)
    return shrink, expand


def _put(table: Config, config: Config, *keys: int) -> None:
    for key in keys[:-1]:
        table = table.setdefault(str(key), {})
    table[str(keys[-1])] = config


def _short(config: Config) -> str:
    return " ".join(
        f"{key}={config[key]}" for key in ("block_m", "block_n", "block_k", "split_k", "num_warps", "num_stages") if key in config
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m worker.vllm_tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--kv", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--seconds", type=float, default=420.0, help="stop after so long; what is measured by then is written")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    shrink, expand = tune(args.slots, args.rank, args.hidden, args.kv, args.intermediate, args.seconds)
    for op, table in (("shrink", shrink), ("expand", expand)):
        path = args.out / gpu_file(torch.cuda.get_device_name(), op, True)
        path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
