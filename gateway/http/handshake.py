"""Shell. A connection until its TLS handshake is over. It counts like any other, so connections
that never say anything make room for others here too.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from typing import TYPE_CHECKING, cast

from gateway.http.connection import Connection, client_of

if TYPE_CHECKING:
    from gateway.http.server import Server


class Handshake(asyncio.Protocol):
    """It takes the socket from the plain transport before a byte was read, and gives it to a TLS
    transport.
    """

    def __init__(self, http_server: Server, context: ssl.SSLContext, timeout_s: float) -> None:
        self._http_server, self._context, self._timeout_s = http_server, context, timeout_s
        self._socket: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None
        self.client = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        plain = cast(asyncio.Transport, transport)
        self.client = client_of(plain)
        if self._http_server.enter(self):
            try:
                self._socket = socket.socket(fileno=os.dup(plain.get_extra_info("socket").fileno()))
            except OSError:  # no file is left
                self._http_server.leave(self)
            else:
                shaking = self._shake(self._socket)
                self._task = asyncio.get_running_loop().create_task(shaking, name="handshake")
        plain.abort()

    async def _shake(self, client: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        client.setblocking(False)
        try:
            await loop.connect_accepted_socket(
                lambda: _TLSConnection(self._http_server, self),
                client,
                ssl=self._context,
                ssl_handshake_timeout=self._timeout_s,
            )
        except OSError:  # as ssl.SSLError, and one whose time is over
            pass
        finally:
            self._http_server.leave(self)

    # ---- as one of the open connections ----------------------------------------------------------

    @property
    def waits(self) -> bool:
        return True

    def close_if_late(self, now: float) -> None:
        """The handshake has a time limit of its own."""

    def close_if_idle(self) -> None:
        self.abort()

    def quiet_since(self, when: float) -> bool:
        return True

    def abort(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


class _TLSConnection(Connection):
    """A connection whose handshake is over when it is made."""

    __slots__ = ("_handshake",)

    def __init__(self, http_server: Server, handshake: Handshake) -> None:
        super().__init__(http_server)
        self._handshake = handshake

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._http_server.leave(self._handshake)
        super().connection_made(transport)
