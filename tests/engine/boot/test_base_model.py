"""The shapes that are computed from a config are those that vLLM's own class has layers for. Where
they are not computed, that class is asked.
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
ASKED = ("Olmo2", "Mixtral", "LLaVA")  # the others are computed from the config
COMPUTED = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Phi3"]
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (f"{name}ForCausalLM", HEAD) for name in COMPUTED if name != "Phi3"},
    **{f"{name} plain": (f"{name}ForCausalLM", {}) for name in ("Llama", "Mistral", "Qwen2")},
    "Phi3": ("Phi3ForCausalLM", {}),
    "tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "Gemma3": ("Gemma3ForCausalLM", HEAD),
    "Olmo2": ("Olmo2ForCausalLM", {}),
    "Mixtral": ("MixtralForCausalLM", {"num_local_experts": 4}),
    "LLaVA": ("LlavaForConditionalGeneration", {}),
}
SEEING = {
    "text_config": SIZES | {"model_type": "llama"},
    "vision_config": {"hidden_size": 32, "num_hidden_layers": 2, "image_size": 56}
    | {"num_attention_heads": 2, "patch_size": 14, "model_type": "clip_vision_model"},
    "vision_feature_layer": -2,
}
# Names of transformers 5 -> what vLLM calls the layer.
NEWER = {
    "model.layers.0.mlp.experts.base_layer": "model.layers.0.block_sparse_moe.experts.base_layer",
    "model.vision_tower.encoder.layers.0.mlp.fc1": (
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1"
    ),
    "model.vision_tower.encoder.layers.1.mlp.fc1": (
        "vision_tower.vision_model.encoder.layers.1.mlp.fc1"
    ),
}
# One process for all: importing vLLM takes the time.
ASK = f"""
import json, sys
NEWER = {list(NEWER)}
"""
ASK += """
from shared.config.llm import LLMConfig
from worker.engine.vllm.lora.offline_layers import offline_layers
for folder in sys.argv[1:]:
    model = LLMConfig(
        model_loading_config={"model_id": "m", "model_source": folder},
        lora_config={"dynamic_lora_loading_path": "/nowhere"},
        engine_kwargs={"enable_lora": True, "max_loras": 1, "enable_tower_connector_lora": True},
    )
    table = offline_layers(model)
    shapes = table.shapes()
    renamed = {name: shapes.rename(name) for name in NEWER}
    left_out = [name for name in NEWER if shapes.ignores(name)]
    rest = [sorted(table.embeddings), table.experts, renamed, left_out]
    print(json.dumps([folder, table.modules, *rest]))
"""


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    """name -> (config, what vLLM's class says)."""
    configs, folders = {}, []
    for name, (architecture, sizes) in BASES.items():
        folder = tmp_path_factory.mktemp("bases") / name
        given = SEEING if name == "LLaVA" else SIZES | sizes
        config = getattr(transformers, architecture).config_class(**given)
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


@pytest.mark.parametrize("name", [n for n in BASES if n not in ASKED])
def test_what_is_computed_is_what_the_engine_has_layers_for(
    asked: dict[str, tuple[Any, Any]], name: str
) -> None:
    config, (modules, embeddings, experts, *_) = asked[name]
    computed = shapes_from_config(config)
    assert computed is not None
    assert computed.modules == as_shapes(modules)
    assert sorted(computed.embeddings) == embeddings and not experts


def test_a_class_that_is_not_computed_is_asked(asked: dict[str, tuple[Any, Any]]) -> None:
    config, (modules, *_) = asked["Olmo2"]
    assert shapes_from_config(config) is None
    assert as_shapes(modules)["model.layers.2.self_attn.k_proj"] == (32, 64)


def test_experts_are_adapted_one_by_one_and_all_in_one_tensor(
    asked: dict[str, tuple[Any, Any]],
) -> None:
    _, (modules, _, experts, renamed, _) = asked["Mixtral"]
    at = "model.layers.1.block_sparse_moe.experts"
    shapes = as_shapes(modules)
    assert shapes[f"{at}.3.w1"] == (96, 64) and shapes[f"{at}.3.w2"] == (64, 96)
    assert f"{at}.4.w1" not in shapes
    assert shapes[at] == (64, 96) and shapes[f"{at}.base_layer"] == (192, 64)
    assert experts[at] == experts[f"{at}.base_layer"] == 4
    newer, older = next(iter(NEWER.items()))
    assert renamed[newer] == older and older in shapes


def test_a_vision_tower_takes_adapters_with_newer_names_and_leaves_out_layers_that_it_lacks(
    asked: dict[str, tuple[Any, Any]],
) -> None:
    """LLaVA takes its features from the layer before the last. PEFT adapts the last one as well."""
    _, (modules, _, _, renamed, left_out) = asked["LLaVA"]
    _, used, unused = NEWER
    assert renamed[used] == NEWER[used] and NEWER[used] in modules
    assert renamed[unused] == NEWER[unused] and NEWER[unused] not in modules
    assert left_out == [unused]
