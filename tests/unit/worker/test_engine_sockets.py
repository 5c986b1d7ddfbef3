"""Where vLLM's sockets lie: it never removes them, so somebody else must."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from worker.__main__ import engine_sockets

VARIABLE = "VLLM_RPC_BASE_PATH"


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")  # so that what the code sets is undone as well
    monkeypatch.delenv(VARIABLE)


def test_a_worker_of_serve_has_them_in_the_run_folder_which_serve_removes() -> None:
    with engine_sockets("/tmp/loraplex-x/loraplex.settings.json"):
        assert os.environ[VARIABLE] == "/tmp/loraplex-x"


def test_a_worker_by_itself_has_them_in_a_folder_that_ends_with_it() -> None:
    with engine_sockets("config.yaml"):
        folder = Path(os.environ[VARIABLE])
        (folder / "socket").touch()
    assert not folder.exists()


def test_a_folder_whose_path_is_too_long_for_a_socket_is_not_used() -> None:
    with engine_sockets(f"/tmp/{'x' * 70}/loraplex.settings.json"):
        assert VARIABLE not in os.environ


def test_the_users_own_choice_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "/mine")
    with engine_sockets("config.yaml"):
        assert os.environ[VARIABLE] == "/mine"
