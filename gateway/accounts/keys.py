"""Shell. The keys of one gateway process: read at the start, read again when a file changes, and
asked for every request.
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

log = logging.getLogger("loraplex.keys")

POLL_S = 0.5
"""How late a change of a file is seen at most, besides the read itself."""
OPEN_RING = KeyRing()


class Keys:
    """Who may call what. `ring` is replaced as a whole, so a request sees one state of the
    files.
    """

    def __init__(self, gateway: GatewayConfig | None = None, ring: KeyRing = OPEN_RING) -> None:
        self._gateway = gateway
        self.ring = ring if gateway is None else read_ring(gateway)
        self._seen = self._stamps()

    def account_of(self, authorization: str) -> Account:
        """Of the header's value. Raises InvalidApiKey."""
        return self.ring.account_of(authorization, time.time())

    def check_admin(self, authorization: str) -> None:
        """Raises InvalidApiKey or Forbidden."""
        self.ring.check_admin(authorization, time.time())

    async def run(self) -> None:
        """Follows the files. One that cannot be read changes nothing until it is mended."""
        while True:
            await asyncio.sleep(POLL_S)
            self.look()

    def look(self) -> None:
        stamps = self._stamps()
        if stamps == self._seen or self._gateway is None:
            return
        self._seen = stamps
        try:
            self.ring = read_ring(self._gateway)
        except ConfigError as exc:
            log.error("keys not read again", extra={"why": exc.message})
        else:
            log.info("keys read again", extra={"keys": len(self.ring.accounts)})

    def _stamps(self) -> list[tuple[int, int, int]]:
        if self._gateway is None:
            return []
        g = self._gateway
        return [_stamp(f) for f in (g.keys_file, g.api_keys_file, g.admin_keys_file) if f]


def read_ring(gateway: GatewayConfig) -> KeyRing:
    """Raises ConfigError where keys are asked for and none are given."""
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


def _stamp(file: str) -> tuple[int, int, int]:
    try:
        s = Path(file).expanduser().stat()
    except OSError:
        return (0, 0, 0)
    return (s.st_ino, s.st_mtime_ns, s.st_size)
