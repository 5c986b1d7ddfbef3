"""Pure. The requests that workers have, by stream id, and the way of each frame to its client.

`StreamTable.deliver` is the only place where a frame reaches a client. It runs for every token, so
the common case is one look-up and one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from gateway.dispatch.request import InFlightRequest
from shared.link import messages

WriteFrame = Callable[[bytes, bool], bool]


class StreamOwner(Protocol):
    """Who decides what follows from a frame."""

    def stream_began(self, request: InFlightRequest) -> None:
        """The first frame is here; the client gets it next."""
        ...

    def stream_ended(self, request: InFlightRequest) -> None:
        """The client got the last frame."""
        ...

    def stream_stuck(self, request: InFlightRequest) -> None:
        """The client does not read: its frame was not taken."""
        ...

    def stream_unknown(self, peer: bytes, sid: messages.StreamId) -> None:
        """A worker sends what nobody waits for."""
        ...


class StreamTable:
    """A request is here from its dispatch until its end, or until its worker gives it back."""

    def __init__(self, owner: StreamOwner) -> None:
        self._owner = owner
        self._requests: dict[messages.StreamId, InFlightRequest] = {}
        # where the next frame goes of each stream that has had its first
        self._writers: dict[messages.StreamId, WriteFrame] = {}

    def __iter__(self) -> Iterator[InFlightRequest]:
        return iter([*self._requests.values()])

    def get(self, sid: messages.StreamId) -> InFlightRequest | None:
        return self._requests.get(sid)

    def add(self, request: InFlightRequest) -> None:
        self._requests[request.sid] = request

    def remove(self, request: InFlightRequest) -> bool:
        """Whether it was here. Its later frames are those of an unknown stream."""
        if self._requests.pop(request.sid, None) is None:
            return False
        self._writers.pop(request.sid, None)
        return True

    def deliver(self, peer: bytes, frames: Iterable[messages.Frame]) -> None:
        """The frames of one engine step, each to its client."""
        writers = self._writers
        for sid, flags, payload in frames:
            write = writers.get(sid)
            if write is None:
                self._deliver_first(peer, sid, flags, payload)
            elif not write(payload, flags == messages.END):
                self._owner.stream_stuck(self._requests[sid])
            elif flags:
                self._owner.stream_ended(self._requests[sid])

    def _deliver_first(
        self, peer: bytes, sid: messages.StreamId, flags: int, payload: bytes
    ) -> None:
        request = self._requests.get(sid)
        end = bool(flags & messages.END)
        if request is None:
            if not end:
                self._owner.stream_unknown(peer, sid)
            return
        self._owner.stream_began(request)
        request.sink.head(flags >> messages.STATUS_SHIFT, bool(flags & messages.SSE), payload, end)
        if end:
            self._owner.stream_ended(request)
        else:
            self._writers[sid] = request.sink.more
