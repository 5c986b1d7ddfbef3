"""Shell. The secret that keys the link: the user's own, or one for the processes of this machine.

A TCP port on loopback is open to every user and container of the host. If the user gives no secret,
gateway and workers that share a `state_dir` use one from a file in it. No other user can read that
file. Whichever process comes first makes it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from shared.errors import LinkError

KEY_FILE = "link.key"
MIN_CHARACTERS = 16


def link_secret(
    secret_env: str | None, insecure: bool, endpoints: Sequence[str], state_dir: Path
) -> str | None:
    """The link's secret. None if the link is ipc, or is meant to have none.

    Raises LinkError if the variable is named but empty, or if the file cannot be made or read.
    """
    if secret_env:
        return _from_env(secret_env)
    if insecure or not any(is_loopback_tcp(endpoint) for endpoint in endpoints):
        return None
    path = state_dir / KEY_FILE
    try:
        _make(path)
        return path.read_text()
    except OSError as exc:
        raise LinkError(
            f"{path}: {exc.strerror}; it holds the secret of the link on loopback. Make it "
            "readable for this user, or set gateway.link.secret_env"
        ) from exc


def is_loopback_tcp(endpoint: str) -> bool:
    if not endpoint.startswith("tcp://"):
        return False
    host = endpoint.removeprefix("tcp://").rsplit(":", 1)[0].strip("[]")
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _make(path: Path) -> None:
    """Writes the file aside and links it to its name, so that nobody reads half a secret."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    aside = path.with_name(f".{KEY_FILE}-{os.getpid()}")
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(fd, "w") as file:
            file.write(secrets.token_urlsafe(32))
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _from_env(name: str) -> str:
    value = os.environ.get(name, "")
    if len(value) < MIN_CHARACTERS:
        raise LinkError(
            f"the environment variable {name} must hold the link's shared secret, at least "
            f"{MIN_CHARACTERS} characters"
        )
    return value
