"""Shell. The keys of one gateway process. They are read at the start, and again when a file
changes. Every request is checked against them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from pathlib import Path

from gateway.accounts import key_file
from gateway.accounts.account import Account
from gateway.accounts.key_ring import KeyRing, digest_of, plain_accounts
from shared.config.gateway import GatewayConfig, is_loopback
from shared.errors import ConfigError
from shared.runtime.state_file import Stamp, stamp_of

log = logging.getLogger("loraplex.keys")

POLL_S = 0.5
"""A changed file is noticed within this time."""
OPEN_RING = KeyRing()


class Keys:
    """Says who may call what. `ring` is replaced as a whole, so each request sees one consistent
    state.
    """

    def __init__(self, gateway: GatewayConfig | None = None, ring: KeyRing = OPEN_RING) -> None:
        self._gateway = gateway
        self.ring = ring if gateway is None else read_ring(gateway)
        self._seen = self._stamps()
        self._told = ""

    def account_of(self, authorization: str) -> Account:
        """The account behind the value of an Authorization header. Raises InvalidApiKey."""
        return self.ring.account_of(authorization, time.time())

    def check_admin(self, authorization: str) -> None:
        """Raises InvalidApiKey or Forbidden."""
        self.ring.check_admin(authorization, time.time())

    async def run(self) -> None:
        """Follows the files. While one cannot be read, the keys stay as they were."""
        while True:
            await asyncio.sleep(POLL_S)
            self.look()

    def look(self) -> None:
        """Reads the files again if one of them has changed. One that could not be opened is tried
        again with the next look: its revoked keys must not stay because descriptors were short.
        """
        stamps = self._stamps()
        if stamps == self._seen or self._gateway is None:
            return
        try:
            self.ring = read_ring(self._gateway)
        except ConfigError as exc:
            if not isinstance(exc.__cause__, OSError):
                self._seen = stamps
            if exc.message != self._told:
                log.error("keys not read again", extra={"why": exc.message})
            self._told = exc.message
        else:
            self._seen, self._told = stamps, ""
            log.info("keys read again", extra={"keys": len(self.ring.accounts)})

    def _stamps(self) -> list[Stamp]:
        if self._gateway is None:
            return []
        g = self._gateway
        files = (g.keys_file, g.api_keys_file, g.admin_keys_file)
        return [stamp_of(Path(f).expanduser()) for f in files if f]


def read_ring(gateway: GatewayConfig) -> KeyRing:
    """The key ring that the settings describe.

    Raises ConfigError if keys are required but none are given.
    """
    g = gateway
    clients = plain_accounts(_plain("api_keys", g.api_keys_env, g.api_keys_file))
    admins = _plain("admin_keys", g.admin_keys_env, g.admin_keys_file)
    if g.keys_file:
        # an empty file is no mistake: its last key has been revoked
        clients |= key_file.accounts(read_key_file(Path(g.keys_file).expanduser()))
    return KeyRing(
        clients,
        admins,
        local=is_loopback(g.host),
        asks=g.asks_for_keys,
        apart=g.keys_file is not None,
    )


def read_key_file(path: Path) -> list[key_file.KeyEntry]:
    """Raises ConfigError."""
    return key_file.read_entries(_text("keys_file", str(path)), str(path))


def _plain(what: str, variable: str | None, file: str | None) -> frozenset[bytes]:
    keys: list[str] = []
    if variable:
        keys += os.environ.get(variable, "").split(",")
    if file:
        keys += _text(f"{what}_file", file).splitlines()
    found = frozenset(digest_of(k) for k in keys if k.strip())
    if (variable or file) and not found:
        raise ConfigError(
            f"keys are asked for (gateway.{what}_env or {what}_file) but none are "
            "given; nobody could call what they protect"
        )
    return found


def _text(key: str, file: str) -> str:
    try:
        return Path(file).expanduser().read_text("utf-8")
    except OSError as exc:
        raise ConfigError(f"gateway.{key}: cannot read {file}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"gateway.{key}: {file} is not UTF-8 text") from exc
