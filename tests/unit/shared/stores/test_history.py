"""The older versions of an adapter, told from the object versions that a bucket keeps."""

from __future__ import annotations

import itertools
import time

import pytest

from shared.stores.history import MAX_OBJECT_VERSIONS, ObjectVersion, choose_state, states
from shared.stores.listing import Entry

CONFIG, WEIGHTS = "a/adapter_config.json", "a/adapter_model.safetensors"


def put(since: float, key: str, tag: str) -> ObjectVersion:
    return ObjectVersion(since, key, f"id-{tag}", Entry(key, 1, tag))


def seen(*objects: ObjectVersion) -> list[dict[str, str]]:
    """The states, the newest first: file -> tag. Stores list the newest version first."""
    return [
        {file.path: file.version for file in adapter.files}
        for adapter, _ in states("a", reversed(objects))
    ]


def files(config: str, weights: str = "") -> dict[str, str]:
    found = {"adapter_config.json": config}
    return found | ({"adapter_model.safetensors": weights} if weights else {})


def test_each_step_of_an_upload_is_a_state() -> None:
    assert seen(
        put(1, WEIGHTS, "w1"), put(2, CONFIG, "c1"), put(8, CONFIG, "c2"), put(9, WEIGHTS, "w2")
    ) == [files("c2", "w2"), files("c2", "w1"), files("c1", "w1")]


def test_uploads_within_one_second_are_told_apart_and_not_mixed() -> None:
    within = [put(5, CONFIG, "c1"), put(5, CONFIG, "c2"), put(5, WEIGHTS, "w1")]
    assert seen(*within, put(5, WEIGHTS, "w2")) == [files("c2", "w2"), files("c1", "w1")]


def test_what_is_deleted_is_gone_until_it_is_put_again() -> None:
    deleted = ObjectVersion(3, CONFIG, "", None)
    assert seen(put(1, CONFIG, "c1"), put(2, WEIGHTS, "w1"), deleted, put(4, CONFIG, "c2")) == [
        files("c2", "w1"),
        files("c1", "w1"),
        files("c1"),
    ]


def test_the_end_of_a_generation_takes_nothing_from_the_one_that_replaced_it() -> None:
    ended = ObjectVersion(2.001, WEIGHTS, "id-w1", None)
    assert seen(put(1, WEIGHTS, "w1"), put(1.5, CONFIG, "c"), put(2, WEIGHTS, "w2"), ended)[
        0
    ] == files("c", "w2")


def test_other_folders_and_bystanders_are_no_part_of_a_state() -> None:
    others = [put(3, "a/README.md", "r"), put(4, "a/b/adapter_config.json", "x"), put(5, "ab", "y")]
    assert seen(put(1, CONFIG, "c"), put(2, WEIGHTS, "w"), *others) == [
        files("c", "w"),
        files("c"),
    ]


def test_a_state_is_chosen_by_its_digest_or_the_begin_of_it() -> None:
    objects = [put(4, CONFIG, "c2"), put(1, CONFIG, "c1"), put(2, WEIGHTS, "w1")]
    newest, older, _ = [adapter for adapter, _ in states("a", objects)]
    assert choose_state("a", objects, newest.digest) == newest
    assert choose_state("a", objects, older.digest[:8]) == older
    assert choose_state("a", objects, "nobody") is None


SHARDS = [f"a/adapter_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
INDEX = "a/adapter_model.safetensors.index.json"


@pytest.mark.parametrize("order", list(itertools.permutations([CONFIG, INDEX, *SHARDS])))
def test_an_object_s_id_names_the_state_that_it_was_uploaded_with_whatever_came_between(
    order: tuple[str, ...],
) -> None:
    """Three uploads, hours apart, whose files come one by one in any order."""
    objects = [
        put(10_000 * upload + 100 * n, key, f"{upload}{key}")
        for upload in range(3)
        for n, key in enumerate(order)
    ]
    for upload in range(3):
        for key in order:
            found = choose_state("a", reversed(objects), f"id-{upload}{key}")
            assert found is not None
            assert {file.version for file in found.files} == {f"{upload}{k}" for k in order}


def test_a_replaced_config_leaves_an_object_s_id_with_the_state_of_its_upload() -> None:
    uploaded = [put(2, WEIGHTS, "w1"), put(1, CONFIG, "c1")]
    found = choose_state("a", [put(9, CONFIG, "c2"), *uploaded], "id-w1")
    assert found == choose_state("a", uploaded, "id-w1") is not None


def test_an_adapter_of_many_files_with_many_versions_is_quickly_looked_through() -> None:
    """Anybody who may use it can ask for a version that it does not have, again and again."""
    shards = [f"a/adapter_model-{n:05d}-of-00250.safetensors" for n in range(250)]
    keys = [CONFIG, INDEX, *shards]
    objects = [put(at, keys[at % 252], f"{at}") for at in range(MAX_OBJECT_VERSIONS)]
    newest, *_ = [adapter for adapter, _ in states("a", reversed(objects))]
    began = time.thread_time()
    assert choose_state("a", objects[::-1], "nobody") is None
    assert time.thread_time() - began < 1.5
    assert choose_state("a", objects[::-1], newest.digest) == newest
    assert len(newest.files) == 252


def test_all_versions_of_an_adapter_of_two_files_are_looked_through() -> None:
    objects = [put(at, (CONFIG, WEIGHTS)[at % 2], f"{at}") for at in range(MAX_OBJECT_VERSIONS)]
    assert len(seen(*objects)) == MAX_OBJECT_VERSIONS
