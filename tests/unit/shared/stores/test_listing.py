"""Grouping keys into adapters, against a plain model of the same rule."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.adapters.identity import CONFIG_FILE, MAX_NAME_LENGTH, StoredAdapter, StoredFile
from shared.errors import ConfigError
from shared.stores import open_store, parse_bucket_url
from shared.stores.listing import (
    MAX_FILES_PER_ADAPTER,
    Entry,
    Grouping,
    OutOfOrder,
    digest_of,
    group,
    valid_name,
    valid_path,
)


def entries(*keys: str) -> list[Entry]:
    return [Entry(key, len(key), "v1") for key in sorted(keys)]


def streamed(listing: list[Entry]) -> dict[str, StoredAdapter]:
    grouping = Grouping()
    adapters = [a for e in listing for a in grouping.add(e)] + grouping.finish()
    assert len({a.name for a in adapters}) == len(adapters)
    return {a.name: a for a in adapters}


def paths(adapter: StoredAdapter) -> set[str]:
    return {f.path for f in adapter.files}


def test_a_folder_with_a_config_is_an_adapter_at_any_depth() -> None:
    found = streamed(
        entries(
            "a/adapter_config.json",
            "team/x/b/adapter_config.json",
            "team/x/b/w.bin",
            "team/readme.md",
            "loose.txt",
        )
    )
    assert {name: paths(a) for name, a in found.items()} == {
        "a": {CONFIG_FILE},
        "team/x/b": {CONFIG_FILE, "w.bin"},
    }


def test_a_file_belongs_to_the_nearest_enclosing_adapter() -> None:
    found = streamed(
        entries(
            "a/0/x", "a/adapter_config.json", "a/sub/adapter_config.json", "a/sub/deep/y", "a/z"
        )
    )
    assert {name: paths(a) for name, a in found.items()} == {
        "a": {"0/x", CONFIG_FILE, "z"},
        "a/sub": {CONFIG_FILE, "deep/y"},
    }


def test_names_that_sort_around_the_slash_are_kept_apart() -> None:
    found = streamed(
        entries(
            "a-b/adapter_config.json",
            "a.b/adapter_config.json",
            "a/adapter_config.json",
            "a0/adapter_config.json",
            "a/b",
        )
    )
    assert {name: paths(a) for name, a in found.items()} == {
        "a-b": {CONFIG_FILE},
        "a.b": {CONFIG_FILE},
        "a": {CONFIG_FILE, "b"},
        "a0": {CONFIG_FILE},
    }


def test_directory_markers_are_neither_files_nor_counted() -> None:
    adapters, skipped = group(entries("/", "a/", "a/adapter_config.json", "a/sub/", "empty/"))
    assert [paths(a) for a in adapters] == [{CONFIG_FILE}]
    assert skipped.outside_grammar == 0


@pytest.mark.parametrize(
    "key",
    [
        "../a/x",
        "a/../x",
        "/a/x",
        ".hidden/x",
        "a/.git",
        "a//x",
        "a/b c",
        "a/ü",
        "a/x\n",
        "a/x\0",
        "a/b..c",
        "a\\x",
        "a:b/x",
        "a/" + "n" * 256,
    ],
)
def test_a_key_outside_of_the_grammar_is_counted_and_hurts_nobody_else(key: str) -> None:
    adapters, skipped = group([*entries("ok/adapter_config.json"), Entry(key, 1, "v")])
    assert [(a.name, paths(a)) for a in adapters] == [("ok", {CONFIG_FILE})]
    assert skipped.outside_grammar == 1
    assert skipped.example.isprintable() and skipped.example.isascii()
    assert not valid_path(key)


def test_a_config_in_the_root_makes_no_nameless_adapter() -> None:
    assert streamed(entries("adapter_config.json", "w.bin")) == {}


def test_a_name_over_the_cap_is_left_out_and_counted() -> None:
    long = "n" * 120 + "/" + "n" * MAX_NAME_LENGTH
    adapters, skipped = group(entries(f"{long}/{CONFIG_FILE}"))
    assert (adapters, skipped.outside_grammar) == ([], 1)
    assert not valid_name(long)


def test_an_adapter_may_have_as_many_files_as_the_cap_and_not_one_more() -> None:
    full = [f"a/{i:04d}" for i in range(MAX_FILES_PER_ADAPTER - 1)] + [f"a/{CONFIG_FILE}"]
    assert len(streamed(entries(*full))["a"].files) == MAX_FILES_PER_ADAPTER
    adapters, skipped = group(entries(*full, "a/zz", "b/adapter_config.json"))
    assert [a.name for a in adapters] == ["b"]
    assert (skipped.too_many_files, skipped.example) == (1, "'a'")


def test_the_digest_is_the_same_in_any_order_and_differs_by_path_size_version_and_name() -> None:
    one, two = StoredFile("x", 1, "v"), StoredFile("y", 2, "v")
    digest = digest_of("a", [one, two])
    assert len(digest) == 16 and int(digest, 16) >= 0
    assert digest == digest_of("a", [two, one])
    others = [
        digest_of("a", [one]),
        digest_of("a", [one, StoredFile("z", 2, "v")]),
        digest_of("a", [one, StoredFile("y", 3, "v")]),
        digest_of("a", [one, StoredFile("y", 2, "w")]),
        digest_of("b", [one, two]),
    ]
    assert len({digest, *others}) == 6


def test_keys_out_of_order_are_refused_rather_than_split_an_adapter() -> None:
    grouping = Grouping()
    grouping.add(Entry("b/x", 1, "v"))
    with pytest.raises(OutOfOrder):
        grouping.add(Entry("a/x", 1, "v"))


def test_an_adapter_comes_as_soon_as_its_folder_has_ended() -> None:
    grouping = Grouping()
    assert grouping.add(Entry(f"a/{CONFIG_FILE}", 1, "v")) == []
    assert [a.name for a in grouping.add(Entry("b/x", 1, "v"))] == ["a"]


def test_memory_does_not_grow_with_the_number_of_unrelated_files() -> None:
    grouping = Grouping()
    tracemalloc.start()
    try:
        for i in range(30_000):
            grouping.add(Entry(f"data/part/{i:09d}.parquet", i, "v"))
        held_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held_bytes < 200_000


_KEY = st.lists(
    st.sampled_from(["a", "b", "a-b", "a.b", "A", "a0"]), min_size=0, max_size=4
).flatmap(
    lambda folders: st.sampled_from([CONFIG_FILE, "w.safetensors", "0", "zz"]).map(
        lambda name: "/".join([*folders, name])
    )
)


def _model(keys: set[str]) -> dict[str, set[str]]:
    """The rule itself: each file goes to its longest enclosing folder that holds a config."""
    folders = {k.removesuffix("/" + CONFIG_FILE) for k in keys if k.endswith("/" + CONFIG_FILE)}
    result: dict[str, set[str]] = {folder: set() for folder in folders}
    for key in keys:
        owner = max((f for f in folders if key.startswith(f + "/")), key=len, default=None)
        if owner is not None:
            result[owner].add(key.removeprefix(owner + "/"))
    return result


@given(st.sets(_KEY, max_size=60))
def test_grouping_a_stream_agrees_with_the_rule(keys: set[str]) -> None:
    assert {name: paths(a) for name, a in streamed(entries(*keys)).items()} == _model(keys)


@given(st.sets(_KEY, max_size=40), st.randoms())
def test_grouping_without_order_agrees_with_grouping_a_stream(keys: set[str], rng: object) -> None:
    shuffled = entries(*keys)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    assert {a.name: a for a in group(shuffled)[0]} == streamed(entries(*keys))


@given(st.text(max_size=40))
def test_a_path_that_passes_cannot_leave_its_root(text: str) -> None:
    if valid_path(text):
        assert not text.startswith("/") and all(s not in ("", ".", "..") for s in text.split("/"))


def test_bucket_urls_are_split_into_bucket_and_prefix() -> None:
    assert parse_bucket_url("s3://my-bucket") == ("my-bucket", "", False)
    assert parse_bucket_url("s3://my-bucket/a/b") == ("my-bucket", "a/b/", False)
    assert parse_bucket_url("s3://anonymous@my-bucket/a/") == ("my-bucket", "a/", True)


@pytest.mark.parametrize(
    "url",
    [
        "s3://",
        "s3:///x",
        "s3://b?x/y",
        "s3://KEY:hunter2@bucket/x",
        "gs://user@bucket",
        "ftp://h/x",
    ],
)
def test_a_bad_store_url_is_refused_without_quoting_what_may_be_a_secret(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_store(url)
    assert "hunter2" not in caught.value.message


@pytest.mark.parametrize(
    ("url", "options", "param"),
    [
        ("s3://bucket", {"endpont_url": "http://h"}, "endpont_url"),
        ("s3://bucket", {"secret_access_key": "hunter2"}, "secret_access_key"),
        ("s3://bucket", {"anonymous": "hunter2"}, "anonymous"),
        ("s3://bucket", {"endpoint_url": "http://me:hunter2@h"}, "endpoint_url"),
        ("s3://bucket", {"endpoint_url": "hunter2"}, "endpoint_url"),
        ("gs://bucket", {"region": "eu"}, "region"),
        ("/folder", {"endpoint_url": "http://h"}, "endpoint_url"),
    ],
)
def test_a_bad_option_is_refused_by_name_without_quoting_its_value(
    url: str, options: dict[str, object], param: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        open_store(url, options)
    assert caught.value.param == param
    assert "hunter2" not in caught.value.message
