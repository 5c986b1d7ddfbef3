"""Grouping keys into adapters, against a plain model of the same rule."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.adapters.identity import (
    CONFIG_FILE,
    MAX_NAME_LENGTH,
    WEIGHTS_FILE,
    StoredAdapter,
    StoredFile,
)
from shared.errors import ConfigError
from shared.stores import open_store
from shared.stores.bucket import parse_bucket_url
from shared.stores.listing import (
    MAX_FILES_PER_ADAPTER,
    MAX_SHOWN,
    Entry,
    Grouping,
    OutOfOrder,
    Skipped,
    SkipReason,
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
            "team/x/b/adapter_model.safetensors",
            "team/x/b/optimizer.pt",
            "team/readme.md",
            "loose.txt",
        )
    )
    assert {name: paths(a) for name, a in found.items()} == {
        "a": {CONFIG_FILE},
        "team/x/b": {CONFIG_FILE, WEIGHTS_FILE},
    }


def test_an_adapter_is_its_config_and_its_weights_whatever_lies_beside_or_below() -> None:
    shards = [f"adapter_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = f"{WEIGHTS_FILE}.index.json"
    found = streamed(
        entries(
            *(f"a/{n}" for n in (CONFIG_FILE, WEIGHTS_FILE, "adapter_model.bin", *shards)),
            "a/optimizer.pt",
            "a/global_step5/adapter_model.safetensors",
            *(f"a/samples/{i}.json" for i in range(2 * MAX_FILES_PER_ADAPTER)),
            *(f"a/checkpoint-5/{n}" for n in (CONFIG_FILE, index, *shards, "rng_state.pth")),
            *(f"pickled/{n}" for n in (CONFIG_FILE, "adapter_model.bin", "training_args.bin")),
        )
    )
    assert {name: paths(a) for name, a in found.items()} == {
        "a": {CONFIG_FILE, WEIGHTS_FILE},
        "a/checkpoint-5": {CONFIG_FILE, index, *shards},
        "pickled": {CONFIG_FILE, "adapter_model.bin"},  # to be refused by name
    }


def test_what_lies_beside_an_adapter_does_not_change_its_version() -> None:
    own = [f"a/{n}" for n in (CONFIG_FILE, WEIGHTS_FILE)]
    one, other = streamed(entries(*own)), streamed(entries(*own, "a/README.md", "a/b c.txt"))
    assert one == other


def test_names_that_sort_around_the_slash_are_kept_apart() -> None:
    found = streamed(
        entries(
            "a-b/adapter_config.json",
            "a.b/adapter_config.json",
            "a/adapter_config.json",
            "a0/adapter_config.json",
            f"a/{WEIGHTS_FILE}",
        )
    )
    assert {name: paths(a) for name, a in found.items()} == {
        "a-b": {CONFIG_FILE},
        "a.b": {CONFIG_FILE},
        "a": {CONFIG_FILE, WEIGHTS_FILE},
        "a0": {CONFIG_FILE},
    }


def test_directory_markers_are_neither_files_nor_counted() -> None:
    adapters, skipped = group(entries("/", "a/", "a/adapter_config.json", "a/sub/", "empty/"))
    assert [paths(a) for a in adapters] == [{CONFIG_FILE}]
    assert skipped == Skipped()


@pytest.mark.parametrize(
    "folder",
    [
        "../a",
        "a/..",
        "/a",
        ".hidden",
        "a/.git",
        "a/",
        "a/b@c",
        "a/ b",
        "a/x\n",
        "a/x\0",
        "a/b..c",
        "a\\x",
        "a/" + "é" * 130,
    ],
)
def test_a_key_outside_of_the_grammar_is_counted_and_hurts_nobody_else(folder: str) -> None:
    key = f"{folder}/{CONFIG_FILE}"
    adapters, skipped = group([*entries("ok/adapter_config.json"), Entry(key, 1, "v")])
    assert [(a.name, paths(a)) for a in adapters] == [("ok", {CONFIG_FILE})]
    assert skipped.counts == ((SkipReason.NAME, 1),)
    assert skipped.shown[0].key.isprintable() and skipped.why(folder)
    assert not valid_path(key)


def test_a_config_in_the_root_makes_no_nameless_adapter() -> None:
    assert streamed(entries("adapter_config.json", "w.bin")) == {}


def test_a_name_over_the_cap_is_left_out_and_counted() -> None:
    long = "n" * 120 + "/" + "n" * MAX_NAME_LENGTH
    adapters, skipped = group(entries(f"{long}/{CONFIG_FILE}"))
    assert (adapters, skipped.counts) == ([], ((SkipReason.NAME, 1),))
    assert not valid_name(long)


def shard(number: int) -> str:
    return f"a/adapter_model-{number:05d}-of-01000.safetensors"


def test_an_adapter_may_have_as_many_files_as_the_cap_and_not_one_more() -> None:
    full = [shard(i) for i in range(MAX_FILES_PER_ADAPTER - 2)]
    full += [f"a/{CONFIG_FILE}", f"a/{WEIGHTS_FILE}.index.json"]
    assert len(streamed(entries(*full))["a"].files) == MAX_FILES_PER_ADAPTER
    adapters, skipped = group(entries(*full, shard(999), "b/adapter_config.json"))
    assert [a.name for a in adapters] == ["b"]
    assert (skipped.total, skipped.why("a")) == (1, "it has more than 256 files")


def test_of_many_skipped_folders_all_are_counted_and_the_first_are_shown() -> None:
    keys = [f"a@{i:04d}/{name}" for i in range(300) for name in (CONFIG_FILE, WEIGHTS_FILE)]
    _, skipped = group(entries(*keys))
    assert skipped.total == 300 and len(skipped.shown) == MAX_SHOWN


def test_only_a_folder_that_nobody_has_looked_into_hides_what_lies_below() -> None:
    grouping = Grouping()
    grouping.skip("closed", SkipReason.UNREADABLE)
    grouping.skip("full", SkipReason.TOO_MANY_FILES)
    why = grouping.skipped.why
    assert why("closed/a") == why("closed") != "" != why("full")
    assert why("full/a") == why("closed-too") == ""


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
    grouping.add(Entry(f"b/{CONFIG_FILE}", 1, "v"))
    with pytest.raises(OutOfOrder):
        grouping.add(Entry(f"a/{CONFIG_FILE}", 1, "v"))


def test_keys_that_follow_no_one_order_are_refused() -> None:
    grouping = Grouping()
    for folder in ("a", "a-b"):  # by folders
        grouping.add(Entry(f"{folder}/{CONFIG_FILE}", 1, "v"))
    with pytest.raises(OutOfOrder):  # from here on by characters
        grouping.add(Entry(f"a/{WEIGHTS_FILE}", 1, "v"))


def test_an_adapter_comes_as_soon_as_its_folder_has_ended() -> None:
    grouping = Grouping()
    assert grouping.add(Entry(f"a/{CONFIG_FILE}", 1, "v")) == []
    assert [a.name for a in grouping.add(Entry(f"b/{CONFIG_FILE}", 1, "v"))] == ["a"]


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
    lambda folders: st.sampled_from([CONFIG_FILE, WEIGHTS_FILE, "0", "zz"]).map(
        lambda name: "/".join([*folders, name])
    )
)


def _model(keys: set[str]) -> dict[str, set[str]]:
    """The rule itself: a folder with a config, and its weights if it has any."""
    folders = {k.removesuffix("/" + CONFIG_FILE) for k in keys if k.endswith("/" + CONFIG_FILE)}
    return {
        folder: {n for n in (CONFIG_FILE, WEIGHTS_FILE) if f"{folder}/{n}" in keys}
        for folder in folders
    }


@given(st.sets(_KEY, max_size=60))
def test_grouping_a_stream_agrees_with_the_rule(keys: set[str]) -> None:
    assert {name: paths(a) for name, a in streamed(entries(*keys)).items()} == _model(keys)


@given(st.sets(_KEY, max_size=60))
def test_a_store_that_lists_each_folder_before_its_neighbours_agrees_too(keys: set[str]) -> None:
    by_folders = sorted(entries(*keys), key=lambda entry: entry.key.split("/"))
    assert {name: paths(a) for name, a in streamed(by_folders).items()} == _model(keys)


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
    for point in (
        "arn:aws:s3:us-west-2:123456789012:accesspoint/ours",
        "arn:aws-cn:s3:cn-north-1:123456789012:accesspoint:ours",
        "arn:aws:s3-outposts:us-west-2:123456789012:outpost/op-1/accesspoint/ours",
    ):
        assert parse_bucket_url(f"s3://{point}") == (point, "", False)
        assert parse_bucket_url(f"s3://{point}/a/b") == (point, "a/b/", False)


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
