"""Shell. `python -m bench.engine.lora_kernel`: the kernels for adapters of linear layers
(worker/engine/vllm/lora/) on this GPU: whether they are right, and what they cost.

It needs torch and Triton alone. Where vLLM is installed, its own two kernels are measured, too.

Right means: in bfloat16 the result is no further from the product in float64 than rounding
explains. The cost is what a layer of the base model takes longer with adapters than without, in a
CUDA graph of several layers, as the engine runs it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch

from worker.engine.vllm.lora import tile_kernel, token_kernel
from worker.engine.vllm.lora.presence import RANK_AT
from worker.engine.vllm.lora.step_metadata import TokenGroups, most_tiles, rows_of_a_tile

LAYERS = 8
"""Copies of the weights that one measurement goes through. They exceed the GPU's cache, as a
model's layers do.
"""
PASSES = 5


@dataclass(frozen=True, slots=True)
class StepShape:
    """Tokens of one step: how many, of how many adapters, in an engine with so many slots."""

    tokens: int
    adapters: int
    slots: int


BATCHES = (
    StepShape(1, 1, 16),
    StepShape(4, 4, 16),
    StepShape(16, 16, 16),
    StepShape(64, 16, 16),
    StepShape(256, 16, 16),
    StepShape(256, 64, 64),
    StepShape(1024, 16, 16),
    StepShape(8192, 16, 16),
)
CALLS = 200
MOST_PROGRAMS = 2112
"""That `--launch` may ask for."""
REPEATS = 300
MOST_RANK = 512
ODD = ("4096:16", "2048:8", "2560:64", "1000:24", "8192:128", "2048:256", "1024:512")
MIXED = ((3, 2), (77, 5), (1, 1), (16, 16), (512, 16), (2, 3), (200, 64), (11, 8), (1500, 3))
"""Tokens and slots of steps with layers of any size, rank and mix of adapters."""


def shapes(hidden: int) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Layer -> (columns of x, columns of each slice of y), in the proportions of Llama-3.1-8B."""
    kv, wide = hidden // 4, hidden * 7 // 2
    return {
        "qkv": (hidden, (hidden, kv, kv)),
        "o": (hidden, (hidden,)),
        "gate_up": (hidden, (wide, wide)),
        "down": (wide, (hidden,)),
    }


KernelScratch: TypeAlias = tuple[token_kernel.TokenScratch, tile_kernel.TileScratch]


class LayerCase:
    """One layer's random weights, LAYERS times, and one step's tokens."""

    def __init__(
        self,
        batch: StepShape,
        rank: int,
        hidden: int,
        outs: Sequence[int],
        base_rows: bool = False,
        scratch: KernelScratch | None = None,
        max_rank: int = 0,
    ) -> None:
        """`max_rank`: what the slots are made for, if that is more than the adapters' rank."""
        g = torch.Generator("cuda").manual_seed(0)
        self.batch, self.outs = batch, outs
        if base_rows:
            mapping = torch.randint(-1, batch.adapters, (batch.tokens,), device="cuda", generator=g)
        else:
            mapping = torch.arange(batch.tokens, device="cuda") % batch.adapters
        self.mapping = mapping.int()
        self.groups = TokenGroups.of(self.mapping.cpu().numpy())
        self.rank, max_rank = rank, max(rank, max_rank)
        self.present = torch.full((batch.slots,), (1 << len(outs)) - 1, device="cuda").int()
        self.present |= rank << RANK_AT
        self._tiles: dict[int, list[torch.Tensor]] = {}

        def weights(*shape: int) -> torch.Tensor:
            return (torch.randn(*shape, device="cuda", generator=g) * 0.02).bfloat16()

        self.x = torch.randn(batch.tokens, hidden, device="cuda", generator=g).bfloat16()
        self.y = torch.zeros(batch.tokens, sum(outs), device="cuda", dtype=torch.bfloat16)
        self.base = [weights(hidden, sum(outs)) for _ in range(LAYERS)]
        many, slots = range(LAYERS), batch.slots
        self.a = [tuple(weights(slots, 1, max_rank, hidden) for _ in outs) for _ in many]
        self.b = [tuple(weights(slots, 1, n, max_rank) for n in outs) for _ in many]
        for a, b in zip(sum(self.a, ()), sum(self.b, ()), strict=True):
            a[:, :, rank:] = b[:, :, :, rank:] = 0
        self.scratch = scratch or (
            token_kernel.TokenScratch.make(len(outs), max_rank, "cuda"),
            tile_kernel.TileScratch(
                torch.empty(MOST_PROGRAMS * 128 * max(16, max_rank * 2), device="cuda"),
                torch.zeros(6, 4 * batch.tokens * len(outs), device="cuda", dtype=torch.int32),
            ),
        )

    def tiles(self, rows: int) -> list[torch.Tensor]:
        """Slot and tokens of each tile, as a step's block has them."""
        if rows not in self._tiles:
            most = most_tiles(self.batch.tokens, self.batch.slots, rows)
            slot_of, rows_of = (torch.full(n, -1).int() for n in ((most,), (most, rows)))
            for whole, part in zip((slot_of, rows_of), self.groups.tiles(rows), strict=True):
                whole[: len(part)] = torch.from_numpy(part)
            self._tiles[rows] = [slot_of.cuda(), rows_of.cuda()]
        return self._tiles[rows]

    def ours(self, layer: int, **launch: Any) -> None:
        """`tiles`: the kernel for many tokens, whatever their number. The rest is of its launch."""
        few = self.batch.tokens <= token_kernel.FEW_TOKENS and not launch.pop("tiles", False)
        weights = self.a[layer], self.b[layer]
        if few:
            token_kernel.add_lora(
                self.y, self.x, *weights, self.mapping, self.present, self.scratch[0]
            )
            return
        tiles = self.tiles(launch.pop("rows", rows_of_a_tile(self.batch.tokens)))
        tile_kernel.add_lora(
            self.y, self.x, *weights, tiles, self.present, self.scratch[1], **launch
        )

    def linear(self, layer: int) -> None:
        torch.mm(self.x, self.base[layer], out=self.y)

    def right(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(y after the layer, in float64; the most that rounding may change each value)."""
        torch.mm(self.x, self.base[layer], out=self.y)
        want, slack = self.y.double(), self.y.double().abs() * 2**-8
        slots = self.mapping.long().clamp(min=0)
        at = 0
        for i, n in enumerate(self.outs):
            on = ((self.present[slots] >> i) & 1).bool() & (self.mapping >= 0)
            for slot in range(self.batch.slots):
                rows = on & (self.mapping == slot)
                if not rows.any():
                    continue
                a = self.a[layer][i][slot, 0, : self.rank].double()
                b = self.b[layer][i][slot, 0, :, : self.rank].double()
                shrunk = self.x[rows].double() @ a.T
                want[rows, at : at + n] += shrunk @ b.T
                slack[rows, at : at + n] += 2**-8 * (shrunk.abs() @ b.abs().T)
            at += n
        return want, slack + want.abs() * 2**-8 + 1e-3


def wrong(case: LayerCase, **launch: Any) -> float:
    """The largest error, as a part of what rounding explains. At most 1 is right."""
    want, slack = case.right(0)
    case.ours(0, **launch)
    error = (case.y.double() - want).abs() / slack
    return float("inf") if not error.isfinite().all() else error.max().item()


def unsteady(case: LayerCase, **launch: Any) -> int:
    """How many of REPEATS replays of all layers gave other bits than the first. The programs of a
    launch add each other's products in a fixed order, so none may.
    """

    def layers() -> None:
        case.y.zero_()
        for layer in range(LAYERS):
            case.ours(layer, **launch)

    layers()
    first = case.y.clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers()
    others = torch.zeros((), device="cuda", dtype=torch.int64)
    for _ in range(REPEATS):
        graph.replay()
        others += (case.y != first).any()
    return int(others)


def microseconds(*ops: Callable[[int], Any]) -> float:
    """Time per layer in a CUDA graph. The least of PASSES measurements."""

    def layers() -> None:
        for layer, op in itertools.product(range(LAYERS), ops):
            op(layer)

    layers()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(4):
            layers()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    times: list[float] = []
    for _ in range(PASSES):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / LAYERS / 4)
    return min(times)


def host_microseconds(op: Callable[[int], Any]) -> float:
    """Time of the host per call, where the GPU is faster than the host."""
    op(0)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(CALLS):
        op(0)
    took = time.perf_counter() - began
    torch.cuda.synchronize()
    return took / CALLS * 1e6


def theirs(case: LayerCase) -> Callable[[int], None] | None:
    """vLLM's shrink and expand on the same weights, None where vLLM is not installed."""
    try:
        from vllm.lora.ops.triton_ops import lora_expand_op, lora_shrink_op, utils
        from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
    except ImportError:
        return None
    utils._LORA_A_PTR_DICT.clear()  # keyed by addresses, which the next weights may reuse
    utils._LORA_B_PTR_DICT.clear()
    meta = LoRAKernelMeta.make(case.batch.slots, case.batch.tokens, "cuda")
    meta.prepare_tensors(case.mapping)
    arguments = meta.meta_args(case.batch.tokens, False)
    middle = torch.empty(len(case.outs), case.batch.tokens, case.a[0][0].shape[-2], device="cuda")

    def both(layer: int) -> None:
        lora_shrink_op._lora_shrink(case.x, list(case.a[layer]), middle, *arguments, 1.0)
        lora_expand_op._lora_expand(
            middle, list(case.b[layer]), case.y, *arguments, offset_start=0, add_inputs=True
        )

    return both


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.engine.lora_kernel",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[16])
    parser.add_argument("--max-rank", type=int, default=0, help="of the slots; else the rank")
    parser.add_argument("--hidden", type=int, nargs="+", default=[4096])
    parser.add_argument(
        "--launch", default="[{}]", help="JSON: a list of arguments of the launch to compare"
    )
    parser.add_argument("--layers", default="qkv,o,gate_up,down")
    parser.add_argument("--tokens", type=int, nargs="+", help="only steps of so many tokens")
    parser.add_argument(
        "--odd",
        nargs="*",
        default=ODD,
        metavar="HIDDEN:RANK",
        help="layers of odd shapes, with any mix of adapters, that are only checked (default: "
        f"{' '.join(ODD)}; nothing: none)",
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.engine.lora_kernel: no CUDA device here", file=sys.stderr)
        return 2
    launches = json.loads(args.launch)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print("layer rank tokens/adapters/slots: base us; added us (error) ...")
    failed = False
    batches = [b for b in BATCHES if args.tokens is None or b.tokens in args.tokens]
    for hidden, rank, batch in itertools.product(args.hidden, args.ranks, batches):
        for name, (k, outs) in shapes(hidden).items():
            if name not in args.layers.split(","):
                continue
            case = LayerCase(batch, rank, k, outs, max_rank=args.max_rank)
            base = microseconds(case.linear)
            said = f"{name:8}{hidden:6}{rank:5} {batch.tokens}/{batch.adapters}/{batch.slots}:"
            said += f" {base:6.1f};"
            for launch in launches:
                error = wrong(case, **launch)
                others = unsteady(case, **launch)
                failed = failed or not error <= 1 or others > 0
                took = microseconds(case.linear, partial(case.ours, **launch))
                said += f" {took - base:5.1f} ({error:.2f}{f', {others} UNSTEADY' * (others > 0)})"
            if batch.tokens == 1:
                said += f"; host {host_microseconds(case.ours):.0f}"
            case.present.zero_()
            took = microseconds(case.linear, partial(case.ours, **launches[0]))
            said += f"; absent {took - base:.1f}"
            if (peer := theirs(case)) is not None:
                said += f"; vLLM {microseconds(case.linear, peer) - base:.1f}"
                if batch.tokens == 1:
                    said += f", host {host_microseconds(peer):.0f}"
            print(said, flush=True)
    for shape in args.odd:
        hidden, rank = map(int, shape.split(":"))
        scratch = (  # of all steps, as in an engine
            token_kernel.TokenScratch.make(3, MOST_RANK, "cuda"),
            tile_kernel.TileScratch.make(1500, 64, 3, MOST_RANK, "cuda"),
        )
        for tokens, slots in MIXED:
            outs = (hidden, 72, 200)[: 1 + tokens % 3]
            step = StepShape(tokens, slots, slots)
            most = min(MOST_RANK, rank * (1 + tokens % 2))
            case = LayerCase(step, rank, hidden, outs, True, scratch, most)
            case.present &= torch.randint(0, 8, (slots,), device="cuda").int() | ~7
            error, others = wrong(case, **launches[0]), unsteady(case, **launches[0])
            failed = failed or not error <= 1 or others > 0
            print(
                f"odd {hidden} rank {rank} {tokens} tokens, {slots} slots: error {error:.2f}, "
                f"{others} of {REPEATS} with other bits",
                flush=True,
            )
    print("FAILED" if failed else "all right")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
