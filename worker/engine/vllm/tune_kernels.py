r"""Shell. Finds how vLLM's LoRA kernels should be launched on this GPU, and writes the tables that
workers use.

    python -m worker.engine.vllm.tune_kernels --out worker/engine/vllm/lora_kernels \
        --slots 16 --rank 16

vLLM 0.32 launches its two kernels with one guess for every GPU and shape: 64 splits of K in blocks
of 256. A hidden size of 4,096 has work for 16 of them. The others add zeros to memory, once per
adapter in the batch. The tables have vLLM's own format (VLLM_TUNED_CONFIG_FOLDER), and
worker/engine/vllm/patches.py finds them. The shapes are those of a Llama layer; vLLM takes the
nearest for others. A candidate's time counts only if its result equals that of vLLM's own guess. It
takes some minutes, most of them to compile the candidates.

The tables are written after every shape, and a shape that they have is not measured again. So the
same command goes on where the last one stopped, however it ended. To begin anew, delete the tables.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
from vllm.lora.ops.triton_ops import lora_expand_op, lora_shrink_op, utils
from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta

from worker.engine.vllm.patches import gpu_file

Config: TypeAlias = dict[str, Any]

TOKENS = (64, 256, 128, 512, 32, 2048, 8192, 16, 4, 1)
"""Batch sizes, the most important first: what a busy engine decodes, what it prefills, and what a
quiet engine decodes. Between them vLLM takes the nearest.
"""
LAYERS = 8
"""Copies of the weights that one measurement goes through. They exceed the GPU's cache, as a
model's layers do.
"""
TOLERANCE = 0.05
GAIN = 0.97
"""A candidate must take less than this share of the time of vLLM's guess. Noise is not worth an
entry.
"""


def shrink_candidates(tokens: int, k: int) -> Iterator[Config]:
    """Launches in which block_k x split_k covers K at most once. Anything beyond only adds
    zeros.
    """
    rows = (16, 32) if tokens <= 512 else (32, 64)
    for block_m, block_k, split_k, stages in itertools.product(
        rows, (64, 128, 256), (1, 4, 8, 16, 32), (2, 4)
    ):
        if block_k * split_k <= k:
            yield {
                **_SHRINK,
                "block_m": block_m,
                "block_k": block_k,
                "split_k": split_k,
                "num_stages": stages,
            }


def expand_candidates(tokens: int, rank: int) -> Iterator[Config]:
    rows = (16, 32, 64) if tokens <= 512 else (32, 64, 128)
    for block_m, block_n, warps in itertools.product(rows, (64, 128, 256), (2, 4, 8)):
        yield {
            **_EXPAND,
            "block_m": block_m,
            "block_n": block_n,
            "block_k": max(16, min(64, rank)),
            "num_warps": warps,
        }


_SHRINK: Config = {
    "block_n": 16,
    "num_warps": 4,
    "num_ctas": 1,
    "group_size_m": 8,
    "max_nreg": None,
}
_EXPAND: Config = {"num_ctas": 1, "num_stages": 2, "max_nreg": None}


class Bench:
    """The two kernels on random weights of `slots` adapters, each with its share of the tokens."""

    def __init__(self, slots: int, rank: int, hidden: int, outs: list[int], tokens: int) -> None:
        utils._LORA_A_PTR_DICT.clear()  # it is keyed by addresses, which the next weights may reuse
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
        lora_expand_op._lora_expand(
            self.mid, self.b[layer], self.y, *self.meta, offset_start=0, add_inputs=True
        )
        return self.y

    def result(self, op: Callable[[int], torch.Tensor]) -> torch.Tensor:
        self.y.zero_()
        return op(0).float().clone()


def microseconds(op: Callable[[int], torch.Tensor]) -> float:
    """Time per launch in a CUDA graph, as the engine runs it. The least of five measurements."""
    # vLLM looks up addresses at first use, and a graph cannot hold that
    for layer in range(LAYERS):
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


class OutOfTime(Exception):
    """The time was up before all candidates of a shape were measured. The next run begins with that
    shape.
    """


def best(
    op: Callable[[int], torch.Tensor],
    bench: Bench,
    default: Config,
    candidates: Iterator[Config],
    until: float,
) -> tuple[Config, float, float]:
    """Returns (the fastest config with the same result, its time, the default's time). Raises
    OutOfTime.
    """
    use(default)
    right = bench.result(op)
    scale = right.abs().max().item() or 1.0
    usual_us = microseconds(op)
    found, found_us = default, usual_us * GAIN
    for candidate in candidates:
        if time.monotonic() > until:
            raise OutOfTime
        use(candidate)
        try:
            # also skips a result that is not a number
            if not (bench.result(op) - right).abs().max().item() <= TOLERANCE * scale:
                continue
            took_us = microseconds(op)
        except Exception:
            # Triton raises its own errors for what this GPU cannot launch (registers, shared
            # memory). Such a config is no candidate.
            torch.cuda.synchronize()
            continue
        if took_us < found_us:
            found, found_us = candidate, took_us
    return found, min(found_us, usual_us), usual_us


def use(config: Config) -> None:
    """Makes the next launches use this config."""
    chosen: Callable[..., Config] = lambda *_, **__: config  # noqa: E731
    lora_shrink_op.get_lora_op_configs = lora_expand_op.get_lora_op_configs = chosen


class Table:
    """The configs of one kernel, [slots + 1][slices][tokens][k][n], as in its file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._configs: Config = json.loads(path.read_text()) if path.exists() else {}

    def __contains__(self, keys: tuple[int, ...]) -> bool:
        table = self._configs
        for key in keys:
            if str(key) not in table:
                return False
            table = table[str(key)]
        return True

    def put(self, keys: tuple[int, ...], config: Config) -> None:
        """Adds an entry and writes the file, which is complete at every moment."""
        table = self._configs
        for key in keys[:-1]:
            table = table.setdefault(str(key), {})
        table[str(keys[-1])] = config
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self._configs, indent=1, sort_keys=True) + "\n")
        os.replace(part, self.path)


def tune(
    shrink: Table,
    expand: Table,
    slots: int,
    rank: int,
    hidden: int,
    kv: int,
    intermediate: int,
    until: float,
) -> None:
    """Fills the tables. Raises OutOfTime."""
    shapes = {
        "qkv": (hidden, [hidden, kv, kv]),
        "o": (hidden, [hidden]),
        "gate_up": (hidden, [intermediate] * 2),
        "down": (intermediate, [hidden]),
    }
    for tokens, (name, (k, outs)) in itertools.product(TOKENS, shapes.items()):
        down_at, up_at = (
            (slots + 1, len(outs), tokens, k, rank),
            (slots + 1, len(outs), tokens, rank, max(outs)),
        )
        if down_at in shrink and up_at in expand:
            continue
        bench = Bench(slots, rank, k, outs, tokens)
        if down_at not in shrink:
            guess = utils.get_lora_op_configs("shrink", slots + 1, tokens, k, rank, len(outs))
            down, us, was_us = best(bench.shrink, bench, guess, shrink_candidates(tokens, k), until)
            shrink.put(down_at, down)
            print(
                f"{name:8} {tokens:5} tokens  shrink {was_us:7.1f} -> {us:6.1f} us {_short(down)}",
                flush=True,
            )
        if up_at not in expand:
            guess = utils.get_lora_op_configs(
                "expand", slots + 1, tokens, max(outs), rank, len(outs), True
            )
            up, us, was_us = best(
                bench.expand, bench, guess, expand_candidates(tokens, rank), until
            )
            expand.put(up_at, up)
            print(
                f"{name:8} {tokens:5} tokens  expand {was_us:7.1f} -> {us:6.1f} us {_short(up)}",
                flush=True,
            )


def _short(config: Config) -> str:
    return " ".join(
        f"{key}={config[key]}"
        for key in ("block_m", "block_n", "block_k", "split_k", "num_warps", "num_stages")
        if key in config
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m worker.engine.vllm.tune_kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--kv", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument(
        "--seconds",
        type=float,
        default=420.0,
        help="stop after so long; the next run goes on (default %(default)s)",
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "vllm_tune: no CUDA device here; run it on the kind of GPU that the workers have",
            file=sys.stderr,
        )
        return 2
    until = time.monotonic() + args.seconds
    args.out.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.get_device_name()
    shrink, expand = (Table(args.out / gpu_file(gpu, op, True)) for op in ("shrink", "expand"))
    try:
        tune(shrink, expand, args.slots, args.rank, args.hidden, args.kv, args.intermediate, until)
    except OutOfTime:
        print(
            f"out of time: the same command goes on from here; so far {shrink.path} "
            f"and {expand.path}"
        )
        return 0
    print(f"complete: {shrink.path} and {expand.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
