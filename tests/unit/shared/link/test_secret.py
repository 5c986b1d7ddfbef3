"""Where the link's secret comes from."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from shared.errors import LinkError
from shared.link.secret import KEY_FILE, is_loopback_tcp, link_secret

LOOPBACK = ("tcp://127.0.0.1:7000", "tcp://127.0.0.1:7001")


def test_on_loopback_those_who_share_a_state_dir_have_one_secret(tmp_path: Path) -> None:
    state_dir = tmp_path / "state"
    first = link_secret(None, False, LOOPBACK, state_dir)
    assert first is not None and len(first) >= 32
    assert link_secret(None, False, LOOPBACK, state_dir) == first
    assert link_secret(None, False, LOOPBACK, tmp_path / "other") != first
    assert stat.S_IMODE((state_dir / KEY_FILE).stat().st_mode) == 0o600
    assert [p.name for p in state_dir.iterdir()] == [KEY_FILE]


@pytest.mark.parametrize(
    ("insecure", "endpoints"),
    [(True, LOOPBACK), (False, ("ipc:///run/g0.control",)), (False, ("tcp://10.0.0.1:7000",))],
)
def test_elsewhere_no_secret_is_made(
    insecure: bool, endpoints: tuple[str, ...], tmp_path: Path
) -> None:
    assert link_secret(None, insecure, endpoints, tmp_path) is None
    assert not [*tmp_path.iterdir()]


def test_the_users_own_secret_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINK", "x" * 16)
    assert link_secret("LINK", False, LOOPBACK, tmp_path) == "x" * 16
    monkeypatch.setenv("LINK", "short")
    with pytest.raises(LinkError, match="LINK must hold"):
        link_secret("LINK", False, LOOPBACK, tmp_path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / KEY_FILE).mkdir()
    with pytest.raises(LinkError, match=KEY_FILE):
        link_secret(None, False, LOOPBACK, tmp_path)


@pytest.mark.parametrize("endpoint", ["tcp://localhost:1", "tcp://[::1]:1", "tcp://127.9.9.9:0"])
def test_these_are_loopback(endpoint: str) -> None:
    assert is_loopback_tcp(endpoint)


@pytest.mark.parametrize("endpoint", ["ipc://x", "tcp://0.0.0.0:1", "tcp://host:1", "tcp://[::]:1"])
def test_these_are_not(endpoint: str) -> None:
    assert not is_loopback_tcp(endpoint)
