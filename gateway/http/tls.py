"""Shell. The TLS certificate of the listener. It is loaded at the start, and again when its files
change.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path

from shared.config.gateway import TLSConfig
from shared.errors import ConfigError

log = logging.getLogger("loraplex.http")

POLL_S = 1.0


class Certificate:
    """`context` is the listener's TLS context. Open connections keep the certificate with which
    they began.
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        self._files = (certificate, key)
        self._seen = self._stamps()
        self._told = ""
        self.context = self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))

    async def run(self) -> None:
        """Follows the files. While they are not a matching pair, the loaded certificate stays."""
        while True:
            await asyncio.sleep(POLL_S)
            self.look()

    def look(self) -> None:
        """Loads the files again if one of them has changed. What fails is tried again with the next
        look: it may have lacked a descriptor, or permission.
        """
        stamps = self._stamps()
        if stamps == self._seen:
            return
        try:
            # tried on another one first: a half of a pair must not get into the live one
            self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
            self._load(self.context)
        except ConfigError as exc:
            if exc.message != self._told:
                log.error("certificate not read again", extra={"why": exc.message})
            self._told = exc.message
        else:
            self._seen, self._told = stamps, ""
            log.info("certificate read again")

    def _load(self, context: ssl.SSLContext) -> ssl.SSLContext:
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        certificate, key = self._files
        try:
            context.load_cert_chain(certificate, key)
        except (OSError, ValueError) as exc:
            raise ConfigError(
                f"gateway.tls: {certificate} and {key} are no certificate and its key: {exc}"
            ) from exc
        return context

    def _stamps(self) -> list[tuple[int, int, int]]:
        found = []
        for file in self._files:
            try:
                stat = file.stat()
                found.append((stat.st_mtime_ns, stat.st_size, stat.st_ino))
            except OSError:
                found.append((0, 0, 0))
        return found


def open_certificate(tls: TLSConfig) -> Certificate | None:
    """The configured certificate, or None if none is configured.

    Raises ConfigError if the files cannot be used.
    """
    if tls.certificate is None or tls.key is None:
        return None
    return Certificate(Path(tls.certificate).expanduser(), Path(tls.key).expanduser())
