"""Local paths of a configuration are absolute, and what is no path stays as it is."""

from __future__ import annotations

from typing import Any

import pytest

from shared.config.gateway import GatewayConfig, TLSConfig
from shared.config.llm import LLMConfig
from shared.config.local_paths import rooted, rooted_gateway


def made(**fields: Any) -> LLMConfig:
    return LLMConfig(**{"model_loading_config": {"model_id": "m"}, **fields})


def test_local_paths_start_at_the_folder_of_the_file() -> None:
    config = made(
        model_loading_config={
            "model_id": "m",
            "model_source": "./model",
            "tokenizer_source": "~/tok",
        },
        engine_kwargs={"enable_lora": True},
        lora_config={"dynamic_lora_loading_path": "adapters"},
    )
    config = rooted(config, "/etc/loraplex", "/home/me")
    assert (config.model_source, config.tokenizer_source, config.adapters_path) == (
        "/etc/loraplex/model",
        "/home/me/tok",
        "/etc/loraplex/adapters",
    )


def test_files_of_engine_kwargs_start_at_the_folder_of_the_config_and_templates_stay_text() -> None:
    kwargs = {"chat_template": "t.jinja", "tool_parser_plugin": "~/p.py", "seed": 1}
    assert rooted(made(engine_kwargs=kwargs), "/etc", "/home/me").engine_kwargs == {
        "chat_template": "/etc/t.jinja",
        "tool_parser_plugin": "/home/me/p.py",
        "seed": 1,
    }
    text = {"chat_template": "{{ messages }}"}
    assert rooted(made(engine_kwargs=text), "/etc", None).engine_kwargs == text


def test_a_certificate_starts_at_the_folder_of_the_config() -> None:
    given = GatewayConfig(tls=TLSConfig(certificate="c.pem", key="/k.pem"))
    assert rooted_gateway(given, "/etc").tls == TLSConfig(certificate="/etc/c.pem", key="/k.pem")


@pytest.mark.parametrize("source", ["Qwen/Qwen2.5-0.5B-Instruct", "s3://b/x"])
def test_ids_and_urls_are_not_mistaken_for_paths(source: str) -> None:
    model = made(model_loading_config={"model_id": "m", "model_source": source})
    assert rooted(model, "/etc", None).model_source == source
    config = made(
        lora_config={"dynamic_lora_loading_path": "s3://b/x"}, engine_kwargs={"enable_lora": True}
    )
    assert rooted(config, "/etc", None).adapters_path == "s3://b/x"
