"""Names, keys and files of adapters."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.adapters.identity import (
    MAX_NAME_LENGTH,
    AdapterRef,
    StoredAdapter,
    StoredFile,
    check_name,
)
from shared.errors import AdapterNotFound

# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "pirate",
        "a",
        "_",
        "7",
        "team/pirate",
        "a.b-c_d",
        "a/b/c/d",
        "x" * MAX_NAME_LENGTH,
        "a b",
        "é",
        "lora:1234",
        "a+b (1) {x} 100% #?&=*~'\"",
        "équipe/日本語",
        "😀",
    ],
)
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
        " a",
        "a ",
        "a/ b",
        "a\n",
        "a\r",
        "\na",
        "a\0",
        "a\x7f",
        "a\u200bb",
        "a\u202eb",
        "a\u00a0b",
        "a\udc80",
        "a\\b",
        "a@b",
        "日" * 90,
        "x" * 201,
    ],
)
def test_a_name_outside_the_grammar_is_not_found(name: str) -> None:
    with pytest.raises(AdapterNotFound) as caught:
        check_name(name)
    assert len(caught.value.message) < 400 and not caught.value.retryable


@given(st.text(max_size=30) | st.from_regex(r"[A-Za-z0-9._/-]{0,12}\Z"))
def test_a_name_that_passes_is_a_relative_path_that_stays_below_its_root(name: str) -> None:
    try:
        check_name(name)
    except AdapterNotFound:
        return
    assert os.path.normpath(os.path.join("/root", name)) == f"/root/{name}"
    assert name.isprintable() and "\\" not in name and "@" not in name
    assert all(not part.startswith((".", "-")) for part in name.split("/"))


# ---- identity ------------------------------------------------------------------------------------


def test_base_name_and_digest_together_are_the_identity() -> None:
    ref = AdapterRef("tiny", "pirate", "d")
    others = {
        AdapterRef("big", "pirate", "d"),
        AdapterRef("tiny", "haiku", "d"),
        AdapterRef("tiny", "pirate", "e"),
    }
    assert ref not in others and ref in {AdapterRef("tiny", "pirate", "d")}
    assert str(ref) == "tiny:pirate@d"


def test_an_adapter_is_as_big_as_its_files() -> None:
    assert (
        StoredAdapter("a", "d", (StoredFile("x", 3, "1"), StoredFile("y", 4, "1"))).size_bytes == 7
    )
    assert StoredAdapter("a", "d", ()).size_bytes == 0
