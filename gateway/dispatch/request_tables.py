"""Pure. Where each open request is: in the queue, on a worker, or among those that get comments.

Every module that moves a request changes the same tables, which are kept here.
"""

from __future__ import annotations

from gateway.dispatch.queue.admission import Admission
from gateway.dispatch.queue.open_requests import OpenRequests
from gateway.dispatch.request import InFlightRequest
from gateway.dispatch.streams.keepalive import StreamKeepalive
from gateway.dispatch.streams.stream_table import Discrepancies, StreamTable
from gateway.fleet.fleet import Fleet


class RequestTables:
    """The tables that a request can be in. An open request waits in `admission` or is in `streams`,
    and one in `streams` has a reservation in `fleet`.
    """

    def __init__(
        self, fleet: Fleet, admission: Admission[InFlightRequest], keepalive: StreamKeepalive
    ) -> None:
        self.fleet = fleet
        self.admission = admission
        self.keepalive = keepalive
        self.streams = StreamTable()
        self.open = OpenRequests[InFlightRequest]()

    def leave_queue(self, request: InFlightRequest) -> None:
        """Idempotent."""
        if request.ticket is not None:
            self.admission.leave(request.ticket)
            request.ticket = None

    def unreserve(self, request: InFlightRequest) -> None:
        """Idempotent. No worker has the request any more."""
        if self.streams.remove(request):
            self.fleet.release(request.sid)

    def forget(self, request: InFlightRequest) -> None:
        """Idempotent. The request is no longer open. Its reservation was released before."""
        if request.ticket is not None:
            self.leave_queue(request)
        if request.client_request.streams:
            self.keepalive.leave(request)
        self.open.discard(request)

    def discrepancies(self) -> Discrepancies | None:
        """What the tables disagree about. None: nothing. Call it between two messages."""
        streams, reserved = len(self.streams), len(self.fleet.reserved)
        if streams == reserved and len(self.open) == streams + len(self.admission):
            return None
        return self.streams.compare(self.open, self.fleet.reserved) or None
