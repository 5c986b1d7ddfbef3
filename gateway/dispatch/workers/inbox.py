"""Shell. Decodes the messages of workers, and passes each part to the module that waits for it."""

from __future__ import annotations

from collections.abc import Callable

from gateway.dispatch.failover import Failover
from gateway.dispatch.settlement import Settlement
from gateway.dispatch.streams.delivery import FrameDelivery
from gateway.dispatch.streams.stream_table import StreamTable
from gateway.dispatch.workers.commands import WorkerCommands
from gateway.dispatch.workers.membership import Membership
from gateway.telemetry.prometheus import Metrics
from shared.link import messages


class WorkerInbox:
    """Implements LinkEvents. `on_data` runs for every engine step of every worker. A message that
    does not decode is counted and dropped. `on_deaths` is told what other gateways know of requests
    that workers died of.
    """

    def __init__(
        self,
        streams: StreamTable,
        delivery: FrameDelivery,
        failover: Failover,
        settlement: Settlement,
        membership: Membership,
        commands: WorkerCommands,
        metrics: Metrics,
        on_deaths: Callable[[messages.KnownDeaths], None],
    ) -> None:
        self._streams = streams
        self._delivery = delivery
        self._failover = failover
        self._settlement = settlement
        self._membership = membership
        self._commands = commands
        self._metrics = metrics
        self._on_deaths = on_deaths

    def on_control(self, peer: bytes, data: bytes) -> None:
        try:
            heartbeat = messages.decode_worker_control(data)
        except messages.DecodeError:
            self._metrics.undecodable("control")
            return
        if isinstance(heartbeat, messages.LoopHeld):
            self._membership.loop_held(heartbeat)
            return
        if heartbeat.protocol != messages.PROTOCOL_VERSION:
            self._metrics.undecodable("protocol")
            return
        self._membership.heartbeat(peer, heartbeat)

    def on_data(self, peer: bytes, data: bytes) -> None:
        try:
            message = messages.decode_worker_data(data)
        except messages.DecodeError:
            self._metrics.undecodable("data")
            return
        if type(message) is messages.Attach:
            self._membership.attach(message)
            return
        if type(message) is messages.Stopped:
            self._membership.stopped(message)
            return
        if type(message) is messages.StoredCopy:
            self._commands.keep_copy(peer, message)
            return
        if type(message) is messages.KnownDeaths:
            self._on_deaths(message)
            return
        assert type(message) is messages.Step
        requests = self._streams.of_peer(peer).requests
        for done in message.done:
            request = requests.get(done.sid)
            if request is not None:
                request.done = done
            elif self._settlement.take_report(peer, done):
                continue  # its client had left before
            else:
                self._commands.pending.done(peer, done.sid)
        self._delivery.deliver(peer, message.frames)
        for found in message.found:
            self._commands.answers.heard(peer, found)
        for refused in message.refused:
            request = self._streams.of(peer, refused.sid)
            if request is None:
                self._commands.pending.refused(peer, refused)
            else:
                self._failover.refused(request, refused)

    def on_link(self, peer: bytes, carries: bool, heard: bool) -> None:
        self._membership.link(peer, carries, heard)
