"""Lines of the access log where stderr cannot be written."""

from __future__ import annotations

import io
import sys

import msgspec
import pytest

from gateway.telemetry.access_log import AccessLog


class Line(msgspec.Struct):
    path: str


class FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError("No space left on device")


async def test_lines_that_cannot_be_written_are_not_kept_and_later_ones_are_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log, room = AccessLog("g0", json_lines=True), io.StringIO()
    monkeypatch.setattr(sys, "stderr", FullDisk())
    log.write(Line("lost"))
    log.flush()
    monkeypatch.setattr(sys, "stderr", room)
    log.write(Line("written"))
    log.flush()
    assert "written" in room.getvalue() and "lost" not in room.getvalue()
