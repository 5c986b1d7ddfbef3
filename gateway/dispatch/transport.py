"""Shell. The dispatcher's two sockets: control and data, bound in this gateway process."""

from __future__ import annotations

from gateway.dispatch.dispatcher import Dispatcher
from gateway.supervisor.endpoints import Endpoints
from shared.config.llm import Settings
from shared.link import messages
from shared.link.sockets import RouterSocket, SendResult, open_context, secret_from_env


class LinkTransport:
    """The dispatcher's Transport: one control and one data socket, bound."""

    def __init__(self, where: Endpoints, settings: Settings, name: str) -> None:
        link = settings.gateway.link
        secret = secret_from_env(link.secret_env)
        self._context = open_context()
        self.dispatcher: Dispatcher | None = None
        self.control = RouterSocket(
            self._context, where.control, self._on_control, secret=secret, insecure=link.insecure
        )
        self.data = RouterSocket(
            self._context, where.data, self._on_data, secret=secret, insecure=link.insecure
        )
        self._name = name
        self._settings = settings

    def welcome(self) -> messages.Welcome:
        g = self._settings.gateway
        return messages.Welcome(self._name, self.data.endpoint, g.lease_s, g.heartbeat_s)

    def send_data(self, peer: bytes, data: bytes) -> SendResult:
        return self.data.send(peer, data)

    def send_control(self, peer: bytes, data: bytes) -> SendResult:
        return self.control.send(peer, data)

    def close(self) -> None:
        self.control.close()
        self.data.close()
        self._context.term()

    def _on_control(self, peer: bytes, data: bytes) -> None:
        if self.dispatcher is not None:
            self.dispatcher.on_control(peer, data)

    def _on_data(self, peer: bytes, data: bytes) -> None:
        if self.dispatcher is not None:
            self.dispatcher.on_data(peer, data)
