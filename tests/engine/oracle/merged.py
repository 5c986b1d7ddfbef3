"""Shell. Compares vLLM with an adapter with vLLM whose weights have the same adapter merged in. It
serves bases whose answers differ between vLLM and transformers even without an adapter. MLA
attention in tiny random models is such a case. The layers that it proves are MLA_PROVEN in
worker/engine/vllm/lora/layers.py.

    python -m tests.engine.oracle.merged [BASE ...]
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft

from tests.engine.oracle.bases import (
    EXPERTS,
    MLA_BASES,
    WORDS,
    Base,
    make_adapter,
    make_base,
    split_experts,
)
from worker.validation.oracle import load_base, prompts

SAME = 1e-4
TOKENS = 8
Step = Mapping[int, float]  # token -> logprob, the choice first


def judge(base: Base, folder: Path) -> dict[str, str]:
    """module -> `right`, `base` (no effect), or how far off it is."""
    from worker.engine.vllm import patches

    patches.apply()
    at = make_base(base, folder / "base")
    for seed, module in enumerate(base.modules):
        make_adapter(base, at, folder / module, [module], seed)
    loaded = {m: folder / m for m in base.modules}
    if EXPERTS in base.modules:  # the other form needs an engine of another kind
        loaded[EXPERTS] = folder / "each-expert"
        split_experts(folder / EXPERTS, loaded[EXPERTS], base.expert_names)
    engine = _engine(at, adapters=True)
    plain = _ask(engine)
    served = {m: _ask(engine, loaded[m], n) for n, m in enumerate(base.modules, 1)}
    del engine
    found = {}
    for module, answers in served.items():
        gc.collect()
        merged = peft.PeftModel.from_pretrained(load_base(str(at)), folder / module)
        to = folder / f"{module}-merged"
        merged.merge_and_unload().save_pretrained(to)
        for file in at.glob("tokenizer*"):
            shutil.copy(file, to)
        off = _off(answers, _ask(_engine(to, adapters=False)))
        no_effect = _off(answers, plain) < SAME
        found[module] = "base" if no_effect else "right" if off < SAME else f"wrong: off by {off}"
    return found


def _engine(path: Path, *, adapters: bool) -> Any:
    from vllm import LLM

    lora = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 16} if adapters else {}
    return LLM(
        str(path),
        enforce_eager=True,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=4,
        kv_cache_memory_bytes=32 << 20,
        **lora,
    )


def _ask(engine: Any, adapter: Path | None = None, number: int = 0) -> list[list[Step]]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=20)
    answers = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts(WORDS)],
        params,
        lora_request=LoRARequest(adapter.name, number, str(adapter)) if adapter else None,
        use_tqdm=False,
    )
    return [
        [{token: shown.logprob for token, shown in step.items()} for step in a.outputs[0].logprobs]
        for a in answers
    ]


def _off(some: list[list[Step]], others: list[list[Step]]) -> float:
    """The largest difference of logprobs, up to the first step with another choice."""
    off = 0.0
    for one, other in zip(some, others, strict=True):
        for step, same in zip(one, other, strict=True):
            off = max([off, *(abs(step[t] - same[t]) for t in step.keys() & same.keys())])
            if next(iter(step)) != next(iter(same)):
                break
    return off


def main(names: Sequence[str]) -> int:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    warnings.filterwarnings("ignore")
    bad = False
    for name in names or MLA_BASES:
        base = MLA_BASES[name]
        with tempfile.TemporaryDirectory(prefix="loraplex-oracle-") as folder:
            found = judge(base, Path(folder))
        print(name, found, flush=True)
        wrong = {m for m, verdict in found.items() if verdict != "right"}
        bad |= wrong != {"kv_b_proj"}.intersection(base.modules)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
