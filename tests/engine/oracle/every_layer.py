"""Shell. Every layer of every base alone, with an adapter: served as PEFT says, or refused.

    python -m tests.engine.oracle.every_layer [BASE ...]

The layers are read from transformers' own model, so none is left out because nobody thought of it.
All layers of one name (without their numbers) get one adapter. The engine is real vLLM in this
process, with what Loraplex adds to its worker, and the checks are the worker's own. Three prompts
with the adapter share each batch with the same three prompts of the base. Bases with pictures get a
picture in each prompt.
"""

from __future__ import annotations

import copy
import importlib.util
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch

from shared.errors import InvalidAdapter
from tests.engine.oracle.bases import (
    BASES,
    HYBRID_BASES,
    MOE_BASES,
    PICTURE_BASES,
    RANK,
    TIED_BASES,
    WORDS,
    Base,
    fill,
    layers_as_named,
    load,
    make_base,
)
from tests.engine.oracle.pictures import Picture, picture_for, with_pictures
from worker.engine.vllm import patches
from worker.engine.vllm.lora.layers import join
from worker.validation.oracle import GreedyAnswer, distance, prompts
from worker.validation.validator import Validator

TOKENS, MAX_RANK = 8, 16
EVERY = {**BASES, **TIED_BASES, **MOE_BASES, **PICTURE_BASES, **HYBRID_BASES}
for _name in ("GPT-NeoX", "Olmo2"):
    del EVERY[_name]  # in one process with it, vLLM changes transformers' class; see matrix.py
EXTENSION = "worker.engine.vllm.worker_extension.AdapterSlots"
BFLOAT16 = 0.1  # a base that may be further off than this runs in bfloat16
STRENGTHS = (0.2, 1.0, 3.0)
"""How large the values of B are. The first that changes PEFT's answers well is taken."""


def kinds(model: Any) -> dict[str, dict[str, Any]]:
    """kind -> PEFT's options that adapt all of its layers."""
    layers: dict[str, list[str]] = defaultdict(list)
    tensors: dict[str, list[str]] = defaultdict(list)
    modules = dict(model.named_modules())
    for name, weight in model.named_parameters(remove_duplicate=False):
        parent = name.rpartition(".")[0]
        plain = isinstance(modules[parent], torch.nn.Linear | torch.nn.Embedding)
        if weight.dim() in (2, 3):
            where = layers if plain else tensors
            where[re.sub(r"\.\d+(?=\.|$)", "", parent if plain else name)].append(
                parent if plain else name
            )
    for kind in list(tensors):
        parent, _, last = kind.rpartition(".")
        first = tensors.get(f"{parent}.gate_up_proj") or tensors.get(f"{parent}.up_proj")
        if last == "down_proj" and first:
            tensors[f"{parent} (both weights)"] = first + tensors[kind]
    chosen = {k: {"target_modules": "|".join(map(re.escape, v))} for k, v in layers.items()}
    return chosen | {k: {"target_modules": [], "target_parameters": v} for k, v in tensors.items()}


class Engine:
    """vLLM in this process, its checks, and its slots."""

    def __init__(self, base: Base, at: Path) -> None:
        from vllm import LLM

        self._loaded: list[int] = []
        self._llm = LLM(
            str(at),
            enable_lora=True,
            max_loras=2,
            max_cpu_loras=4,
            max_lora_rank=MAX_RANK,
            enforce_eager=True,
            max_model_len=256,
            max_num_seqs=8,
            kv_cache_memory_bytes=64 << 20,
            enable_mixed_moe_lora_format=True,
            worker_extension_cls=EXTENSION,
            **{"dtype": "float32", **base.engine},
        )
        layers = join(self._llm.collective_rpc("loraplex_layers")).shapes()
        self.validator = Validator(layers, MAX_RANK, base=at)

    def load(self, folder: Path, number: int) -> None:
        """Puts the adapter into the place of the last one. Raises InvalidAdapter if the engine
        refuses it.
        """
        entry = (folder.name, number, str(folder))
        self._llm.collective_rpc("loraplex_prepare", args=([entry], []))
        while (said := self._llm.collective_rpc("loraplex_prepare", args=([], [number]))[0]) == [
            None
        ]:
            time.sleep(0.01)
        if said[0]:
            raise InvalidAdapter(said[0])
        gone, self._loaded = self._loaded, []
        words, _ = self._llm.collective_rpc("loraplex_swap", args=([entry], [], gone))[0]
        if words[0]:
            raise InvalidAdapter(words[0])
        self._loaded = [number]

    def ask(
        self,
        questions: Sequence[tuple[list[int], Picture | None]],
        folder: Path | None,
        number: int,
    ) -> tuple[list[GreedyAnswer], list[GreedyAnswer]]:
        """The answers with the adapter, and the base's in the same batches."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=0)
        asked = [
            {"prompt_token_ids": ids}
            | ({"multi_modal_data": {"image": picture.image}} if picture else {})
            for ids, picture in questions
        ]
        lora = LoRARequest(folder.name, number, str(folder)) if folder else None
        both = [x for x in asked for _ in range(2)]
        loras = [x for _ in asked for x in (lora, None)]
        outputs = self._llm.generate(both, params, lora_request=loras, use_tqdm=False)
        rows = [
            GreedyAnswer(
                o.prompt_token_ids,
                o.outputs[0].token_ids,
                [next(iter(shown.values())).logprob for shown in o.outputs[0].logprobs],
            )
            for o in outputs
        ]
        return rows[::2], rows[1::2]


def judge(base: Base, folder: Path) -> dict[str, str]:
    """kind -> `right`, `refused: ...`, `base` (no effect), or `wrong: ...`."""
    at = make_base(base, folder / "base")
    plain = load(base, at)
    engine = Engine(base, at)
    pictures = [picture_for(base, at, n) for n in range(3)] if base.picture_prompt else [None] * 3
    asked = [
        ([*base.picture_prompt, *ids], picture)
        for ids, picture in zip(prompts(WORDS), pictures, strict=True)
    ]
    _, rows = engine.ask(asked, None, 0)
    off = _off(plain, rows, pictures)
    found = {}
    if off > base.close:
        return {"the base itself": f"wrong: off by {off:.2g}"}
    close = base.close
    for number, (kind, option) in enumerate(kinds(plain).items(), start=1):
        at_kind = folder / f"k{number}"
        try:
            effect = _make(base, at, at_kind, option, rows, pictures)
        except (ValueError, RuntimeError) as exc:  # PEFT has no such adapter
            found[kind] = f"not made: {str(exc)[:100]}"
            continue
        try:
            found[kind] = _verdict(engine, plain, at_kind, number, asked, pictures, close, effect)
        except InvalidAdapter as exc:
            found[kind] = f"refused: {exc.code}: {exc.message}"
    return found


def _make(
    base: Base,
    at: Path,
    into: Path,
    option: dict[str, Any],
    rows: Sequence[GreedyAnswer],
    pictures: Sequence[Picture | None],
) -> float:
    """Makes an adapter strong enough to be seen. Returns how far PEFT's answers move."""
    layers_as_named()
    config = peft.LoraConfig(r=RANK, lora_alpha=16, task_type="CAUSAL_LM", **option)
    model = peft.get_peft_model(load(base, at), config)
    moved = 0.0
    for strength in STRENGTHS:
        fill(model, 7, strength)
        moved = _off(model.eval(), rows, pictures)
        if moved > 10 * base.close:
            break
    model.save_pretrained(into, save_embedding_layers=False)
    return moved


def _verdict(
    engine: Engine,
    plain: Any,
    folder: Path,
    number: int,
    asked: Sequence[tuple[list[int], Picture | None]],
    pictures: Sequence[Picture | None],
    close: float,
    effect: float,
) -> str:
    engine.validator.check(folder)
    engine.load(folder, number)
    rows, beside = engine.ask(asked, folder, number)
    spoiled = _off(plain, beside, pictures)
    as_base = _off(plain, rows, pictures)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder).eval().float()
    off = _off(adapted, rows, pictures)
    figures = f"off {off:.2g}, from the base {as_base:.2g}, PEFT's effect {effect:.2g}"
    if spoiled > close:
        return f"wrong: the base beside it is off by {spoiled:.2g}"
    if as_base < close < effect:
        return f"base ({figures})"
    # bfloat16's error grows with the change
    if off < (close if close < BFLOAT16 else max(close, as_base / 5)):
        return "right" if as_base > 2 * close else f"right, but weak ({figures})"
    return f"wrong: {figures}"


def _off(model: Any, rows: Sequence[GreedyAnswer], pictures: Sequence[Picture | None]) -> float:
    """The largest difference of logprobs; infinite if a token is not the model's choice."""
    off = 0.0
    for one, picture in zip(rows, pictures, strict=True):
        found = distance(with_pictures(model, picture), [one], 0.02)
        off = max(off, found.off)
    return off


def _child(name: str) -> dict[str, str]:
    with tempfile.TemporaryDirectory(prefix="loraplex-oracle-") as folder:
        try:
            return judge(EVERY[name], Path(folder))
        except BaseException as exc:
            traceback.print_exc(limit=-6)
            return {"(all)": f"wrong: {exc!r}"[:400]}


def table(found: dict[str, dict[str, str]]) -> str:
    """For docs/ADAPTERS.md: the layers by their last names, and why others are refused."""
    lines = ["| base | served right | refused | wrong |", "|---|---|---|---|"]
    for name, verdicts in found.items():
        columns: dict[str, list[str]] = {"right": [], "refused": [], "": []}
        for kind, verdict in verdicts.items():
            short = kind.removesuffix(".weight").split("layers.")[-1].removeprefix("model.")
            column = next(c for c in columns if verdict.startswith(c))
            if not verdict.startswith("not made"):
                code = verdict.split(":")[1].strip() if column == "refused" else verdict
                columns[column].append(short if column == "right" else f"{short} ({code})")
        cells = [", ".join(columns[c]) or "-" for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(names: Sequence[str]) -> int:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    warnings.filterwarnings("ignore")
    import vllm.lora.model_manager  # noqa: F401  once, for all children

    patches.apply()
    sees = importlib.util.find_spec("torchvision") is not None
    found = {}
    for name in names or [n for n in EVERY if sees or n not in PICTURE_BASES]:
        with multiprocessing.get_context("fork").Pool(1) as pool:
            found[name] = pool.apply(_child, (name,))
        for kind, verdict in found[name].items():
            print(f"{name}: {kind}: {verdict}", file=sys.stderr, flush=True)
    print(table(found))
    every = [v for verdicts in found.values() for v in verdicts.values()]
    return int(any(not v.startswith(("right", "refused", "not made")) for v in every))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
