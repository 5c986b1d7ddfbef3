"""What a changed file changes at once, and what waits for a restart."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from shared.config import settings_file
from shared.config.llm import Settings
from shared.config.reload import plan
from shared.config.settings_file import (
    FollowedConfig,
    load_settings,
    parse_settings,
    read_settings,
    write_settings,
)
from shared.errors import ConfigError
from tests.harness import replace_file

LIMIT_S = 20


def config(models: dict[str, dict[str, Any]], **gateway: Any) -> str:
    entries = [
        {
            "model_loading_config": {"model_id": name},
            "engine_kwargs": {"enable_lora": True},
            "lora_config": {"dynamic_lora_loading_path": "/adapters", **more.pop("lora", {})},
            **more,
        }
        for name, more in models.items()
    ]
    return yaml.safe_dump({"llm_configs": entries, "gateway": gateway})


def settings(text: str) -> Settings:
    return parse_settings(text, "c.yaml", lambda path: "")


def test_aliases_pins_limits_and_numbers_of_workers_change_and_nothing_else_does() -> None:
    old = settings(config({"m": {}}, port=8000))
    new = settings(
        config(
            {
                "m": {
                    "lora": {"pin": ["a"], "aliases": {"prod": "a"}, "download_timeout_s": 7},
                    "deployment_config": {"num_replicas": 3},
                }
            },
            port=9000,
            log_level="debug",
            bounds={"max_messages": 5},
        )
    )
    found = plan(old, new)
    assert set(found.changed) == {
        "gateway.log_level",
        "gateway.bounds.max_messages",
        "m.lora_config.pin",
        "m.lora_config.aliases",
        "m.deployment_config.num_replicas",
    }
    assert set(found.need_restart) == {"gateway.port", "m.lora_config.download_timeout_s"}
    model = found.settings.models[0]
    assert found.settings.gateway.port == 8000 and model.workers == 3
    assert model.lora_config is not None
    assert model.lora_config.pin == ("a",) and model.lora_config.download_timeout_s == 30


def test_a_model_that_comes_or_goes_waits_for_a_restart() -> None:
    old, new = settings(config({"a": {}, "b": {}})), settings(config({"b": {}, "c": {}}))
    found = plan(old, new)
    assert found.settings.models == old.models
    assert found.changed == () and set(found.need_restart) == {"a", "c"}


def test_a_key_that_is_taken_back_no_longer_waits() -> None:
    text = config({"a": {}}, port=8000)
    found = plan(plan(settings(text), settings(config({"a": {}}, port=1))).settings, settings(text))
    assert found.need_restart == () and found.changed == ()


def test_a_scaling_policy_is_code_and_waits_for_a_restart_while_its_bounds_do_not() -> None:
    def scaled(**more: Any) -> str:
        bounds = {"min_replicas": 1, "target_ongoing_requests": 2, **more}
        return config({"m": {"deployment_config": {"autoscaling_config": bounds}}})

    policy = {"policy_function": "mine:decide"}
    found = plan(settings(scaled(max_replicas=2)), settings(scaled(max_replicas=4, policy=policy)))
    scaling = found.settings.models[0].deployment_config.autoscaling_config
    assert scaling is not None and scaling.max_replicas == 4 and scaling.policy is None
    assert len(found.changed) == 1 and len(found.need_restart) == 1


def test_a_port_that_was_found_is_the_port_0_of_the_file() -> None:
    old = settings(config({"m": {}}, port=43210))
    assert plan(old, settings(config({"m": {}}, port=0))).need_restart == ()


def test_settings_that_went_through_the_file_of_serve_have_not_changed(tmp_path: Path) -> None:
    aliases = {"prod": {"shares": [{"adapter": "a", "weight": 90}, {"adapter": "b"}]}}
    given = settings(config({"m": {"lora": {"pin": ["a"], "aliases": aliases}}}))
    found = plan(given, read_settings(str(write_settings(given, tmp_path))))
    assert found.changed == () and found.need_restart == ()


async def test_a_file_is_followed_with_those_that_it_includes_and_a_mistake_is_told_once(
    tmp_path: Path,
) -> None:
    main, included = tmp_path / "c.yaml", tmp_path / "m.yaml"
    model: dict[str, Any] = {"model_loading_config": {"model_id": "m"}}
    included.write_text(yaml.safe_dump(model))
    main.write_text("llm_configs: [m.yaml]\n")
    file = FollowedConfig(str(main), load_settings(main), lambda: load_settings(main))
    changes = file.changes()
    async with asyncio.timeout(LIMIT_S):
        coming = asyncio.ensure_future(anext(changes))
        replace_file(included, yaml.safe_dump({**model, "tyop": 1}).encode())
        wrong = await coming
        assert isinstance(wrong, ConfigError) and "tyop" in wrong.message
        coming = asyncio.ensure_future(anext(changes))
        deployment = {"deployment_config": {"num_replicas": 2}}
        replace_file(included, yaml.safe_dump({**model, **deployment}).encode())
        found = await coming
        assert isinstance(found, Settings) and found.models[0].workers == 2
        file.ask()
        assert await anext(changes) == found, "who asks is answered though nothing has changed"


async def test_a_file_that_could_not_be_read_is_read_once_what_was_missing_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings_file, "RETRY_S", 0.01)
    main, model = tmp_path / "c.yaml", "{model_loading_config: {model_id: m}}"
    main.write_text(f"llm_configs: [{model}]\n")
    file = FollowedConfig(str(main), load_settings(main), lambda: load_settings(main, again=True))
    changes = file.changes()
    async with asyncio.timeout(LIMIT_S):
        coming = asyncio.ensure_future(anext(changes))
        replace_file(main, f"llm_configs: [{model}, other.yaml]\n".encode())
        wrong = await coming
        assert isinstance(wrong, ConfigError) and "other.yaml" in wrong.message
        coming = asyncio.ensure_future(anext(changes))
        await asyncio.wait([coming], timeout=2 * settings_file.POLL_S)
        assert not coming.done(), "a mistake is told once"
        (tmp_path / "other.yaml").write_text("model_loading_config: {model_id: other}\n")
        found = await coming
        assert isinstance(found, Settings) and len(found.models) == 2


@pytest.mark.parametrize("which", ["c.yaml", "m.yaml"])
def test_a_pipe_without_a_writer_holds_no_reader_of_a_changed_file(
    tmp_path: Path, which: str
) -> None:
    main, included = tmp_path / "c.yaml", tmp_path / "m.yaml"
    included.write_text("model_loading_config: {model_id: m}\n")
    main.write_text("llm_configs: [m.yaml]\n")
    (tmp_path / which).unlink()
    os.mkfifo(tmp_path / which)
    with pytest.raises(ConfigError, match="is no plain file"):
        load_settings(main, again=True)


def test_the_file_of_a_start_may_be_a_pipe() -> None:
    there, here = os.pipe()
    os.write(here, b"llm_configs: [{model_loading_config: {model_id: m}}]\n")
    os.close(here)
    assert load_settings(f"/dev/fd/{there}").models[0].model_id == "m"
    os.close(there)
