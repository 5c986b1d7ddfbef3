"""Shell. The names of `ray.serve.llm`: those that are here mean what they mean there, and the
others say what to do instead.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import loraplex
from loraplex import LLMConfig, LLMServingArgs, build_llm_deployment, build_openai_app
from shared.errors import ConfigError

GIVEN: dict[str, Any] = {
    "model_loading_config": {"model_id": "m", "model_source": "org/m"},
    "engine_kwargs": {"enable_lora": True, "max_loras": 4, "max_model_len": 512},
    "lora_config": {"dynamic_lora_loading_path": "s3://bucket/adapters"},
    "deployment_config": {"autoscaling_config": {"min_replicas": 1, "max_replicas": 3}},
    "accelerator_type": "L4",
}
OTHER = GIVEN | {"model_loading_config": {"model_id": "other"}}


def test_a_dumped_configuration_makes_the_same_one_again() -> None:
    config = LLMConfig(**GIVEN)
    dumped = config.model_dump()
    assert json.loads(json.dumps(dumped)) == dumped
    assert LLMConfig(**dumped) == LLMConfig.model_validate(dumped) == config
    assert LLMConfig(**json.loads(config.model_dump_json())) == config
    assert dumped["deployment_config"]["autoscaling_config"]["max_replicas"] == 3


def test_a_dump_leaves_out_what_is_not_wanted() -> None:
    config = LLMConfig(**GIVEN)
    assert "runtime_env" in config.model_dump()
    assert "runtime_env" not in config.model_dump(exclude_none=True)
    few = config.model_dump(exclude_defaults=True)
    assert {*few} == {*GIVEN} and LLMConfig(**few) == config


def test_the_dumped_arguments_of_an_app_are_plain_values_at_every_depth() -> None:
    config = LLMConfig(model_loading_config={"model_id": "m"})
    args = LLMServingArgs(llm_configs=[config, "other.yaml"])
    assert args.model_dump()["llm_configs"] == [config.model_dump(), "other.yaml"]
    (few, _) = args.model_dump(exclude_defaults=True)["llm_configs"]
    assert few == {"model_loading_config": {"model_id": "m"}}
    assert json.loads(args.model_dump_json()) == args.model_dump()


def test_a_copy_may_differ_and_a_deep_one_shares_nothing() -> None:
    config = LLMConfig(**GIVEN)
    other = config.model_copy(update={"accelerator_type": "H100"})
    assert (config.accelerator_type, other.accelerator_type) == ("L4", "H100")
    deep = config.model_copy(deep=True)
    deep.engine_kwargs["max_loras"] = 9
    assert config.engine_kwargs["max_loras"] == 4
    with pytest.raises(ConfigError):
        config.model_copy(update={"llm_engine": "nosuch"})


def test_what_is_no_mapping_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match="expected a mapping"):
        LLMConfig.model_validate(3)
    with pytest.raises(ConfigError, match="llm_configs"):
        build_openai_app([])  # type: ignore[arg-type]


def test_a_model_is_read_from_a_file_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(json.dumps(GIVEN | {"lora_config": {"dynamic_lora_loading_path": "adapters"}}))
    config = LLMConfig.from_file(path)
    assert config.adapters_path == str(tmp_path / "adapters")
    path.write_text("model_loading_config: {}")
    with pytest.raises(ConfigError, match="model_id"):
        LLMConfig.from_file(str(path))
    with pytest.raises(ConfigError, match="nosuch"):
        LLMConfig.from_file("nosuch.yaml")


def test_an_app_is_built_from_arguments_of_either_kind() -> None:
    models = [LLMConfig(**GIVEN), OTHER]
    by_dict = build_openai_app({"llm_configs": models})
    by_args = build_openai_app(LLMServingArgs(llm_configs=models))
    assert by_dict == by_args
    assert [m.model_id for m in by_args.models] == ["m", "other"]


def test_a_deployment_is_an_app_of_one_model() -> None:
    app = build_llm_deployment(
        LLMConfig(**OTHER | {"deployment_config": {"num_replicas": 1}}),
        name_prefix="x",
        override_serve_options={"num_replicas": 2},
    )
    assert [(m.model_id, m.workers) for m in app.models] == [("other", 2)]


@pytest.mark.parametrize("name", sorted(loraplex.RAY_ONLY))
def test_a_name_that_only_ray_has_says_what_to_do_instead(name: str) -> None:
    with pytest.raises(ImportError, match=f"`{name}` of ray.serve.llm"):
        exec(f"from loraplex import {name}")


def test_a_name_that_is_used_again_and_again_changes_nothing_in_the_process() -> None:
    assert loraplex.LLMConfig is LLMConfig
    before = list(sys.meta_path)
    assert all(loraplex.LLMConfig is LLMConfig for _ in range(3))
    assert sys.meta_path == before


def test_a_name_that_nobody_has_is_no_attribute() -> None:
    assert not hasattr(loraplex, "nosuch")


def test_names_are_listed_before_they_are_used() -> None:
    listed = "import loraplex; print(*dir(loraplex))"
    found = subprocess.run([sys.executable, "-c", listed], capture_output=True, text=True)
    assert set(loraplex.__all__) <= set(found.stdout.split())
