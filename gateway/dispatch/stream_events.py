"""Shell. What follows from a frame of a worker: a stream begins, ends, breaks or diverges."""

from __future__ import annotations

from collections.abc import Callable

from gateway.dispatch.deadly.requests import DeadlyRequests
from gateway.dispatch.endings import RequestEndings
from gateway.dispatch.failover import Failover
from gateway.dispatch.lifecycle import RequestEvent
from gateway.dispatch.request import InFlightRequest
from gateway.dispatch.streams.keepalive import StreamKeepalive
from gateway.dispatch.workers.outbox import WorkerOutbox
from gateway.telemetry.prometheus import Metrics
from shared.link import messages


class StreamEvents:
    """Implements StreamOwner, which says when each method is called.

    Args:
        on_acquitted: called with the base model of a request of which workers had died, as it
            seemed, and which has made progress. Others of the kind may have its worker now.
    """

    def __init__(
        self,
        endings: RequestEndings,
        failover: Failover,
        keepalive: StreamKeepalive,
        outbox: WorkerOutbox,
        metrics: Metrics,
        deadly: DeadlyRequests,
        clock: Callable[[], float],
        on_acquitted: Callable[[str], None],
    ) -> None:
        self._endings = endings
        self._failover = failover
        self._keepalive = keepalive
        self._outbox = outbox
        self._metrics = metrics
        self._deadly = deadly
        self._clock = clock
        self._on_acquitted = on_acquitted

    def stream_began(self, request: InFlightRequest, *, in_background: bool) -> None:
        request.t_head = request.t_head or self._clock()
        if request.client_request.streams:
            self._keepalive.leave(request)
        deaths = request.lifecycle.deaths
        request.lifecycle.on(RequestEvent.ANSWERED if in_background else RequestEvent.HEAD)
        if deaths:
            self._acquit(request)

    def stream_progressed(self, request: InFlightRequest) -> None:
        deaths = request.lifecycle.deaths
        request.lifecycle.progressed()
        if deaths:
            self._acquit(request)

    def stream_answered(self, request: InFlightRequest) -> None:
        self._endings.leave_client(request)

    def stream_diverged(self, request: InFlightRequest) -> None:
        self._failover.diverged(request)

    def stream_ended(self, request: InFlightRequest) -> None:
        self._endings.end(request, RequestEvent.END)

    def stream_stuck(self, request: InFlightRequest) -> None:
        self._metrics.slow_reader()
        self._endings.cancel(request)

    def stream_broke(self, request: InFlightRequest, exc: Exception) -> None:
        """If the client has left, its stream is over, and nothing failed. Anything else is an error
        of this code.
        """
        if isinstance(exc, ConnectionError) and not request.lifecycle.over:
            self._endings.isolated(request, self._endings.cancel, request)
        else:
            self._endings.break_off(request, exc)

    def stream_unknown(self, peer: bytes, sid: messages.StreamId) -> None:
        self._outbox.cancel(peer, sid)  # the worker has not heard yet

    def _acquit(self, request: InFlightRequest) -> None:
        """It has made progress, and workers had died of it before, as it seemed."""
        if not request.lifecycle.deaths:
            self._deadly.forget(request, self._clock())
            self._on_acquitted(request.model.base)
