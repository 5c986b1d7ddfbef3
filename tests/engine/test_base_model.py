"""What is computed from a config is what vLLM's own class has layers for, and what is not computed
is asked of that class.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from shared.adapters.base_layers import shapes_from_config

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
HEAD = {"head_dim": 32}
COMPUTED = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Phi3"]
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (f"{name}ForCausalLM", HEAD) for name in COMPUTED if name != "Phi3"},
    **{f"{name} plain": (f"{name}ForCausalLM", {}) for name in ("Llama", "Mistral", "Qwen2")},
    "Phi3": ("Phi3ForCausalLM", {}),
    "tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "Gemma3": ("Gemma3ForCausalLM", HEAD),
    "Olmo2": ("Olmo2ForCausalLM", {}),
    "Mixtral": ("MixtralForCausalLM", {"num_local_experts": 4}),
}
# One process for all: importing vLLM takes the time.
ASK = """
import json, sys
from shared.config.llm import LLMConfig
from worker.engine.vllm.lora.offline import offline_layers
for folder in sys.argv[1:]:
    model = LLMConfig(
        model_loading_config={"model_id": "m", "model_source": folder},
        lora_config={"dynamic_lora_loading_path": "/nowhere"},
        engine_kwargs={"enable_lora": True, "max_loras": 1},
    )
    table = offline_layers(model)
    print(json.dumps([folder, table.modules, sorted(table.embeddings), table.experts]))
    newer = "model.layers.0.mlp.experts.base_layer"
    print(json.dumps(["", table.shapes().rename(newer)]), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    """name -> (config, what vLLM's class says)."""
    configs, folders = {}, []
    for name, (architecture, sizes) in BASES.items():
        folder = tmp_path_factory.mktemp("bases") / name
        config = getattr(transformers, architecture).config_class(**(SIZES | sizes))
        config.architectures = [architecture]
        config.save_pretrained(folder)
        configs[name] = json.loads((folder / "config.json").read_bytes())
        folders.append(str(folder))
    done = subprocess.run(
        [sys.executable, "-c", ASK, *folders], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["/')]
    return {Path(folder).name: (configs[Path(folder).name], rest) for folder, *rest in said}


def as_shapes(modules: dict[str, list[int]]) -> dict[str, tuple[int, int]]:
    return {name: (outputs, inputs) for name, (outputs, inputs) in modules.items()}


@pytest.mark.parametrize("name", [n for n in BASES if n not in ("Olmo2", "Mixtral")])
def test_what_is_computed_is_what_the_engine_has_layers_for(
    asked: dict[str, tuple[Any, Any]], name: str
) -> None:
    config, (modules, embeddings, experts) = asked[name]
    computed = shapes_from_config(config)
    assert computed is not None
    assert computed.modules == as_shapes(modules)
    assert sorted(computed.embeddings) == embeddings and not experts


def test_a_class_that_is_not_computed_is_asked(asked: dict[str, tuple[Any, Any]]) -> None:
    config, (modules, _, _) = asked["Olmo2"]
    assert shapes_from_config(config) is None
    assert as_shapes(modules)["model.layers.2.self_attn.k_proj"] == (32, 64)


def test_experts_are_adapted_one_by_one_and_all_in_one_tensor(
    asked: dict[str, tuple[Any, Any]],
) -> None:
    _, (modules, _, experts) = asked["Mixtral"]
    at = "model.layers.1.block_sparse_moe.experts"
    shapes = as_shapes(modules)
    assert shapes[f"{at}.3.w1"] == (96, 64) and shapes[f"{at}.3.w2"] == (64, 96)
    assert f"{at}.4.w1" not in shapes
    assert shapes[at] == (64, 96) and shapes[f"{at}.base_layer"] == (192, 64)
    assert experts[at] == experts[f"{at}.base_layer"] == 4
