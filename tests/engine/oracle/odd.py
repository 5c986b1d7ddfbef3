"""Shell. Adapters of kinds that people have, on one tiny Llama: options of PEFT, exports of
trainers, and edits by hand. Each is served as PEFT says, or refused with a code.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file

from tests.engine.oracle.bases import ATTENTION, MLP, Base, fill, load, make_adapter

RIGHT = "right"
PLAIN = "plain"
WITH_EMBEDDINGS = "saved-with-embeddings"
LINEAR = [*ATTENTION, *MLP]
Tensors = dict[str, torch.Tensor]
BEGIN = "base_model.model."

# what PEFT is asked for -> the verdict
MADE: dict[str, tuple[dict[str, Any], str]] = {
    "rslora-rank-pattern": (
        {"use_rslora": True, "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 4}},
        RIGHT,
    ),
    "rslora-both-patterns": (
        {
            "use_rslora": True,
            "rank_pattern": {r".*\.0\..*_proj": 3},
            "alpha_pattern": {"(k|v)_proj": 40, r".*\.mlp\..*": 4},
        },
        RIGHT,
    ),
    "alpha-pattern-order": (
        {"alpha_pattern": {"self_attn.q_proj": 1, "q_proj": 64, r"[kv]_proj": 8.5}},
        RIGHT,
    ),
    "one-layer": ({"layers_to_transform": 1}, RIGHT),
    "layers-of-a-pattern": ({"layers_to_transform": [0], "layers_pattern": "layers"}, RIGHT),
    "excluded-by-name": ({"exclude_modules": ["v_proj", "layers.0.mlp.up_proj"]}, RIGHT),
    "excluded-by-expression": ({"exclude_modules": r".*\.layers\.1\..*"}, RIGHT),
    "all-linear": ({"target_modules": "all-linear"}, RIGHT),
    "expression": ({"target_modules": r".*layers\.[0-9]+\.(self_attn|mlp)\.(q|up)_proj"}, RIGHT),
    "costly-expression": (
        {"target_modules": r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)|(?:\bnothing)"},
        RIGHT,
    ),
    "rank-1": ({"r": 1}, RIGHT),
    "rank-16": ({"r": 16, "lora_alpha": 7.25}, RIGHT),
    "rank-17": ({"r": 17}, "refused: invalid_adapter_rank"),
    "rank-pattern-17": ({"rank_pattern": {"q_proj": 17}}, "refused: invalid_adapter_rank"),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, RIGHT),
    "mica": ({"init_lora_weights": "mica"}, RIGHT),
    "dora": ({"use_dora": True}, "refused: invalid_adapter_unsupported"),
    "token-indices": ({"trainable_token_indices": [3, 4]}, "refused: invalid_adapter_unsupported"),
    "lora-bias": ({"lora_bias": True}, "refused: invalid_adapter_unsupported"),
    "bias-lora-only": ({"bias": "lora_only"}, "refused: invalid_adapter_unsupported"),
    "activated": (
        {"alora_invocation_tokens": [10, 11]},
        "refused: invalid_adapter_unsupported",
    ),
    "head-saved": ({"modules_to_save": ["lm_head"]}, "refused: invalid_adapter_unsupported"),
    "pissa": ({"init_lora_weights": "pissa"}, "refused: invalid_adapter_unsupported"),
    "olora": ({"init_lora_weights": "olora"}, "refused: invalid_adapter_unsupported"),
}


def _cast(dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
    return lambda t: {name: weight.to(dtype) for name, weight in t.items()}


def _renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda t: {name.replace(old, new): weight for name, weight in t.items()}


def _with(value: float) -> Callable[[Tensors], Tensors]:
    def change(t: Tensors) -> Tensors:
        name = next(n for n in t if "layers.1.mlp.up_proj.lora_B" in n)
        changed = t[name].clone()
        changed[-1, -1] = value
        return {**t, name: changed}

    return change


def _without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda t: {name: weight for name, weight in t.items() if part not in name}


# how the tensors of a plain adapter are changed -> the verdict
CHANGED: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "float16": (_cast(torch.float16), RIGHT),
    "bfloat16": (_cast(torch.bfloat16), RIGHT),
    "float64": (_cast(torch.float64), RIGHT),
    "float8": (_cast(torch.float8_e4m3fn), "refused: invalid_adapter_dtype"),
    "whole-numbers": (_cast(torch.int8), "refused: invalid_adapter_dtype"),
    "nan": (_with(float("nan")), "refused: invalid_adapter_nonfinite"),
    "infinite": (_with(float("inf")), "refused: invalid_adapter_nonfinite"),
    "huge": (_with(1e30), "refused: invalid_adapter_magnitude"),
    "a-layer-left-out": (_without("layers.0."), RIGHT),
    "no-b": (_without("layers.0.self_attn.q_proj.lora_B"), "refused: invalid_adapter_pair"),
    "empty": (lambda t: {}, "refused: invalid_adapter_empty"),
    "rank-zero": (
        lambda t: {n: (w[:0] if "lora_A" in n else w[:, :0]).clone() for n, w in t.items()},
        "refused: invalid_adapter_shape",
    ),
    "of-another-rank": (
        lambda t: {n: (w[:4] if "lora_A" in n else w[:, :4]).clone() for n, w in t.items()},
        "refused: invalid_adapter_shape",
    ),
    "one-model-too-many": (
        _renamed(f"{BEGIN}model.", f"{BEGIN}model.model."),
        "refused: invalid_adapter_module",
    ),
    "of-the-bare-model": (
        _renamed(f"{BEGIN}model.", BEGIN),
        "refused: invalid_adapter_module",
    ),
    "with-the-adapter-s-name": (
        _renamed(".weight", ".default.weight"),
        "refused: invalid_adapter_tensor",
    ),
    "without-prefix": (_renamed(BEGIN, ""), "refused: invalid_adapter_tensor"),
    "with-magnitudes": (
        lambda t: {
            **t,
            f"{BEGIN}model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(128),
        },
        "refused: invalid_adapter_tensor",
    ),
    "with-a-layer-norm": (
        lambda t: {**t, f"{BEGIN}model.norm.weight": torch.ones(128)},
        "refused: invalid_adapter_tensor",
    ),
}

UNSLOTH = {
    "auto_mapping": {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.models.llama.modeling_llama",
        "unsloth_fixed": True,
    },
    "base_model_name_or_path": "unsloth/llama-tiny-bnb-4bit",
    "corda_config": None,
    "eva_config": None,
    "qalora_group_size": 16,
    "use_qalora": False,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "layer_replication": None,
    "loftq_config": {},
    "modules_to_save": None,
    "trainable_token_indices": None,
    "peft_version": "0.17.1",
    "revision": None,
}
# how the config of a plain adapter is changed (`...` takes a field out) -> the verdict
EDITED: dict[str, tuple[dict[str, Any], str]] = {
    "unsloth": (UNSLOTH, RIGHT),
    "unknown-fields": ({"a_new_field": {"deep": [1, 2]}, "peft_version": "9.0"}, RIGHT),
    "short-config": (
        dict.fromkeys(("auto_mapping", "bias", "inference_mode", "lora_dropout", "revision"), ...),
        RIGHT,
    ),
    "eva": ({"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}, RIGHT),
    "all-linear-in-capitals": ({"target_modules": "ALL-Linear"}, RIGHT),
    "fan-in-fan-out": ({"fan_in_fan_out": True}, RIGHT),
    "nothing-to-save": ({"modules_to_save": [], "layer_replication": []}, RIGHT),
    "corda": ({"init_lora_weights": "corda"}, "refused: invalid_adapter_unsupported"),
    "loftq": (
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
        "refused: invalid_adapter_unsupported",
    ),
    "replicated": ({"layer_replication": [[0, 2], [1, 2]]}, "refused: invalid_adapter_unsupported"),
    "without-scaling": ({"lora_alpha": 0}, "refused: invalid_adapter_alpha"),
    "alpha-of-words": ({"lora_alpha": "16"}, "refused: invalid_adapter_alpha"),
    "rank-of-words": ({"r": "8"}, "refused: invalid_adapter_rank"),
    "rank-of-truth": ({"r": True}, "refused: invalid_adapter_rank"),
    "without-rank": ({"r": ...}, "refused: invalid_adapter_rank"),
    "without-targets": ({"target_modules": ...}, "refused: invalid_adapter_target"),
    "ia3": ({"peft_type": "IA3"}, "refused: invalid_adapter_type"),
    # edits by which PEFT would leave out some of the tensors
    "edited-targets": ({"target_modules": ["q_proj"]}, "refused: invalid_adapter_module"),
    "edited-expression": ({"target_modules": ".*q_proj"}, "refused: invalid_adapter_module"),
    "edited-layers": ({"layers_to_transform": [0]}, "refused: invalid_adapter_module"),
    "edited-exclusion": ({"exclude_modules": ["q_proj"]}, "refused: invalid_adapter_module"),
    "edited-exclusion-expression": (
        {"exclude_modules": r".*layers\.0\..*"},
        "refused: invalid_adapter_module",
    ),
}

# what a trainer or an upload does to a folder -> the verdict
FILES = {
    "shards": RIGHT,
    "a-shard-missing": "refused: invalid_adapter_incomplete",
    "pickle": "refused: invalid_adapter_pickle",
    "stale-pickle": RIGHT,
    "metadata": RIGHT,
    "cut": "refused: invalid_adapter_header",
}
VERDICTS = {
    **{name: verdict for name, (_, verdict) in (MADE | CHANGED | EDITED).items()},
    **FILES,
    WITH_EMBEDDINGS: RIGHT,
}


def make_odd_adapters(base: Base, at: Path, store: Path) -> None:
    """Makes every adapter of VERDICTS, each in a folder of its name."""
    untouched = load(base, at)
    for seed, (name, (options, _)) in enumerate(MADE.items()):
        given = {"r": 8, "lora_alpha": 16, "target_modules": LINEAR, **options}
        config = peft.LoraConfig(task_type="CAUSAL_LM", **given)
        model = peft.get_peft_model(copy.deepcopy(untouched), config)
        fill(model, seed)
        model.save_pretrained(store / name)
    saved_with_embeddings(untouched, store / WITH_EMBEDDINGS)
    plain = store / PLAIN
    make_adapter(base, at, plain, LINEAR, 0)
    for name, (change, _) in CHANGED.items():
        shutil.copytree(plain, store / name)
        _change(store / name, change)
    for name, (fields, _) in EDITED.items():
        shutil.copytree(plain, store / name)
        file = store / name / "adapter_config.json"
        config = json.loads(file.read_text()) | fields
        file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    for name in FILES:
        shutil.copytree(plain, store / name)
        _files(name, store / name)


def saved_with_embeddings(untouched: Any, folder: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=LINEAR)
    model = peft.get_peft_model(copy.deepcopy(untouched), config)
    fill(model, 0)
    model.save_pretrained(folder, save_embedding_layers=True)


def _change(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def _files(name: str, folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    if name in ("shards", "a-shard-missing"):
        file.unlink()
        names = sorted(tensors)
        weight_map = {}
        for n, part in enumerate((names[::2], names[1::2]), 1):
            shard = f"adapter_model-{n:05}-of-00002.safetensors"
            save_file({k: tensors[k] for k in part}, folder / shard, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, shard)
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
        if name == "a-shard-missing":
            (folder / "adapter_model-00002-of-00002.safetensors").unlink()
    elif name == "pickle":
        file.unlink()
        torch.save(tensors, folder / "adapter_model.bin")
    elif name == "stale-pickle":
        torch.save({}, folder / "adapter_model.bin")
    elif name == "metadata":
        save_file(tensors, file, metadata={"format": "pt", "trainer": "x" * 5000, "epoch": "3"})
    else:
        file.write_bytes(file.read_bytes()[:-100])
