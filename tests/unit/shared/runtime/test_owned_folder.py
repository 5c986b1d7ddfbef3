"""A folder of one's own has room for sockets, however long the name of the temporary folder is."""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path

import pytest

from shared.runtime.owned_folder import temporary_folder


def test_a_socket_fits_below_a_temporary_folder_with_a_long_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with temporary_folder() as folder, socket.socket(socket.AF_UNIX) as s:
        s.bind(str(folder / "supervisor.sock"))
    assert not folder.exists()
