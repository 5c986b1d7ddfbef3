"""Shell. Who may call what: API keys for clients, admin keys for operators. Keys are kept and
compared as digests.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from shared.config.gateway import is_loopback
from shared.config.llm import GatewayConfig
from shared.errors import ConfigError, Forbidden, InvalidApiKey


@dataclass(frozen=True, slots=True)
class Keys:
    """SHA-256 digests of the accepted keys; no API keys means that clients are asked for none.

    `local`: only this machine reaches the gateway; without admin keys that, and an API key where
    there are any, is what operators need.
    """

    api: frozenset[bytes] = frozenset()
    admin: frozenset[bytes] = frozenset()
    local: bool = True

    def check(self, authorization: str) -> None:
        """Raises InvalidApiKey. `authorization` is the header's value."""
        if self.api and _digest(authorization) not in self.api:
            raise InvalidApiKey("Missing or wrong API key; send `Authorization: Bearer KEY`.")

    def check_admin(self, authorization: str) -> None:
        """Raises InvalidApiKey, or Forbidden where another key would not help or an ordinary one
        does not suffice.
        """
        if self.admin:
            given = _digest(authorization)
            if given in self.admin:
                return
            if given in self.api:
                raise Forbidden(
                    "An ordinary API key does not suffice here; send one of "
                    "gateway.admin_keys_env or admin_keys_file."
                )
            raise InvalidApiKey("Missing or wrong admin key; send `Authorization: Bearer KEY`.")
        if not self.local:
            raise Forbidden(
                "This gateway is reachable from other machines and has no admin keys: "
                "set gateway.admin_keys_env or admin_keys_file."
            )
        self.check(authorization)


def read_keys(gateway: GatewayConfig) -> Keys:
    """Raises ConfigError where keys are asked for and none are given."""
    api = _read("api_keys", gateway.api_keys_env, gateway.api_keys_file)
    admin = _read("admin_keys", gateway.admin_keys_env, gateway.admin_keys_file)
    return Keys(api, admin, is_loopback(gateway.host))


def _digest(authorization: str) -> bytes | None:
    """Digests are compared, so the time taken says nothing about a key's characters."""
    kind, _, key = authorization.partition(" ")
    return hashlib.sha256(key.strip().encode()).digest() if kind.lower() == "bearer" else None


def _read(what: str, variable: str | None, file: str | None) -> frozenset[bytes]:
    keys: list[str] = []
    if variable:
        keys += os.environ.get(variable, "").split(",")
    if file:
        try:
            keys += Path(file).expanduser().read_text().splitlines()
        except OSError as exc:
            raise ConfigError(f"gateway.{what}_file: cannot read {file}: {exc.strerror}") from exc
    found = frozenset(hashlib.sha256(k.strip().encode()).digest() for k in keys if k.strip())
    if (variable or file) and not found:
        raise ConfigError(
            f"keys are asked for (gateway.{what}_env or {what}_file) but none are "
            "given; nobody could call what they protect"
        )
    return found
