"""YAML text to plain values: every key with its line, every surprise of YAML refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.config.document.yaml_document import MAX_CHARS, Document, read_document


def read(text: str) -> Document:
    return read_document(text, "f.yaml")


def problem(text: str) -> str:
    (only,) = read(text).problems
    return only


def test_every_key_and_item_has_its_line() -> None:
    document = read("a: 1\nb:\n  c: x\n  d:\n    - 1\n    - e: 2\n")
    assert document.value == {"a": 1, "b": {"c": "x", "d": [1, {"e": 2}]}}
    assert document.lines[("b", "c")] == 3 and document.lines[("b", "d", 1, "e")] == 6
    assert not document.problems


def test_scalars_are_read_as_yaml_has_them_and_dates_stay_text() -> None:
    text = "[1, 0x10, 1.5, .inf, true, off, null, ~, '1', 2024-01-01, 1_000]"
    assert read(text).value == [
        1,
        16,
        1.5,
        float("inf"),
        True,
        False,
        None,
        None,
        "1",
        "2024-01-01",
        1000,
    ]


def test_a_key_given_twice_is_refused_with_both_lines() -> None:
    assert (
        problem("a:\n  b: 1\n  c: 2\n  b: 3\n")
        == "f.yaml:4: a.b: the key stands twice (first in line 2); remove one"
    )


def test_aliases_and_merge_keys_work_and_own_keys_win() -> None:
    document = read("x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}\nz: {<<: [{a: 5}, *x]}\nw: *x\n")
    assert not document.problems
    assert document.value == {
        "x": {"a": 1, "b": 2},
        "y": {"a": 1, "b": 3},
        "z": {"a": 5, "b": 2},
        "w": {"a": 1, "b": 2},
    }


def test_json_may_be_indented_with_tabs() -> None:
    assert read('{\n\t"a": [\n\t\t"b"\n\t]\n}\n').value == {"a": ["b"]}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: [1", "f.yaml:1: not valid YAML"),
        ("a: 1\n\tb: 2", "f.yaml:2: not valid YAML"),
        ("a:\n\t- 2", "indent with spaces, not with tabs"),
        ("a: {b: ${C}}", "put ${...} in quotes"),
        ("a: {{ .Values.a }}", "a: expected a key that is text; is {{ ... }} of a template"),
        ("a: 1\n---\nb: 2", "f.yaml:3: a second document begins here"),
        ("a: \x00", "not valid YAML"),
        (
            "a: !!python/object/apply:os.system [ls]",
            "f.yaml:1: a: the tag python/object/apply:os.system is not supported",
        ),
        ("a: !secret x", "the tag the text '!secret' is not supported"),
        ("a: !!int x", "f.yaml:1: a: the text 'x' cannot be read as YAML's int"),
        ("a: !!bool perhaps", "cannot be read as YAML's bool"),
        ("a: !!binary aGk=", "the text 'binary' is not supported"),
        ("1: a", "expected a key that is text"),
        ("? [a]\n: b", "expected a key that is text"),
        ('a: "\\ud800"', "surrogate"),
        ("a: &a [*a]", "too large or too deep"),
        ("a: &a {<<: *a}", "<< takes a mapping"),
        ("a: {<<: 3}", "<< takes a mapping"),
        ('a: "\\UFFFFFFFF"', "a malformed number, escape or directive"),
        ("[" * 3000, "nested too deeply"),
        ("a: " + "x" * MAX_CHARS, "is larger than"),
    ],
)
def test_what_is_no_configuration_is_a_problem_with_its_place(text: str, part: str) -> None:
    assert part in read(text).problems[0]


def test_aliases_cannot_grow_a_small_file_without_end() -> None:
    text = "a0: &a0 [1, 1]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
    )
    assert "too large or too deep" in problem(text)


_YAMLISH = st.text(alphabet=st.sampled_from("ab:-[]{},\n \"'&*!<>|%@`#?~01.e_\\x\t"), max_size=60)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=80), _YAMLISH))
def test_no_text_makes_the_reader_raise(text: str) -> None:
    document = read_document(text, "f.yaml")
    assert all(line.startswith("f.yaml") for line in document.problems)
