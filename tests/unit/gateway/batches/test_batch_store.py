"""Files and batches that are kept, and for how long and how much."""

from __future__ import annotations

import os
import resource
import tracemalloc
from pathlib import Path

import pytest

from gateway.batches import store as batch_store
from gateway.batches.records import LEAST_KEPT_S, MOST_KEPT_S, BatchStatus, read_lines
from gateway.batches.store import HALF_WRITTEN_S, BatchStore
from shared.errors import BodyTooLarge, ConfigError, FileNotFound

CHAT = "/v1/chat/completions"


@pytest.fixture
def store(tmp_path: Path) -> BatchStore:
    return BatchStore(tmp_path / "batches")


def test_a_file_goes_when_its_time_is_over_and_not_before(store: BatchStore) -> None:
    brief = store.add_file("red", "a", "batch", b"1", LEAST_KEPT_S)
    usual = store.add_file("red", "b", "batch", b"2")
    assert usual.expires_at == usual.created_at + MOST_KEPT_S
    assert store.remove_expired(brief.expires_at - 1) == 0
    assert store.content("red", brief.id) == b"1"
    assert store.remove_expired(brief.expires_at) == 1
    with pytest.raises(FileNotFound):
        store.content("red", brief.id)
    assert [f.id for f in store.files("red")] == [usual.id]
    assert store.remove_expired(usual.expires_at) == 1 and not [*store.files("red")]


def test_a_file_that_an_open_batch_needs_stays_until_the_batch_has_ended(
    store: BatchStore,
) -> None:
    file = store.add_file("red", "a", "batch", b"1", LEAST_KEPT_S)
    batch = store.add_batch("red", CHAT, file.id, None)
    assert store.remove_expired(file.expires_at + 1) == 0
    assert store.content("red", file.id) == b"1"
    store.put(batch.become(BatchStatus.COMPLETED, batch.created_at))
    assert store.remove_expired(file.expires_at + 1) == 1


def test_a_batch_is_forgotten_long_after_its_end_and_its_results_when_it_said(
    store: BatchStore,
) -> None:
    file = store.add_file("red", "a", "batch", b"1")
    batch = store.add_batch("red", CHAT, file.id, None, LEAST_KEPT_S)
    store.append(batch, b'{"custom_id":"1"}\n', failed=False)
    output = store.results_as_file(batch, failed=False)
    assert output is not None
    store.put(batch.become(BatchStatus.COMPLETED, batch.created_at, output_file_id=output))
    assert store.remove_expired(batch.created_at + LEAST_KEPT_S + 1) == 1
    assert [f.id for f in store.files("red")] == [file.id]
    assert store.batch("red", batch.id).status is BatchStatus.COMPLETED
    store.remove_expired(batch.created_at + MOST_KEPT_S + 1)
    assert not [*store.batches("red")] and not [*store.files("red")]


def test_what_a_killed_process_has_half_written_goes(store: BatchStore, tmp_path: Path) -> None:
    file = store.add_file("red", "a", "batch", b"1")
    (known,) = (tmp_path / "batches").glob("*/file-*.jsonl")
    half = known.with_name("file-" + "0" * 24 + ".jsonl")
    half.write_bytes(b"2")
    made = half.stat().st_mtime
    os.utime(known, (made, made))
    store.remove_expired(made + HALF_WRITTEN_S)
    assert half.exists()
    store.remove_expired(made + HALF_WRITTEN_S + 1)
    assert not half.exists() and store.content("red", file.id) == b"1"


def test_an_upload_that_the_disk_has_no_room_for_leaves_nothing_there(
    store: BatchStore, tmp_path: Path
) -> None:
    room_bytes, before = 1000, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room_bytes, before[1]))
    try:
        for _ in range(3):
            with pytest.raises(OSError, match="too large"):
                store.add_file("red", "a", "batch", bytes(2 * room_bytes))
        with pytest.raises(OSError, match="too large"):
            store.add_file("red", "a" * 2 * room_bytes, "batch", b"{}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_batch_does_not_fail_for_a_disk_that_cannot_be_read_now(
    store: BatchStore, tmp_path: Path
) -> None:
    """For the runner a missing file is the end of its batch, and an OSError a pause."""
    file = store.add_file("red", "a", "batch", b"1")
    batch = store.add_batch("red", CHAT, file.id, None)
    for record in tmp_path.glob("batches/*/[fb]*.json"):
        record.unlink()
        record.mkdir()
    with pytest.raises(IsADirectoryError):
        store.content("red", file.id)
    with pytest.raises(ConfigError):
        store.put(batch)
    with pytest.raises(ConfigError):
        list(store.batches("red"))
    assert not store.open_batches()


def test_a_record_that_cannot_be_read_is_logged_once_and_not_at_each_look(
    store: BatchStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = store.add_file("red", "a", "batch", b"1")
    batch = store.add_batch("red", CHAT, file.id, None)
    (record,) = tmp_path.glob(f"batches/*/{batch.id}.json")
    whole = record.read_bytes()
    for _ in range(2):
        caplog.clear()
        record.write_bytes(b"")
        for _ in range(3):
            assert not store.open_batches() and not [*store.batches("red")]
        assert len(caplog.records) == 1
        record.write_bytes(whole)
        assert store.open_batches() == [batch]


def test_a_file_stays_while_it_is_not_known_whether_a_batch_needs_it(
    store: BatchStore, tmp_path: Path
) -> None:
    file = store.add_file("red", "a", "batch", b"1", LEAST_KEPT_S)
    batch = store.add_batch("red", CHAT, file.id, None)
    (record,) = tmp_path.glob(f"batches/*/{batch.id}.json")
    whole = record.rename(tmp_path / "whole")
    record.mkdir()  # as where no more files can be opened
    with pytest.raises(ConfigError):
        store.remove_expired(file.expires_at)
    assert store.content("red", file.id) == b"1"
    record.rmdir()
    whole.write_bytes(b"")  # nobody will ever know
    whole.rename(record)
    assert store.remove_expired(file.expires_at) == 1


def test_results_that_a_killed_process_had_made_files_take_no_room_of_their_own(
    store: BatchStore, tmp_path: Path
) -> None:
    """It was killed after the batch had ended, and before it removed their first name."""
    file = store.add_file("red", "a", "batch", b"1")
    ended, still = (store.add_batch("red", CHAT, file.id, None) for _ in range(2))
    for batch in (ended, still):
        for failed in (False, True):
            store.append(batch, b'{"custom_id":"1"}\n', failed=failed)
    output = store.results_as_file(ended, failed=False)
    store.put(ended.become(BatchStatus.COMPLETED, ended.created_at, output_file_id=output))
    store.remove_expired(ended.created_at)
    assert {path.stem for path in tmp_path.glob("batches/*/batch_*.[!j]*")} == {still.id}
    assert output is not None and store.content("red", output)


@pytest.mark.parametrize("rest", [b'{"custom_id":"2"', b"\0\0\0\n", b'{"custom_id":"2"}\0\n'])
def test_what_is_left_of_a_result_after_a_kill_or_without_power_is_asked_again(
    store: BatchStore, rest: bytes
) -> None:
    batch = store.add_batch("red", CHAT, store.add_file("red", "a", "batch", b"1").id, None)
    store.append(batch, b'{"custom_id":"1"}\n' + rest, failed=False)
    assert store.answered(batch, failed=False) == {"1"}
    store.append(batch, b'{"custom_id":"2"}\n', failed=False)
    assert store.answered(batch, failed=False) == {"1", "2"}


def test_results_are_looked_through_without_being_held(store: BatchStore) -> None:
    """All results of a batch may be larger than memory."""
    batch = store.add_batch("red", CHAT, store.add_file("red", "a", "batch", b"1").id, None)
    for number in range(32):
        result = b'{"custom_id":"%d","response":"%b"}\n' % (number, b"x" * (1 << 20))
        store.append(batch, result, failed=False)
    tracemalloc.start()
    assert len(store.answered(batch, failed=False)) == 32
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held < 8 << 20


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n"])
def test_a_file_is_read_as_editors_write_it(mark: bytes, end: bytes) -> None:
    line = b'{"custom_id": "%d", "url": "/v1/chat/completions", "body": {}}'
    lines, errors = read_lines(mark + end.join(line % n for n in range(3)) + end, CHAT, 1000)
    assert [one.custom_id for one in lines] == ["0", "1", "2"] and not errors


@pytest.mark.parametrize(
    ("path", "stream", "param"),
    [
        ("/v1/chat/completions", b"true", "body.stream"),
        ("/v1/chat/completions", b'"yes"', "body.stream"),
        ("/v1/chat/completions", b'"maybe"', "body"),
        ("/v1/chat/completions", b'"false"', None),
        ("/v1/embeddings", b"true", None),  # which has no such field
    ],
)
def test_a_line_of_a_batch_does_not_stream(path: str, stream: bytes, param: str | None) -> None:
    line = b'{"custom_id": "a", "url": "%b", "body": {"stream": %b}}' % (path.encode(), stream)
    lines, errors = read_lines(line, path, 1000)
    assert [one.param for one in errors] == ([param] if param else [])
    assert len(lines) == (param is None)


def test_a_key_and_all_keys_together_keep_no_more_than_is_allowed(
    store: BatchStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_store, "MAX_FILES", 2)
    store.add_file("red", "a", "batch", b"1")
    store.add_file("red", "b", "batch", b"2")
    with pytest.raises(BodyTooLarge, match="for a key"):
        store.add_file("red", "c", "batch", b"3")
    store.add_file("blue", "a", "batch", b"1" * 100)
    monkeypatch.setattr(batch_store, "MAX_ALL_BYTES", 2000)
    with pytest.raises(BodyTooLarge, match="all keys together"):
        store.add_file("green", "a", "batch", b"1" * 1900)
    store.add_file("green", "a", "batch", b"1")


def test_of_the_batches_that_have_ended_a_key_keeps_only_the_newest(
    store: BatchStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_store, "MAX_BATCHES", 3)
    file = store.add_file("red", "a", "batch", b"1")
    other = store.add_batch("blue", CHAT, store.add_file("blue", "b", "batch", b"1").id, None)
    still = store.add_batch("red", CHAT, file.id, None)
    for n in range(5):
        batch = store.add_batch("red", CHAT, file.id, None)
        store.put(batch.become(BatchStatus.CANCELLED, batch.created_at + n))
        assert len([*store.batches("red")]) <= 3
    assert {b.id for b in store.batches("red")} >= {still.id, batch.id}
    assert {b.id for b in store.open_batches()} == {still.id, other.id}
    assert len([*tmp_path.glob("batches/*/.batch_*.lock")]) <= 4
