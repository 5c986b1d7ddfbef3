"""Shell. The dispatcher's two sockets, control and data, and this end of a channel to each known
worker.
"""

from __future__ import annotations

import contextlib
import functools
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from gateway.supervisor.link_addresses import LinkAddresses
from gateway.telemetry.prometheus import Metrics
from shared.config.llm import Settings
from shared.link import messages
from shared.link.link_end import PING_S, LinkEnd
from shared.link.secret import link_secret
from shared.link.sockets import RouterSocket, SendResult, open_context

STOOD_STILL_S = 2 * PING_S
"""A tick that is this late means that this process was stopped. What the workers have sent
meanwhile is read before their connections are judged.
"""
CHANNEL_BITS = 32

MIN_SILENCE_S = 3.0
"""A worker keeps the requests of a silent gateway for at least this long. To give them up early
would cost their prefills. To keep them costs only a few slots.
"""


class LinkEvents(Protocol):
    """Gets what the workers send. `peer` is the routing id of one life of one worker."""

    def on_control(self, peer: bytes, data: bytes) -> None: ...
    def on_data(self, peer: bytes, data: bytes) -> None: ...

    def on_link(self, peer: bytes, carries: bool, heard: bool) -> None:
        """`carries` says whether the worker's data connection works in both directions. `heard`
        says whether anything has come since the last call, on either connection.
        """
        ...


class LinkTransport:
    """The dispatcher's Transport. `control` and `data` exist while it is open."""

    control: RouterSocket
    data: RouterSocket

    def __init__(
        self, where: LinkAddresses, settings: Settings, name: str, metrics: Metrics
    ) -> None:
        self._where = where
        self._settings = settings
        self._name = name
        self._metrics = metrics
        self._ends: dict[bytes, LinkEnd] = {}
        # Random, so that no worker takes this process for an earlier one, whatever its clock says.
        self._last_channel = secrets.randbits(CHANNEL_BITS)
        self._ticked = 0.0

    @contextlib.contextmanager
    def open(self, events: LinkEvents) -> Iterator[None]:
        """Binds both sockets. Raises ConfigError or LinkError if an address cannot be bound."""
        link = self._settings.gateway.link
        secret = link_secret(
            link.secret_env,
            link.insecure,
            (self._where.control, self._where.data),
            Path(self._settings.gateway.state_dir).expanduser(),
        )
        context = open_context()
        self._events = events
        bind = functools.partial(RouterSocket, context, secret=secret, insecure=link.insecure)
        self.control = bind(self._where.control, self._control_in)
        self.data = bind(self._where.data, self._data_in)
        try:
            yield
        finally:
            self.control.close()
            self.data.close()
            context.term()

    # ---- for the dispatcher ----------------------------------------------------------------------

    def welcome(self, peer: bytes) -> messages.Welcome:
        """How a worker reaches this gateway, and by which channel: a new one if it has none."""
        end = self._ends.get(peer)
        if end is None:
            self._last_channel = (self._last_channel + 1) % (1 << CHANNEL_BITS)
            end = self._ends[peer] = LinkEnd(
                self._last_channel,
                functools.partial(self.data.send, peer),
                functools.partial(self.control.send, peer),
                functools.partial(self._events.on_data, peer),
                time.monotonic(),
            )
        g = self._settings.gateway
        max_silence_s = max(g.lease_s, MIN_SILENCE_S)
        return messages.Welcome(
            self._name, self.data.endpoint, max_silence_s, g.heartbeat_s, channel=end.channel.id
        )

    def forget(self, peer: bytes) -> None:
        """This life of the worker is over, so messages that still arrive on its channel are
        dropped. A worker that has sent its last message is told that it has arrived.
        """
        end = self._ends.pop(peer, None)
        if end is not None:
            end.flush()

    def send_data(self, peer: bytes, data: bytes) -> SendResult:
        """OK: the message arrives, unless the worker is lost first. FULL: the worker takes nothing
        now. GONE: no such worker was welcomed.
        """
        end = self._ends.get(peer)
        if end is None:
            return SendResult.GONE
        sent = end.offer(data)
        if sent is SendResult.GONE:
            end.doubt()  # neither connection is there: one comes back at once, or the lease ends
            self._events.on_link(peer, carries=False, heard=False)
        return SendResult.OK if sent is SendResult.OK else SendResult.FULL

    def send_control(self, peer: bytes, data: bytes) -> SendResult:
        return self.control.send(peer, data)

    def coming_bytes(self, peer: bytes) -> int:
        """See Alive."""
        end = self._ends.get(peer)
        return end.path.ahead_bytes if end is not None else 0

    def tick(self) -> None:
        """Pings every worker and judges its data connection. Call it every PING_S."""
        now = time.monotonic()
        late = now - self._ticked > PING_S + STOOD_STILL_S
        self._ticked = now
        for peer, end in list(self._ends.items()):
            if not end.channel.delivered:
                continue  # the worker has not attached yet
            if not late:
                end.judge(now)
            heard, end.heard = end.heard, False
            self._events.on_link(peer, end.carries, heard)
            end.ping(now)

    # ---- from the workers ------------------------------------------------------------------------

    def _control_in(self, peer: bytes, data: bytes) -> None:
        if messages.is_packet(data):
            self._packet_in(peer, data, by_data=False)
        else:
            self._events.on_control(peer, data)

    def _data_in(self, peer: bytes, data: bytes) -> None:
        self._packet_in(peer, data, by_data=True)

    def _packet_in(self, peer: bytes, data: bytes, *, by_data: bool) -> None:
        end = self._ends.get(peer)
        if end is None:
            return  # of a life that is over, or of this gateway's earlier one
        gaps, resent = end.gaps, end.channel.resent
        try:
            end.arrive(data, time.monotonic(), by_data=by_data)
        except messages.DecodeError:
            self._metrics.undecodable("packet")
            return
        if end.gaps > gaps:
            self._metrics.link_gap()
        if end.channel.resent > resent:
            self._metrics.link_resent(end.channel.resent - resent)
