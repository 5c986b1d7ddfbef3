"""Shell. The dispatcher's two sockets: control and data, bound in this gateway process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from gateway.supervisor.endpoints import Endpoints
from shared.config.llm import Settings
from shared.link import messages
from shared.link.sockets import RouterSocket, SendResult, open_context, secret_from_env

OnMessage = Callable[[bytes, bytes], None]


class LinkTransport:
    """The dispatcher's Transport. `control` and `data` are there from `open` on."""

    control: RouterSocket
    data: RouterSocket

    def __init__(self, where: Endpoints, settings: Settings, name: str) -> None:
        self._where = where
        self._settings = settings
        self._name = name

    @contextlib.contextmanager
    def open(self, on_control: OnMessage, on_data: OnMessage) -> Iterator[None]:
        """Binds both sockets; each callback gets a worker's routing id and its message.

        Raises ConfigError or LinkError where an address cannot be bound.
        """
        link = self._settings.gateway.link
        secret = secret_from_env(link.secret_env)
        context = open_context()

        def bind(endpoint: str, on_message: OnMessage) -> RouterSocket:
            return RouterSocket(
                context, endpoint, on_message, secret=secret, insecure=link.insecure
            )

        self.control = bind(self._where.control, on_control)
        self.data = bind(self._where.data, on_data)
        try:
            yield
        finally:
            self.control.close()
            self.data.close()
            context.term()

    def welcome(self) -> messages.Welcome:
        g = self._settings.gateway
        return messages.Welcome(self._name, self.data.endpoint, g.lease_s, g.heartbeat_s)

    def send_data(self, peer: bytes, data: bytes) -> SendResult:
        return self.data.send(peer, data)

    def send_control(self, peer: bytes, data: bytes) -> SendResult:
        return self.control.send(peer, data)
