"""Shell. What a host answers that is asked for a piece, while the files are on the move."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from shared.adapters.identity import AdapterRef
from shared.link.peer_messages import Piece, PieceNotHere, PieceRequest
from worker.disk.cache import CachedOnDisk
from worker.peers import peer_rules, server

A = AdapterRef("m", "a", "d")
WANT = PieceRequest(1, A, "w", 0, 6)


class Disk:
    """Says of the adapter what `looks` say, one look after the other, the last one for ever."""

    def __init__(self, *looks: Callable[[], CachedOnDisk | None]) -> None:
        self.looks = list(looks)

    def cached_on_disk(self, ref: AdapterRef) -> CachedOnDisk | None:
        return self.looks.pop(0)() if len(self.looks) > 1 else self.looks[0]()


async def answer(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Each look takes a tenth of a second of the server's clock."""
    time = iter(range(10_000))
    monkeypatch.setattr(server, "clock", lambda: next(time) / 10)
    monkeypatch.setattr(server, "LOOK_S", 0.0)
    monkeypatch.setattr(server.time, "time", lambda: 1000.0)
    made = object.__new__(server._PeerServer)
    made._cache, made._threads = disk, ThreadPoolExecutor(1)  # type: ignore[assignment]
    made._known, made._looks = OrderedDict(), {}
    async with asyncio.timeout(60):
        return await made._found(WANT)


@pytest.mark.parametrize("gone", [1, 2])
async def test_a_part_that_was_waited_for_is_given_though_its_files_move_just_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: int
) -> None:
    (tmp_path / "entry").mkdir()
    (tmp_path / "entry" / "w").write_bytes(b"values")
    coming = CachedOnDisk(tmp_path / "partial", {}, 1000.0)
    moved = CachedOnDisk(tmp_path / "partial", {("w", 0): "h"}, 1000.0)
    there = CachedOnDisk(tmp_path / "entry", {("w", 0): "h"}, None)
    waited = [lambda: coming] * int(peer_rules.GRACE_S * 10 + 3)
    for between in (lambda: None, lambda: moved):
        disk = Disk(*waited, *[between] * gone, lambda: there)
        assert await answer(disk, monkeypatch) == Piece(1, "h", b"values")


async def test_one_that_nobody_downloads_is_said_to_be_missing_after_the_grace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert await answer(Disk(lambda: None), monkeypatch) == PieceNotHere(1)


@pytest.mark.parametrize("set_by_s", [-3600.0, 3600.0])
async def test_a_download_that_last_moved_before_the_clock_was_set_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, set_by_s: float
) -> None:
    still = CachedOnDisk(Path("partial"), {}, 1000.0 - set_by_s)
    assert await answer(Disk(lambda: still), monkeypatch) == PieceNotHere(1)
