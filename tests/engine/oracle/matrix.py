"""Shell. Every module of every base, served by real vLLM and judged by PEFT. `make oracle` prints
the table of docs/ADAPTERS.md.

    python -m tests.engine.oracle.matrix [BASE ...] [--only dense,moe,vl]
    python -m tests.engine.oracle.matrix --dtype bfloat16    # on a GPU

Without a choice it takes the dense bases and those with experts. Bases with pictures need
torchvision beside vLLM. On a CPU vLLM and PEFT are compared in float32. vLLM's kernels for adapters
on a GPU refuse that. There the served model is in bfloat16, and more than its rounding explains is
wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import sys
import tempfile
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch

from shared.runtime.children import Zygote
from tests.engine.oracle.bases import (
    BASES,
    EXPERTS,
    MOE_BASES,
    PER_EXPERT,
    ROUTER,
    VL_BASES,
    WORDS,
    Base,
    load,
    make_adapter,
    make_base,
    rename,
    split_experts,
)
from tests.harness import Cluster, cluster
from worker.validation.oracle import GreedyAnswer, distance, prompts, request, row

BOOT_TRIES = 4  # of 90 s each, on a busy host
MAX_RANK = 16
ALL = "all together"
ROUNDING = 3
"""How many times as far as PEFT's own bfloat16 a model served in bfloat16 may be from float32. The
largest of 48 differences is a noisy figure. Where experts are chosen, rounding may choose others.
"""
SHARED_GPU = {"gpu_memory_utilization": 0.04}
OLD_NAMES = "with the names of before transformers 4.52"
EVERY = {**BASES, **MOE_BASES, **VL_BASES}


@dataclass(frozen=True, slots=True)
class Oracle:
    """A served base, and what PEFT says of adapters on it."""

    cluster: Cluster
    base: Base
    plain: Any

    async def verdict(self, kind: str, reference: Path, prompts_asked: int | None = None) -> str:
        """`right`, `refused: CODE`, `base` (the adapter has no effect) or `wrong: ...`. `reference`
        is a folder that PEFT can read.
        """
        rows = []
        for prompt in prompts(WORDS)[:prompts_asked]:
            status, body = await self._ask(f"tiny:{_served_as(kind)}", prompt)
            if status != 200:
                return f"refused: {body['error']['code']}"
            rows.append(row(prompt, body))
        close, plain = self.base.close, copy.deepcopy(self.plain)
        bare = distance(plain, rows, close)
        adapted = peft.PeftModel.from_pretrained(plain, reference).eval().float()
        if self.base.engine.get("dtype") == "bfloat16":
            close = max(close, ROUNDING * rounding(adapted, rows))
        found = distance(adapted, rows, close)
        if bare.within(close) and bare.off <= 2 * found.off:
            return "base"
        if found.within(close):
            return "right"
        return f"wrong: {found.other} of {found.tokens} tokens, logprobs off by {found.off:.2g}"

    async def _ask(self, model: str, prompt: list[int]) -> tuple[int, Any]:
        url, body = f"{self.cluster.url}/v1/completions", request(model, prompt)
        async with self.cluster.http.post(url, json=body) as answer:
            return answer.status, await answer.json()


def rounding(adapted: Any, rows: list[GreedyAnswer]) -> float:
    """How far the logprobs of a model in bfloat16 are from its own in float32."""
    coarse = copy.deepcopy(adapted).bfloat16()
    off = 0.0
    with torch.no_grad():
        for r in rows:
            ids = torch.tensor([[*r.prompt, *r.tokens]])
            of = [
                m(input_ids=ids, use_cache=False).logits[0, len(r.prompt) - 1 : -1].float()
                for m in (adapted, coarse)
            ]
            fine, rough = (logits.log_softmax(-1) for logits in of)
            at = (torch.arange(len(r.tokens)), torch.tensor(r.tokens))
            off = max(off, float((fine[at] - rough[at]).abs().max()))
    return off


@asynccontextmanager
async def oracle(
    base: Base, at: Path, store: Path, folder: Path, zygote: Zygote | None = None
) -> AsyncIterator[Oracle]:
    """Serves the base with the adapters of `store`."""
    async with cluster(_config(base, at, store), folder, zygote) as c:
        await _boot(c)
        yield Oracle(c, base, load(base, at))


async def judge(
    name: str, folder: Path, zygote: Zygote | None = None, dtype: str = "float32"
) -> dict[str, str]:
    """module -> the verdict."""
    base = EVERY[name]
    if dtype != "float32":
        base = replace(base, engine=base.engine | {"dtype": dtype, **SHARED_GPU})
    at, store = make_base(base, folder / "base"), folder / "store"
    references = make_adapters(base, at, store)
    async with oracle(base, at, store, folder, zygote) as found:
        return {kind: await found.verdict(kind, peft_s) for kind, peft_s in references.items()}


async def _boot(c: Cluster) -> None:
    """Raises AssertionError with the reason that the worker's log gives."""
    worker = await c.start_worker("w0", serving=False)
    for _ in range(BOOT_TRIES):
        with suppress(TimeoutError):
            return await c.until_serving("w0")
    said = [line for line in worker.output().splitlines() if "rror" in line]
    raise AssertionError(said[-1] if said else "it did not start in time")


def make_adapters(base: Base, at: Path, store: Path) -> dict[str, Path]:
    """kind -> the folder that PEFT can read. The served one has the kind's own name."""
    plain = [m for m in base.modules if m not in (ROUTER, EXPERTS, PER_EXPERT)]
    kinds = {m: [m] for m in base.modules if m != PER_EXPERT}
    kinds[ALL] = [m for m in plain if m not in base.refused]
    found = {kind: store / _served_as(kind) for kind in kinds}
    for seed, (kind, modules) in enumerate(kinds.items()):
        make_adapter(base, at, found[kind], modules, seed)
    if PER_EXPERT in base.modules:
        found[PER_EXPERT] = found[EXPERTS]
        split_experts(found[EXPERTS], store / _served_as(PER_EXPERT), base.expert_names)
    for old in base.old_names:
        kind = f"{old}* {OLD_NAMES}"
        found[kind] = found[ALL]
        rename(found[ALL], store / _served_as(kind), "model.language_model.", old)
    return found


def _served_as(kind: str) -> str:
    return kind.replace(" ", "-").replace("*", "").strip("-")


def _config(base: Base, at: Path, store: Path) -> dict[str, Any]:
    engine = {
        "enable_lora": True,
        "max_loras": 4,
        "max_lora_rank": MAX_RANK,
        "enforce_eager": True,
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 64 << 20,
        **base.engine,
    }
    return {
        "llm_configs": [
            {
                "model_loading_config": {"model_id": "tiny", "model_source": str(at)},
                "engine_kwargs": engine,
                "lora_config": {"dynamic_lora_loading_path": str(store)},
            }
        ],
        "gateway": {"port": 0, "lease_s": 5.0},
    }


def table(found: dict[str, dict[str, str]]) -> str:
    lines = ["| architecture | served right | refused (why) | wrong |", "|---|---|---|---|"]
    for name, verdicts in found.items():
        refused = EVERY[name].refused
        right = ", ".join(m for m, v in verdicts.items() if v == "right")
        out = "; ".join(
            f"{m} ({refused.get(m, v)})" for m, v in verdicts.items() if v.startswith("refused")
        )
        bad = "; ".join(
            f"{m} ({v})" for m, v in verdicts.items() if v[:4] in ("wron", "base", "not ")
        )
        lines.append(f"| {name} | {right} | {out or '-'} | {bad or '-'} |")
    return "\n".join(lines)


async def main(names: list[str], dtype: str) -> int:
    warnings.filterwarnings("ignore")
    found: dict[str, dict[str, str]] = {}
    for name in names:
        with tempfile.TemporaryDirectory(prefix="loraplex-oracle-") as folder:
            try:
                found[name] = await judge(name, Path(folder), dtype=dtype)
            except (AssertionError, TimeoutError, ValueError, OSError) as exc:
                found[name] = {ALL: f"not served: {repr(exc)[-200:]}"}
        print(name, found[name], file=sys.stderr, flush=True)
    print(table(found))
    bad = [v for verdicts in found.values() for v in verdicts.values() if v[:4] in ("wron", "base")]
    return bool(bad)


def _chosen(argv: list[str]) -> tuple[list[str], str]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bases", nargs="*", metavar="BASE")
    parser.add_argument("--only", default="dense,moe", help="kinds of bases: dense, moe, vl")
    parser.add_argument("--dtype", default="float32", help="of the served model")
    args = parser.parse_args(argv)
    kinds = args.only.split(",")
    chosen = args.bases or [name for name, base in EVERY.items() if base.kind in kinds]
    return chosen, args.dtype


if __name__ == "__main__":
    sys.exit(asyncio.run(main(*_chosen(sys.argv[1:]))))
