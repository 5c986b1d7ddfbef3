"""Shell. The gateways of one worker, with a session for each. A name (`dns://`) may stand for
several of them. It is looked up again and again, so a gateway that comes later is found.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Iterator, Sequence

from shared.config.gateway import DNS_SCHEME
from shared.link import messages
from worker.session import GatewaySession

log = logging.getLogger("loraplex.gateways")

LOOK_UP_S = 2.0
"""Time between two look-ups of a name. A new gateway is found within this and the name server's own
time to live, which is 5 s for a headless Service of Kubernetes.
"""

OnRequest = Callable[[GatewaySession, messages.GatewayData], None]
OnSilence = Callable[[GatewaySession, str], None]
Resolve = Callable[[str], Sequence[str]]


def addresses_of(host: str) -> list[str]:
    """All IPv4 addresses of a name. Blocks. Raises OSError."""
    found = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
    return sorted({str(address[0]) for *_, address in found})


class Gateways:
    """The sessions of one worker. `open_session` makes the session of one endpoint (`tcp://` or
    `ipc://`).
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        open_session: Callable[[str], GatewaySession],
        resolve: Resolve = addresses_of,
    ) -> None:
        self._open_session, self._resolve = open_session, resolve
        self._names = [e for e in endpoints if e.startswith(DNS_SCHEME)]
        self._named: dict[str, set[str]] = {name: set() for name in self._names}
        self._fixed = [e for e in endpoints if not e.startswith(DNS_SCHEME)]
        self._sessions: dict[str, GatewaySession] = {}
        self._on_request: OnRequest | None = None
        self._on_silence: OnSilence | None = None

    def __iter__(self) -> Iterator[GatewaySession]:
        return iter(list(self._sessions.values()))

    def open(self, on_request: OnRequest, on_silence: OnSilence) -> None:
        """Opens the sessions of the endpoints that are addresses and not names."""
        self._on_request, self._on_silence = on_request, on_silence
        for endpoint in self._fixed:
            self._add(endpoint)

    def close(self) -> None:
        for session in self._sessions.values():
            session.close()

    async def follow(self) -> None:
        """Looks the names up until it is cancelled. Returns at once if there is no name."""
        while self._names:
            await self.look_up()
            await asyncio.sleep(LOOK_UP_S)

    async def look_up(self) -> None:
        """Looks up every name once."""
        for name in self._names:
            await self._look_up(name)
        self._fit()

    async def _look_up(self, name: str) -> None:
        """Looks up one name. If that fails, its addresses stay as they were."""
        host, _, port = name.removeprefix(DNS_SCHEME).rpartition(":")
        try:
            addresses = await asyncio.to_thread(self._resolve, host)
        except OSError as exc:
            log.warning("gateways not looked up", extra={"gateway": name, "error": str(exc)})
            return
        self._named[name] = {f"tcp://{address}:{port}" for address in addresses}

    def _fit(self) -> None:
        """Opens a session for each new address. A session whose address is gone stays while its
        gateway is heard: a gateway that drains leaves its name first.
        """
        wanted = {*self._fixed, *(e for found in self._named.values() for e in found)}
        for endpoint in sorted(wanted - self._sessions.keys()):
            log.info("gateway found", extra={"gateway": endpoint})
            self._add(endpoint)
        for endpoint in self._sessions.keys() - wanted:
            if self._sessions[endpoint].silent:
                log.info("gateway gone", extra={"gateway": endpoint})
                self._sessions.pop(endpoint).close()

    def _add(self, endpoint: str) -> None:
        assert self._on_request is not None and self._on_silence is not None
        session = self._sessions[endpoint] = self._open_session(endpoint)
        session.open(self._on_request, self._on_silence)
