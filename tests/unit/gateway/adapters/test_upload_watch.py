"""Halves of uploads are not taken for versions."""

from __future__ import annotations

import itertools

from gateway.adapters.upload_watch import UploadWatch
from shared.adapters.identity import StoredAdapter, StoredFile

SETTLE_S = 12.0


def version(config: int, weights: int) -> StoredAdapter:
    files = [StoredFile("adapter_config.json", 5, f"c{config}")]
    if weights:
        files.append(StoredFile("adapter_model.safetensors", 9, f"w{weights}"))
    return StoredAdapter("a", f"{config}-{weights}", tuple(files))


OLD, NEW = version(1, 1), version(2, 2)


def test_an_adapter_that_nobody_had_seen_is_there_at_once() -> None:
    assert UploadWatch(SETTLE_S).look(None, NEW, 0.0) == NEW


def test_a_version_of_which_every_file_is_another_is_there_at_once() -> None:
    assert UploadWatch(SETTLE_S).look(OLD, NEW, 0.0) == NEW


def test_half_of_an_upload_is_never_taken_whichever_file_comes_first() -> None:
    for half in (version(2, 1), version(1, 2)):
        settling = UploadWatch(SETTLE_S)
        seen = [settling.look(OLD, half, now) for now in (0.0, 4.0, SETTLE_S - 0.1)]
        assert seen == [OLD] * 3
        assert settling.look(OLD, NEW, SETTLE_S + 1) == NEW


def test_a_change_of_one_file_that_nothing_follows_is_taken_after_a_while() -> None:
    settling = UploadWatch(SETTLE_S)
    assert settling.look(OLD, version(2, 1), 0.0) == OLD
    assert settling.look(OLD, version(2, 1), SETTLE_S) == version(2, 1)


def test_every_further_change_begins_the_wait_anew() -> None:
    settling = UploadWatch(SETTLE_S)
    for n, now in zip(itertools.count(2), range(0, 60, 5), strict=False):
        assert settling.look(OLD, version(n, 1), float(now)) == OLD


def test_a_change_taken_back_is_forgotten() -> None:
    settling = UploadWatch(SETTLE_S)
    settling.look(OLD, version(2, 1), 0.0)
    assert settling.look(OLD, OLD, 5.0) == OLD
    assert settling.look(OLD, version(2, 1), SETTLE_S) == OLD


def test_of_an_adapter_that_is_gone_nothing_is_kept() -> None:
    settling = UploadWatch(SETTLE_S)
    settling.look(OLD, version(2, 1), 0.0)
    settling.keep(set())
    assert settling.look(OLD, version(2, 1), SETTLE_S) == OLD


def test_while_an_adapter_has_no_weights_its_last_whole_version_is_remembered() -> None:
    settling, bare = UploadWatch(SETTLE_S), version(1, 0)
    assert settling.look(OLD, bare, 0.0) == OLD
    assert settling.look(OLD, bare, SETTLE_S) == bare == settling.look(bare, bare, 2 * SETTLE_S)
    last = settling.last("a")
    assert last == OLD
    assert settling.look(last, version(1, 2), 3 * SETTLE_S) == OLD
    assert settling.look(last, NEW, 3 * SETTLE_S + 1) == NEW
    assert settling.last("a") is None
