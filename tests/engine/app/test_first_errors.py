"""Shell. Bodies that do not fit, beside vLLM's own classes for them: few errors, however large the
body is, and all of vLLM's if it is small.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from tests.engine.in_process import worker_environment
from tests.engine.requests.test_request_fields import ENOUGH, HI, ROUTERS
from worker.engine.vllm.app import first_errors

MANY = 50_000
MOST_ERRORS = 500
"""Of the forms of one item. Each costs the loop 10 us."""
WRONG: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/completions", {"prompt": [1] + ["a"] * MANY}),
    ("/v1/completions", {"prompt": [1] + [1.5] * MANY}),
    ("/v1/completions", {"prompt": [[1], ["a"] * MANY]}),
    ("/v1/responses", {"input": [1] * MANY}),
    ("/v1/responses", {"input": [{"a": 1}] * 409}),
    ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "x"}] * 7}] * 409}),
    ("/v1/responses", {"input": "hi", "tools": [{"type": "function"}] * 1024}),
    ("/v1/responses", {"input": "hi", "include": ["x"] * MANY}),
    ("/v1/chat/completions", {"messages": [1] * 2048}),
    ("/v1/chat/completions", {"messages": HI, "allowed_token_ids": ["a"] * MANY}),
    ("/v1/chat/completions", {"messages": HI, "vllm_xargs": {f"{n}": None for n in range(5000)}}),
    ("/v1/messages", {"messages": [1] * 2048, "max_tokens": 1}),
    ("/v1/messages/count_tokens", {"messages": HI, "system": [1] * 3000}),
    ("/tokenize", {"messages": [1] * MANY}),
    ("/detokenize", {"tokens": ["a"] * MANY}),
    ("/v1/embeddings", {"input": [1] + ["a"] * MANY}),
    ("/v2/embed", {"texts": ["a"], "embedding_types": ["x"] * MANY}),
    ("/classify", {"input": [1] + ["a"] * MANY}),
    ("/pooling", {"input": [1] + ["a"] * MANY}),
    ("/score", {"text_1": [1] * 2048, "text_2": [1] * 2048}),
    ("/rerank", {"query": "a", "documents": [1] * 2048}),
)
SMALL_AND_WRONG: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/completions", {"prompt": [1, "a", "b"], "stop": [1, 2]}),
    ("/v1/responses", {"input": [1, {"a": 1}], "include": ["x", "y"]}),
    ("/v1/chat/completions", {"messages": [1, 2], "logit_bias": {"a": "b", "c": "d"}}),
    ("/v1/messages", {"messages": [1, 2], "max_tokens": "x"}),
    ("/score", {"text_1": [1, 2], "text_2": [3]}),
)

Adapters = Mapping[str, TypeAdapter[Any]]


@pytest.fixture(scope="module")
def adapters() -> Adapters:
    """Path -> what validates its bodies in vLLM's app."""
    with worker_environment():
        from fastapi import FastAPI

        app = FastAPI()
        for name in ROUTERS:
            app.include_router(
                importlib.import_module(f"vllm.entrypoints.{name}.api_router").router
            )
        first_errors.install(app)
        return {
            route.path: field._type_adapter
            for route in app.routes
            for field in getattr(getattr(route, "dependant", None), "body_params", ())
        }


def errors(validator: Any, body: dict[str, Any]) -> list[Any]:
    with pytest.raises(ValidationError) as found:
        validator.validate_python({"model": "m", **body}, from_attributes=True)
    return list(found.value.errors(include_context=False, include_url=False))


@pytest.mark.parametrize(("path", "body"), WRONG, ids=lambda v: v if type(v) is str else [*v][-1])
def test_a_large_body_has_few_errors(path: str, body: dict[str, Any], adapters: Adapters) -> None:
    assert len(errors(adapters[path], body)) <= MOST_ERRORS


@pytest.mark.parametrize(("path", "body"), SMALL_AND_WRONG)
def test_a_small_body_has_all_of_vllms_errors(
    path: str, body: dict[str, Any], adapters: Adapters
) -> None:
    thorough = adapters[path].validator._thorough
    assert errors(adapters[path], body) == errors(thorough, body)


@pytest.mark.parametrize("path", ENOUGH)
def test_what_fits_is_read_as_before(path: str, adapters: Adapters) -> None:
    for body in ENOUGH[path]:
        given = {"model": "m", **body}
        ours = adapters[path].validate_python(given)
        theirs = adapters[path].validator._thorough.validate_python(given)
        assert type(ours) is type(theirs)
        assert ours.model_dump(exclude={"request_id"}) == theirs.model_dump(exclude={"request_id"})


def test_the_models_that_vllm_makes_itself_have_few_errors_too(adapters: Adapters) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    with pytest.raises(ValidationError) as found:
        ChatCompletionRequest(model="m", messages=[1] * 2048)
    assert found.value.error_count() <= MOST_ERRORS
