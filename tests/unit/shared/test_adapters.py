from __future__ import annotations

import contextlib
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.adapters import MAX_NAME_LENGTH, AdapterRef, StoredAdapter, StoredFile, check_adapter_config, check_name
from shared.errors import AdapterNotFound, InvalidAdapter

MAX_RANK = 64


def config(**fields: object) -> bytes:
    return json.dumps({"peft_type": "LORA", "r": 8, **fields}).encode()


def refusal(raw: bytes, max_rank: int = MAX_RANK) -> str:
    with pytest.raises(InvalidAdapter) as caught:
        check_adapter_config(raw, max_rank)
    return caught.value.message


# ---- names ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pirate", "a", "_", "7", "team/pirate", "a.b-c_d", "a/b/c/d", "x" * MAX_NAME_LENGTH])
def test_a_name_in_the_grammar_passes(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        ".",
        "..",
        "a..b",
        "../etc",
        "a/../b",
        "a/./b",
        "/a",
        "a/",
        "a//b",
        "-rf",
        "a/-b",
        ".hidden",
        "a b",
        "a\n",
        "a\r",
        "\na",
        "a\0",
        "é",
        "a:b",
        "a\\b",
        "a*",
        "x" * 201,
    ],
)
def test_a_name_outside_the_grammar_is_not_found(name: str) -> None:
    with pytest.raises(AdapterNotFound) as caught:
        check_name(name)
    assert len(caught.value.message) < 400 and not caught.value.retryable


@given(st.text(max_size=30) | st.from_regex(r"[A-Za-z0-9._/-]{0,12}\Z"))
def test_a_name_that_passes_is_a_plain_relative_path(name: str) -> None:
    try:
        check_name(name)
    except AdapterNotFound:
        return
    assert name.isascii() and all(re.fullmatch(r"\w[\w.-]*", part, re.ASCII) for part in name.split("/"))


# ---- adapter_config.json --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"r": 1},
        {"r": MAX_RANK},
        {"use_dora": False, "modules_to_save": None, "layer_replication": []},
        {"new_key": {"a": 1}},
        {"rank_pattern": {}},
        {"rank_pattern": None},
    ],
)
def test_a_lora_config_passes_with_its_rank(fields: dict[str, object]) -> None:
    assert check_adapter_config(config(**fields), MAX_RANK) == fields.get("r", 8)


def test_the_peft_type_may_be_left_out() -> None:
    assert check_adapter_config(b'{"r": 4}', MAX_RANK) == 4


@pytest.mark.parametrize("rank", [0, -1, True, False, 8.0, "8", None, [8], {}])
def test_a_rank_that_is_no_positive_whole_number_is_refused(rank: object) -> None:
    assert "`r`" in refusal(config(r=rank))


def test_a_missing_rank_is_refused() -> None:
    assert "`r`" in refusal(b"{}")


def test_a_rank_above_the_bound_is_refused_with_both_numbers() -> None:
    message = refusal(config(r=65))
    assert "65" in message and "64" in message


def test_a_rank_pattern_counts_with_its_greatest_rank() -> None:
    assert "128" in refusal(config(rank_pattern={"q_proj": 4, "k_proj": 128}))
    assert check_adapter_config(config(rank_pattern={"q_proj": 64}), MAX_RANK) == 8


@pytest.mark.parametrize("peft_type", ["IA3", "lora", None, 3, ["LORA"]])
def test_another_kind_of_adapter_is_refused(peft_type: object) -> None:
    assert "peft_type" in refusal(config(peft_type=peft_type))


@pytest.mark.parametrize("key", ["use_dora", "modules_to_save", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_qalora"])
def test_a_feature_that_the_engine_does_not_serve_is_refused_by_name(key: str) -> None:
    assert key in refusal(config(**{key: ["lm_head"]}))


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b"8", b'"LORA"', b"\x00", b'{"r": 8,}', b'{"r": ' + b"9" * 5000 + b"}"])
def test_what_is_no_json_object_is_refused(raw: bytes) -> None:
    refusal(raw)


@pytest.mark.parametrize("raw", [b'{"r": 8, "x": "\xff"}', b'{"r": 8, "\xff": 1}', b'{"r": 8, "base_model_name_or_path": "caf\xe9"}'])
def test_a_config_that_is_no_utf8_is_refused(raw: bytes) -> None:
    refusal(raw)


def test_a_bottomless_config_is_refused() -> None:
    refusal(b'{"r": 8, "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_rank_or_an_invalid_adapter(raw: bytes) -> None:
    with contextlib.suppress(InvalidAdapter):
        assert 1 <= check_adapter_config(raw, MAX_RANK) <= MAX_RANK


anything = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.lists(st.integers(), max_size=2)
    | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)
)


@given(st.dictionaries(st.sampled_from(["r", "peft_type", "rank_pattern", "use_dora", "modules_to_save", "x"]), anything))
def test_any_object_is_a_rank_or_an_invalid_adapter(fields: dict[str, object]) -> None:
    with contextlib.suppress(InvalidAdapter):
        assert 1 <= check_adapter_config(json.dumps(fields).encode(), MAX_RANK) <= MAX_RANK


# ---- identity -------------------------------------------------------------------------------------------------------------------------------


def test_base_name_and_digest_together_are_the_identity() -> None:
    ref = AdapterRef("tiny", "pirate", "d")
    others = {AdapterRef("big", "pirate", "d"), AdapterRef("tiny", "haiku", "d"), AdapterRef("tiny", "pirate", "e")}
    assert ref not in others and ref in {AdapterRef("tiny", "pirate", "d")}
    assert str(ref) == "tiny:pirate@d"


def test_an_adapter_is_as_big_as_its_files() -> None:
    assert StoredAdapter("a", "d", (StoredFile("x", 3, "1"), StoredFile("y", 4, "1"))).size_bytes == 7
    assert StoredAdapter("a", "d", ()).size_bytes == 0
