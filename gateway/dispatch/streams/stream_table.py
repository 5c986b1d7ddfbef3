"""Pure. The requests that workers have, by stream id."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from typing import Final, TypeAlias

from gateway.dispatch.request import InFlightRequest
from shared.link import messages


@dataclass(frozen=True, slots=True)
class Discrepancies:
    """What the tables disagree about."""

    unowned: tuple[messages.StreamId, ...]  # reservations of no stream
    unreserved: tuple[InFlightRequest, ...]  # streams without a reservation
    nowhere: tuple[InFlightRequest, ...]  # open, and neither on a worker nor in the queue

    def __len__(self) -> int:
        return len(self.unowned) + len(self.unreserved) + len(self.nowhere)


FrameWriter: TypeAlias = tuple[Callable[[bytes, bool], bool], bytearray, InFlightRequest]
"""Where the next frame of a stream goes, where its tokens are noted, and the stream itself."""


class PeerStreams:
    """The streams of one life of a worker. Those that have had their first frame have a writer."""

    __slots__ = ("requests", "writers")

    def __init__(self) -> None:
        self.requests: dict[messages.StreamId, InFlightRequest] = {}
        self.writers: dict[messages.StreamId, FrameWriter] = {}


NO_STREAMS: Final = PeerStreams()
"""Of a life that has none. It is never changed."""


class StreamTable:
    """A request is in the table from its dispatch until its end, or until its worker gives it
    back. Only the life of the worker that it was sent to can say anything of it.
    """

    def __init__(self) -> None:
        self._requests: dict[messages.StreamId, InFlightRequest] = {}
        # the same by the worker's life that has them
        self._of_peer: dict[bytes, PeerStreams] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[InFlightRequest]:
        return iter([*self._requests.values()])

    def get(self, sid: messages.StreamId) -> InFlightRequest | None:
        return self._requests.get(sid)

    def of(self, peer: bytes, sid: messages.StreamId) -> InFlightRequest | None:
        """The stream, if this life of a worker has it."""
        return self._of_peer.get(peer, NO_STREAMS).requests.get(sid)

    def of_peer(self, peer: bytes) -> PeerStreams:
        """The streams of this life of a worker. They are not to be changed."""
        return self._of_peer.get(peer, NO_STREAMS)

    def add(self, request: InFlightRequest) -> None:
        assert request.choice is not None
        peer = request.peer = request.choice.worker.peer
        self._requests[request.sid] = request
        of_peer = self._of_peer.get(peer)
        if of_peer is None:
            of_peer = self._of_peer[peer] = PeerStreams()
        of_peer.requests[request.sid] = request

    def remove(self, request: InFlightRequest) -> bool:
        """Removes a request. Returns whether it was in the table. Later frames of it belong to an
        unknown stream.
        """
        if self._requests.pop(request.sid, None) is None:
            return False
        of_peer = self._of_peer[request.peer]
        of_peer.writers.pop(request.sid, None)
        del of_peer.requests[request.sid]
        if not of_peer.requests:
            del self._of_peer[request.peer]
        return True

    def compare(
        self, open_requests: Iterable[InFlightRequest], reserved: Set[messages.StreamId]
    ) -> Discrepancies:
        """What this table, the open requests and the reservations disagree about.

        Between two messages, each open request waits in the queue or is in this table. Each request
        in the table has a reservation.
        """
        requests = self._requests
        return Discrepancies(
            tuple(sid for sid in reserved if sid not in requests),
            tuple(request for sid, request in requests.items() if sid not in reserved),
            tuple(r for r in open_requests if r.sid not in requests and r.ticket is None),
        )

    def write_elsewhere(self, request: InFlightRequest) -> None:
        """The request has another Sink from now on."""
        if request.sid in self.of_peer(request.peer).writers:
            self.write_to(request)

    def write_to(self, request: InFlightRequest) -> None:
        """The client has got its first frame. Further frames go straight to it."""
        writers = self._of_peer[request.peer].writers
        writers[request.sid] = request.sink.more, request.journal.tokens, request
