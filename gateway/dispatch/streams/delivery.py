"""Pure. Passes each frame of a worker to its client, and notes its tokens in the journal.

`FrameDelivery.deliver` is the only place where a frame reaches a client. It runs for every token.
So the common case is one look-up, one call, and a few bytes more in an array.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from gateway.dispatch.request import InFlightRequest
from gateway.dispatch.streams.journal import NOT_JOURNALED
from gateway.dispatch.streams.stream_table import FrameWriter, StreamTable
from shared.link import messages

CONTINUED = b": continued by another worker\n\n"
"""Sent to the client of a stream that was moved. Clients skip comments."""
OK = 200
LEAST_ERROR_STATUS = 400


class StreamOwner(Protocol):
    """Decides what follows from a frame."""

    def stream_began(self, request: InFlightRequest, *, in_background: bool) -> None:
        """The first frame of this attempt has come. The client gets it next. `in_background`: it is
        all that the client gets, and the worker has made no token of the answer yet.
        """
        ...

    def stream_progressed(self, request: InFlightRequest) -> None:
        """The worker has made tokens of a whole answer, which the client gets at its end."""
        ...

    def stream_answered(self, request: InFlightRequest) -> None:
        """The client has got its answer, and the rest is made in the background."""
        ...

    def stream_diverged(self, request: InFlightRequest) -> None:
        """A stream should be continued, but its new worker answers something else."""
        ...

    def stream_ended(self, request: InFlightRequest) -> None:
        """The client has got the last frame."""
        ...

    def stream_stuck(self, request: InFlightRequest) -> None:
        """The client does not read, so its frame was not taken. The stream is over then, or goes on
        without its client.
        """
        ...

    def stream_broke(self, request: InFlightRequest, exc: Exception) -> None:
        """Taking the frame has raised. Either the client's transport is closed, or our code failed.
        The stream is over then, or goes on without its client. Must not raise.
        """
        ...

    def stream_unknown(self, peer: bytes, sid: messages.StreamId) -> None:
        """A worker sends a stream for which nobody waits."""
        ...


class FrameDelivery:
    """Delivers the frames of the streams in `table`. `owner` decides what follows from them."""

    def __init__(self, table: StreamTable, owner: StreamOwner) -> None:
        self._table = table
        self._owner = owner

    def deliver(self, peer: bytes, frames: Iterable[messages.Frame]) -> None:
        """Passes the frames of one engine step to their clients. If one of them raises, only its
        own stream ends. The others belong to other clients.
        """
        streams = self._table.of_peer(peer)
        writers, requests = streams.writers, streams.requests
        for sid, flags, payload, tokens in frames:
            writer = writers.get(sid)
            if writer is None or flags or not tokens:
                request = requests.get(sid)
                if request is not None:
                    self._deliver_other(request, writer, flags, payload, tokens)
                elif not flags & messages.END:
                    self._owner.stream_unknown(peer, sid)
                continue
            write, words, request = writer
            words += tokens
            try:
                if not write(payload, False):
                    self._owner.stream_stuck(request)
            except Exception as exc:
                self._owner.stream_broke(request, exc)

    def _deliver_other(
        self,
        request: InFlightRequest,
        writer: FrameWriter | None,
        flags: int,
        payload: bytes,
        tokens: bytes,
    ) -> None:
        """The first frame of a stream, its last one, and one without tokens."""
        try:
            if writer is None:
                self._deliver_first(request, flags, payload, tokens)
            else:
                self._deliver_next(request, writer, flags, payload, tokens)
        except Exception as exc:
            self._owner.stream_broke(request, exc)
            if request.lifecycle.over:
                return
            if flags & messages.END:  # it goes on without its client, and this was its last frame
                self._owner.stream_ended(request)
            elif writer is None and not flags & messages.ANSWERED:
                self._table.write_to(request)

    def _deliver_next(
        self,
        request: InFlightRequest,
        writer: FrameWriter,
        flags: int,
        payload: bytes,
        tokens: bytes,
    ) -> None:
        write, words, _ = writer
        if tokens:
            words += tokens
        elif not flags and request.journal.begun:
            request.journal.give_up(NOT_JOURNALED)
        if not write(payload, flags == messages.END):
            self._owner.stream_stuck(request)
        if flags and not request.lifecycle.over:
            self._owner.stream_ended(request)

    def _deliver_first(
        self, request: InFlightRequest, flags: int, payload: bytes, tokens: bytes
    ) -> None:
        request.journal.tokens += tokens
        if flags == messages.TOKENS:
            self._owner.stream_progressed(request)
            return
        if flags == messages.TAKEN:
            request.lifecycle.taken = True
            return
        if flags == messages.END:  # of what was made in the background
            self._owner.stream_ended(request)
            return
        self._owner.stream_began(request, in_background=bool(flags & messages.ANSWERED))
        if request.journal.begun:
            self._deliver_rest(request, flags, payload)
        else:
            self._deliver_head(request, flags, payload, tokens)

    def _deliver_head(
        self, request: InFlightRequest, flags: int, payload: bytes, tokens: bytes
    ) -> None:
        sse, end, journal = bool(flags & messages.SSE), bool(flags & messages.END), request.journal
        status = flags >> messages.STATUS_SHIFT
        request.engine_status = status if status >= LEAST_ERROR_STATUS else 0
        if flags & messages.ANSWERED:
            journal.begun = True
            request.sink.head(status, False, payload, True)
            self._owner.stream_answered(request)
            return
        if flags & messages.LINES:
            lines, _, payload = payload.partition(b"\r\n\r\n")
            request.answer_lines = lines + b"\r\n"
        request.sink.head(status, sse, payload, end)
        if end:
            self._owner.stream_ended(request)
            return
        if sse:
            journal.begun = True
            if not tokens:
                journal.give_up(NOT_JOURNALED)
        # else the client sees nothing of it before its end, so another worker may still begin it
        self._table.write_to(request)

    def _deliver_rest(self, request: InFlightRequest, flags: int, payload: bytes) -> None:
        """The stream goes on at another worker, which sends what follows behind a head of its
        own.
        """
        if flags & messages.ANSWERED:
            return  # the client has its answer
        if flags >> messages.STATUS_SHIFT != OK or not flags & messages.SSE:
            self._owner.stream_diverged(request)
            return
        request.sink.comment(CONTINUED)
        end = bool(flags & messages.END)
        if not request.sink.more(payload, end):
            self._owner.stream_stuck(request)
        if request.lifecycle.over:
            return
        if end:
            self._owner.stream_ended(request)
        else:
            self._table.write_to(request)
