"""What a worker does if it cannot find out its base model's shapes. It refuses to serve adapters,
unless the engine is simulated.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shared.adapters.base_layers import BaseShapes
from shared.config.llm import LLMConfig
from shared.errors import ConfigError
from worker.validation.factory import open_validator

KNOWN = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


def model(
    folder: Path, config: dict[str, Any] | str | None, adapters: str | None = "/adapters"
) -> LLMConfig:
    folder.mkdir(exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(
            config if isinstance(config, str) else json.dumps(config)
        )
    return LLMConfig(
        model_loading_config={"model_id": "m", "model_source": str(folder)},
        lora_config={"dynamic_lora_loading_path": adapters},
        engine_kwargs={"enable_lora": True},
    )


def test_a_known_model_is_checked_with_its_shapes(tmp_path: Path) -> None:
    assert open_validator(model(tmp_path, KNOWN), 16)._shapes is not None


@pytest.mark.parametrize("config", [None, "{", "[]"], ids=["none", "cut", "a-list"])
def test_a_config_that_is_missing_or_broken_refuses_the_start(
    tmp_path: Path, config: str | None
) -> None:
    with pytest.raises(ConfigError, match=r"config\.json.*Adapters of `m` cannot be checked"):
        open_validator(model(tmp_path / "base", config), 16)


def test_a_model_without_adapters_needs_no_shapes(tmp_path: Path) -> None:
    assert open_validator(model(tmp_path / "base", None, None), 16)._shapes is None


def test_what_the_running_engine_says_of_its_layers_is_believed(tmp_path: Path) -> None:
    layers = BaseShapes({"a.b": (1, 2)})
    assert open_validator(model(tmp_path / "base", None), 16, layers)._shapes is layers
