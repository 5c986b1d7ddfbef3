"""A batch asks nothing while there is no room for its results."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from gateway.accounts.account import ANONYMOUS
from gateway.batches import runner as batch_runner
from gateway.batches import store as batch_store
from gateway.batches.records import Batch, BatchStatus
from gateway.batches.runner import BatchRunner
from gateway.batches.store import BatchStore
from shared.errors import BodyTooLarge
from tests.unit.gateway.api.test_no_reference_cycles import services_in

PATH = "/v1/completions"
LINE = b'{"custom_id":"1","url":"/v1/completions","body":{"model":"base","prompt":"hello"}}'


async def until(is_so: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not is_so():
            await asyncio.sleep(0)


async def test_a_batch_without_room_waits_and_says_so_and_goes_on_once_there_is_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for pause in ("LOOK_S", "ROOM_S"):
        monkeypatch.setattr(batch_runner, pause, 0.01)
    services, store = services_in(tmp_path), BatchStore(tmp_path / "batches")
    owner = ANONYMOUS.name
    batch = store.add_batch(owner, PATH, store.add_file(owner, "a", "batch", LINE).id, None)
    monkeypatch.setattr(batch_store, "MAX_KEPT_BYTES", 10)
    running = asyncio.create_task(BatchRunner(store, services).run())
    await until(lambda: store.batch(owner, batch.id).errors)
    (error,) = store.batch(owner, batch.id).errors
    assert (error.code, "delete some" in error.message) == (BodyTooLarge.code, True)
    assert store.batch(owner, batch.id).status is BatchStatus.IN_PROGRESS
    assert not services.dispatcher.open_requests
    monkeypatch.undo()
    monkeypatch.setattr(batch_runner, "LOOK_S", 0.01)
    await until(lambda: services.dispatcher.open_requests)
    await until(lambda: not store.batch(owner, batch.id).errors)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


class LookedAt(BatchStore):
    """Counts the looks for open batches, and those for room."""

    looks = looks_for_room = 0

    def open_batches(self, *, or_raise: bool = False) -> list[Batch]:
        self.looks += 1
        return super().open_batches(or_raise=or_raise)

    def full(self, owners: Iterable[str], more_bytes: int = 0) -> dict[str, BodyTooLarge]:
        self.looks_for_room += 1
        return super().full(owners, more_bytes)


async def test_while_no_batch_runs_nobody_looks_for_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the files of twenty keys a look took 0.7 s of CPU time, every 5 s."""
    for pause in ("LOOK_S", "ROOM_S"):
        monkeypatch.setattr(batch_runner, pause, 0.0)
    store = LookedAt(tmp_path / "batches")
    running = asyncio.create_task(BatchRunner(store, services_in(tmp_path)).run())
    await until(lambda: store.looks > 20)
    assert not store.looks_for_room
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


def test_results_count_before_they_are_files_and_once_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = BatchStore(tmp_path / "batches")
    batch = store.add_batch("red", PATH, store.add_file("red", "a", "batch", LINE).id, None)
    store.append(batch, b"x" * 5000, failed=False)
    monkeypatch.setattr(batch_store, "MAX_KEPT_BYTES", 7000)
    assert not store.full(("red", "blue"))
    assert [*store.full(("red", "blue"), 4000)] == ["red"]
    with pytest.raises(BodyTooLarge):
        store.add_file("red", "b", "batch", b"x" * 4000)
    store.results_as_file(batch, failed=False)
    assert not store.full(("red",))
    store.add_file("blue", "b", "batch", b"x" * 4000)
