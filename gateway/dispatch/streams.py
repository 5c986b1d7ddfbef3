"""Pure. The requests that workers have, by stream id, and the way of each frame to its client
and into its journal.

`StreamTable.deliver` is the only place where a frame reaches a client. It runs for every token, so
the common case is one look-up, one call and a few bytes more in an array.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from typing import Protocol

from gateway.dispatch.journal import NOT_A_STREAM, NOT_JOURNALED
from gateway.dispatch.request import InFlightRequest
from shared.link import messages


@dataclass(frozen=True, slots=True)
class Discrepancies:
    """What the books say that is not so."""

    unowned: tuple[messages.StreamId, ...]  # reservations of no stream
    unreserved: tuple[InFlightRequest, ...]  # streams without a reservation
    nowhere: tuple[InFlightRequest, ...]  # open, and neither on a worker nor in the queue

    def __len__(self) -> int:
        return len(self.unowned) + len(self.unreserved) + len(self.nowhere)


WriteFrame = Callable[[bytes, bool], bool]
CONTINUED = b": continued by another worker\n\n"
"""Told to the client of a stream that was moved; clients skip comments."""
OK = 200


class StreamOwner(Protocol):
    """Who decides what follows from a frame."""

    def stream_began(self, request: InFlightRequest) -> None:
        """The first frame of this attempt is here; the client gets it next."""
        ...

    def stream_diverged(self, request: InFlightRequest) -> None:
        """A stream was to be continued, and its new worker answers something else."""
        ...

    def stream_ended(self, request: InFlightRequest) -> None:
        """The client got the last frame."""
        ...

    def stream_stuck(self, request: InFlightRequest) -> None:
        """The client does not read: its frame was not taken."""
        ...

    def stream_broke(self, request: InFlightRequest, exc: Exception) -> None:
        """Taking its frame has raised: its client's transport is closed, or code of ours failed.
        Must not raise.
        """
        ...

    def stream_unknown(self, peer: bytes, sid: messages.StreamId) -> None:
        """A worker sends what nobody waits for."""
        ...


class StreamTable:
    """A request is here from its dispatch until its end, or until its worker gives it back."""

    def __init__(self, owner: StreamOwner) -> None:
        self._owner = owner
        self._requests: dict[messages.StreamId, InFlightRequest] = {}
        # where the next frame and its tokens go of each stream that has had its first
        self._writers: dict[messages.StreamId, tuple[WriteFrame, bytearray]] = {}

    def __len__(self) -> int:
        return len(self._requests)

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

    def compare(
        self, open_requests: Iterable[InFlightRequest], reserved: Set[messages.StreamId]
    ) -> Discrepancies:
        """Every open request waits in the queue or is here, and who is here has a reservation.
        Between two messages that is so: nothing is half done then.
        """
        requests = self._requests
        return Discrepancies(
            tuple(sid for sid in reserved if sid not in requests),
            tuple(request for sid, request in requests.items() if sid not in reserved),
            tuple(r for r in open_requests if r.sid not in requests and r.ticket is None),
        )

    def deliver(self, peer: bytes, frames: Iterable[messages.Frame]) -> None:
        """The frames of one engine step, each to its client. Whatever one of them raises ends its
        own stream: the others of the message are those of other clients.
        """
        writers, requests = self._writers, self._requests
        for sid, flags, payload, tokens in frames:
            request = requests.get(sid)
            if request is None:
                if not flags & messages.END:
                    self._owner.stream_unknown(peer, sid)
                continue
            try:
                writer = writers.get(sid)
                if writer is None:
                    self._deliver_first(request, flags, payload, tokens)
                    continue
                write, words = writer
                if tokens:
                    words += tokens
                elif not flags:
                    request.journal.give_up(NOT_JOURNALED)
                if not write(payload, flags == messages.END):
                    self._owner.stream_stuck(request)
                elif flags:
                    self._owner.stream_ended(request)
            except Exception as exc:
                self._owner.stream_broke(request, exc)

    def _deliver_first(
        self, request: InFlightRequest, flags: int, payload: bytes, tokens: bytes
    ) -> None:
        request.journal.words += tokens
        if flags == messages.TOKENS:
            return
        self._owner.stream_began(request)
        if request.journal.begun:
            self._deliver_rest(request, flags, payload)
        else:
            self._deliver_head(request, flags, payload, tokens)

    def _deliver_head(
        self, request: InFlightRequest, flags: int, payload: bytes, tokens: bytes
    ) -> None:
        sse, end, journal = bool(flags & messages.SSE), bool(flags & messages.END), request.journal
        if flags & messages.LINES:
            lines, _, payload = payload.partition(b"\r\n\r\n")
            request.answer_lines = lines + b"\r\n"
        request.sink.head(flags >> messages.STATUS_SHIFT, sse, payload, end)
        if end:
            self._owner.stream_ended(request)
            return
        journal.begun = True
        if not tokens:
            journal.give_up(NOT_JOURNALED if sse else NOT_A_STREAM)
        self._writers[request.sid] = request.sink.more, journal.words

    def _deliver_rest(self, request: InFlightRequest, flags: int, payload: bytes) -> None:
        """The stream goes on at another worker, which sends what follows behind a head of its
        own.
        """
        if flags >> messages.STATUS_SHIFT != OK or not flags & messages.SSE:
            self._owner.stream_diverged(request)
            return
        request.sink.comment(CONTINUED)
        end = bool(flags & messages.END)
        if not request.sink.more(payload, end):
            self._owner.stream_stuck(request)
        elif end:
            self._owner.stream_ended(request)
        else:
            self._writers[request.sid] = request.sink.more, request.journal.words
