"""A folder of one's own has room for sockets, however long the name of the temporary folder is."""

from __future__ import annotations

import socket
import tempfile

import pytest

from shared.runtime.owned_folder import temporary_folder


@pytest.mark.parametrize("letter", ["x", "本"])
def test_a_socket_fits_below_a_temporary_folder_with_a_long_name(
    monkeypatch: pytest.MonkeyPatch, letter: str
) -> None:
    """It is long in bytes: of the second letter three."""
    with tempfile.TemporaryDirectory(prefix=letter * (75 // len(letter.encode()))) as long:
        monkeypatch.setattr(tempfile, "tempdir", long)
        with temporary_folder() as folder, socket.socket(socket.AF_UNIX) as s:
            s.bind(str(folder / "supervisor.sock"))
        assert not folder.exists()
