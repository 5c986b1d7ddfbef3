"""What a config says of vLLM's arguments, and what vLLM makes of it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from gateway.cli.check import KEPT
from shared.config.llm import LLMConfig
from shared.config.vllm_engine_arguments import Argument, read_known_arguments
from tests.engine.in_process import worker_environment
from tests.harness import DEMO


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("compilation_config", {"cudagraph_capture_sizes": [1, 2]}),
        ("compilation_config", {"debug_dump_path": None, "backend": "eager"}),
        ("structured_outputs_config", {"backend": "xgrammar"}),
        ("eplb_config", {"window_size": 10}),
    ],
)
def test_a_section_of_vllm_may_be_given_in_part(key: str, part: dict[str, Any]) -> None:
    with worker_environment():
        from worker.engine.vllm.arguments import serve_args

        model = LLMConfig(
            model_loading_config={"model_id": "demo", "model_source": str(DEMO / "model")},
            engine_kwargs={key: part},
        )
        made = getattr(serve_args(model), key)
    assert {name: getattr(made, name) for name in part} == part


@pytest.mark.parametrize(
    ("loading", "kwargs", "expected"),
    [
        ({"tokenizer_source": "org/tokens"}, {}, "org/tokens"),
        ({"tokenizer_source": "org/tokens"}, {"tokenizer": "org/other"}, "org/other"),
        ({}, {}, None),
    ],
)
def test_the_tokenizer_is_the_one_that_the_config_names(
    loading: dict[str, Any], kwargs: dict[str, Any], expected: str | None
) -> None:
    with worker_environment():
        from worker.engine.vllm.arguments import serve_args

        model = LLMConfig(
            model_loading_config={"model_id": "demo", "model_source": str(DEMO / "model")}
            | loading,
            engine_kwargs=kwargs,
        )
        assert serve_args(model).tokenizer == expected


def test_the_kept_copy_of_vllms_arguments_is_what_the_installed_vllm_says() -> None:
    with worker_environment():
        from vllm.version import __version__

        from worker.engine.vllm.arguments import arguments

        found = msgspec.convert(arguments(), dict[str, Argument])
    kept = read_known_arguments(KEPT.read_bytes())
    if kept.version != __version__:
        pytest.skip(f"the copy is of vLLM {kept.version}")
    assert found == kept.arguments
