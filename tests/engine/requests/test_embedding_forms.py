"""Shell. What bodies of `/v1/embeddings` a worker accepts, beside vLLM's own classes for them."""

from __future__ import annotations

import functools
import operator
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from tests.engine.in_process import worker_environment
from worker.engine.vllm.app import embedding_forms

HI = {"role": "user", "content": "hi"}
INPUTS: list[Any] = [
    "a", ["a", "b"], [1, 2], [[1], [2, 3]], [], [[]], [HI], [[HI], [HI]], [HI, "x"], [1, "a"],
    [[1], "a"], 5, None, [["a"]], {"a": 1}, [{}], [[{}]], [True], ["1", 2], [[1.5]], [1.0],
]  # fmt: skip
CLASSES = ("Completion", "Chat", "BatchChat", "ChatInput", "BatchChatInput")


@pytest.fixture(scope="module")
def types() -> tuple[TypeAdapter[Any], TypeAdapter[Any]]:
    """(vLLM's, ours)."""
    with worker_environment():
        from vllm.entrypoints.pooling.embed import protocol

        embedding_forms.install()
        classes = [getattr(protocol, f"Embedding{name}Request") for name in CLASSES]
        theirs = functools.reduce(operator.or_, classes)
        return TypeAdapter(theirs), TypeAdapter(protocol.EmbeddingRequest)


def read(type_: TypeAdapter[Any], body: dict[str, Any]) -> Any:
    """What was read, or None."""
    try:
        found = type_.validate_python(body)
    except ValidationError:
        return None
    return type(found).__name__, found.model_dump(exclude={"request_id"})


@pytest.mark.parametrize("given", INPUTS, ids=str)
def test_a_large_body_is_read_as_vllm_reads_it(
    given: Any, types: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_forms, "MANY_ITEMS", -1)
    theirs, ours = types
    for body in ({"input": given}, {"messages": given}, {"input": given, "messages": [HI]}):
        assert read(ours, {"model": "m", **body}) == read(theirs, {"model": "m", **body}), body


@pytest.mark.parametrize("body", [{"input": 3}, {"input": ["a"], "dimensions": "x"}, {}], ids=str)
def test_the_errors_of_a_small_body_are_vllm_s(body: dict[str, Any], types: Any) -> None:
    errors = []
    for type_ in types:
        with pytest.raises(ValidationError) as found:
            type_.validate_python({"model": "m", **body})
        errors.append(found.value.errors(include_context=False))
    assert errors[0] == errors[1]


@pytest.mark.parametrize(
    "given",
    [[[7] * 50] * 40 + ["x"], [["x"] * 50] * 40, [[{}] * 50] * 40, [1] * 2000 + ["x"]],
    ids=["ids and a text", "lists of texts", "empty messages", "a text among ids"],
)
def test_a_body_that_does_not_fit_has_few_errors_however_long_it_is(given: Any, types: Any) -> None:
    """Each costs the loop some microseconds. vLLM's classes would list thousands."""
    with pytest.raises(ValidationError) as found:
        types[1].validate_python({"model": "m", "input": given})
    assert found.value.error_count() < 100
