"""The shapes computed from a config are those of the model that transformers builds, and what is
not computed is built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from shared.adapters.base_layers import shapes_from_config
from worker.validation import base_model as base_shapes
from worker.validation.base_model import read_base_shapes

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


def saved(architecture: str, folder: Path, **sizes: Any) -> dict[str, Any]:
    model = getattr(transformers, architecture)
    config = model.config_class(**(SIZES | sizes))
    config.architectures = [architecture]
    config.save_pretrained(folder)
    return dict(config.to_dict())


@pytest.mark.parametrize("more", [{}, HEAD], ids=["plain", "head-size"])
@pytest.mark.parametrize(
    "architecture", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Phi3"]
)
def test_computed_shapes_are_those_of_the_built_model(
    tmp_path: Path, architecture: str, more: dict[str, int]
) -> None:
    name = f"{architecture}ForCausalLM"
    computed = shapes_from_config(saved(name, tmp_path, **more), "x")
    assert computed is not None and len(computed.modules) in (3 * 7, 3 * 4)
    assert computed.modules == base_shapes._from_meta_device(str(tmp_path), None, False)


def test_the_text_model_of_gemma_3_is_computed(tmp_path: Path) -> None:
    computed = shapes_from_config(saved("Gemma3ForCausalLM", tmp_path, **HEAD), "x")
    assert computed is not None and computed.modules == base_shapes._from_meta_device(
        str(tmp_path), None, False
    )


def test_a_tied_head_changes_nothing(tmp_path: Path) -> None:
    tied = shapes_from_config(saved("LlamaForCausalLM", tmp_path, tie_word_embeddings=True), "x")
    assert tied is not None and tied.modules == base_shapes._from_meta_device(
        str(tmp_path), None, False
    )


@pytest.mark.parametrize("architecture", ["Olmo2ForCausalLM", "GraniteForCausalLM"])
def test_an_architecture_that_is_not_computed_is_built(tmp_path: Path, architecture: str) -> None:
    assert shapes_from_config(saved(architecture, tmp_path), "x") is None
    shapes = read_base_shapes(str(tmp_path))
    assert (
        shapes.modules["model.layers.2.self_attn.k_proj"] == (32, 64)
        and len(shapes.modules) == 3 * 7
    )


def test_of_a_multi_modal_model_only_the_text_part_takes_adapters(tmp_path: Path) -> None:
    text = transformers.Gemma3TextConfig(**SIZES | HEAD)
    vision = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    config = transformers.Gemma3Config(text_config=text.to_dict(), vision_config=vision.to_dict())
    config.architectures = ["Gemma3ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    shapes = read_base_shapes(str(tmp_path))
    assert len(shapes.modules) == 3 * 7 and not any(
        "vision" in m or "projector" in m for m in shapes.modules
    )
    old = "language_model.model.layers.0.self_attn.q_proj"
    assert shapes.modules[shapes.canonical(old)] == (128, 64)


def test_a_multi_modal_model_that_transformers_does_not_file_under_text_is_built_by_its_own_name(
    tmp_path: Path,
) -> None:
    config = transformers.Qwen2VLConfig(
        text_config=SIZES
        | {
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [2, 3, 3],
                "rope_theta": 1e4,
            }
        },
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
    )
    config.architectures = ["Qwen2VLForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    shapes = read_base_shapes(str(tmp_path))
    assert len(shapes.modules) == 3 * 7 and not any("visual" in m for m in shapes.modules)
