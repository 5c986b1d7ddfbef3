"""JSON in pieces has the bytes that vLLM's server would send."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, model_serializer

from worker.engine.vllm.app import json_pieces


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None


class Token(BaseModel):
    token: str
    bytes: list[int] | None = None
    top: list[Token] = Field(default_factory=list)


class Logprobs(BaseModel):
    content: list[Token] | None = None


class Choice(BaseModel):
    model_config = ConfigDict(extra="allow")

    index: int
    logprobs: Logprobs | None = None
    prompt: list[dict[int, Logprob] | None] | None = None
    text_: str = Field("a", alias="text")


class Short(BaseModel):
    """Leaves a member out, as some of vLLM's classes do."""

    called: list[int] | None = None

    @model_serializer(mode="wrap")
    def _write(self, handler: Any) -> Any:
        return {k: v for k, v in handler(self).items() if v is not None}


class Answer(BaseModel):
    id: str
    choices: list[Choice | Short]
    rows: list[list[float]] | None = None
    empty: list[int] = Field(default_factory=list)
    last: str | None = None


def theirs(value: Any, **dump: Any) -> bytes:
    content = value.model_dump(**dump) if isinstance(value, BaseModel) else value
    return json.dumps(
        content, ensure_ascii=False, allow_nan=False, indent=None, separators=(",", ":")
    ).encode()


def encode(value: Any, **dump: Any) -> bytes:
    return b"".join(json_pieces.encode(value, **dump))


def token(n: int) -> Token:
    top = [Token(token=f"{k}\n\u4e2d", bytes=[k, n]) for k in range(n % 4)]
    return Token(token=f't"{n}', bytes=[n], top=top)


VALUES: list[Any] = [
    [], {}, None, 1.5, "a", [[]], [{}], {"a": []}, [[1, 2], [3]],
    [None, 1, [2], "b", {"c": [3] * 9}],
    [[0.1] * 50] * 7, {"a": {"b": [1] * 40}, "c": "d" * 4000, "e": None}, [[[1] * 9] * 9] * 3,
    (1, 2, (3,) * 20), {5: [1] * 20}, ["x" * 900] * 5, [True, False] * 10,
    Answer(id="a", choices=[]),
    Answer(id="a", choices=[Short(called=[1] * 30), Short()]),
    Answer(id="a", choices=[Choice(index=0, text="b", more=[1] * 30)]),
    Answer(
        id="b",
        choices=[
            Choice(
                index=n,
                logprobs=Logprobs(content=[token(k) for k in range(20)]),
                prompt=[None, *({k: Logprob(-0.5, k)} for k in range(20))],
            )
            for n in range(3)
        ],
        rows=[[0.25] * 30, [], [1.0]],
    ),
]  # fmt: skip


@pytest.mark.parametrize("piece", [1, 3, 10, 100, 4000])
@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_pieces_of_any_size_make_the_same_bytes(
    value: Any, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_pieces, "PIECE", piece)
    assert json.loads(encode(value)) == json.loads(theirs(value))
    if not (isinstance(value, Answer) and value.choices):  # a member left out comes last
        assert encode(value) == theirs(value)


@pytest.mark.parametrize("piece", [1, 10, 4000])
@pytest.mark.parametrize(
    "dump", [{"exclude_none": True}, {"mode": "json", "by_alias": True}], ids=str
)
def test_the_arguments_of_model_dump_hold_at_every_depth(
    dump: dict[str, Any], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_pieces, "PIECE", piece)
    for value in VALUES[-2:]:
        assert json.loads(encode(value, **dump)) == json.loads(theirs(value, **dump))


@pytest.mark.parametrize("piece", [1, 4000])
def test_what_json_does_not_have_is_an_error(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_pieces, "PIECE", piece)
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode([[1.0, math.inf]])
    with pytest.raises(TypeError, match="set has no JSON"):
        encode([{1}])


def test_chunks_are_of_one_size_and_a_name_stands_in_one_with_its_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(json_pieces, "PIECE", 100)
    monkeypatch.setattr(json_pieces, "CHUNK_BYTES", 1000)
    choices = [{"rows": [0.125] * (150 + n), "finish_reason": "stop"} for n in range(50)]
    chunks = json_pieces.encode({"choices": choices})
    assert all(1000 <= len(chunk) < 2000 for chunk in [*chunks][:-1]) and len(chunks) > 20
    assert sum(chunk.count(b'"finish_reason":"stop"') for chunk in chunks) == 50


@pytest.mark.parametrize("slices", [[], [[]], [[1], [], [2, 3]], [[token(1)], [token(2)] * 9]])
def test_a_list_of_which_slices_are_given_is_written_as_one(
    slices: list[list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [item for some in slices for item in some]
    for piece in (1, 4000):
        monkeypatch.setattr(json_pieces, "PIECE", piece)
        raw = json_pieces.encode_list(slices)
        models = [it.model_dump() if isinstance(it, BaseModel) else it for it in whole]
        assert encode({"a": raw, "b": [raw]}) == theirs({"a": models, "b": [models]})


def test_what_a_model_has_computed_for_itself_is_not_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(json_pieces, "PIECE", 5)
    answer = Answer(id="a", choices=[], rows=[[0.5] * 9])
    vars(answer)["computed"] = [1] * 99  # where functools.cached_property keeps it
    assert encode(answer) == theirs(answer)


def test_what_was_written_is_freed_row_by_row() -> None:
    rows = [[0.5] * 90 for _ in range(9)]
    answer = Answer(id="a", choices=[Choice(index=n) for n in range(3)], rows=rows)
    choices, rows = answer.choices, answer.rows or []
    answer.choices[0].__dict__["prompt"] = [1.5]
    json_pieces.give_up(answer)
    assert answer.id == "a" and answer.rows is None and answer.choices is None
    assert rows == [None] * 9 and choices == [None] * 3


def test_no_call_writes_much_more_than_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen in what is put at once: the numbers of one call, beside those of the whole answer."""
    monkeypatch.setattr(json_pieces, "PIECE", 100)
    put: list[bytes] = []
    rows = [[0.5] * 90] * 50 + [[0.25] * 1000]
    json_pieces._Writer(put.append, {}).add({"data": [{"embedding": row} for row in rows]})
    assert max(part.count(b",") for part in put) <= 200
    assert len(put) > 50
