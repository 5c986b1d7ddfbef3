"""Shell. One open request, and what its answer sends to the gateway: frames, then its facts."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from shared.link import messages
from shared.link.token_ids import BYTES_PER_TOKEN
from worker.engine.base import Loaded
from worker.requests.kept_answers import FrameSink, KeptAnswer
from worker.requests.trials import Trial
from worker.session import GatewaySession

PROGRESS_TOKENS = 16
"""An answer that is sent whole reports its tokens after so many new ones. If the worker is lost, no
more than these have to be generated again.
"""


@dataclass(slots=True, eq=False)
class OpenRequest:
    """One request on this worker. `task` runs it in the engine; until then it waits for its
    adapter. Its answer goes to `outbox`, the outbox of the channel by which it came, and to no
    other. If the answer is `kept`, it goes to everybody who has joined.
    """

    number: int
    session: GatewaySession
    outbox: FrameSink
    message: messages.Generate
    arrived: float
    kept: KeptAnswer | None = None
    task: asyncio.Task[None] | None = None
    started: float = 0.0
    came_from: messages.Tier = messages.Tier.GPU
    slot_wait_s: float = 0.0
    adapter: Loaded | None = None
    reply: StreamReply | None = None
    trial: Trial | None = None
    """Set if workers died of the request, as it seems."""
    alone: bool = False
    """Whether it goes on in the background without its gateway."""


class _Nobody:
    """The FrameSink of an answer that goes on alone."""

    def frame(self, sid: messages.StreamId, flags: int, data: bytes, tokens: bytes = b"") -> None:
        return None

    def done(self, done: messages.Done) -> None:
        return None

    def refuse(self, refused: messages.Refused) -> None:
        return None


NOBODY = _Nobody()


class StreamReply:
    """Puts the frames of one stream into the outbox of its gateway. The facts of the request
    (tokens, times) travel with the last frame.
    """

    __slots__ = (
        "_lines",
        "_movable",
        "_request",
        "_sid",
        "_unsent",
        "ended",
        "finish_reasons",
        "output_tokens",
        "prompt_tokens",
    )

    def __init__(self, request: OpenRequest) -> None:
        self._request = request
        self._sid = request.message.sid
        self._movable = request.message.movable
        self._unsent = b""
        self.prompt_tokens = self.output_tokens = 0
        self.finish_reasons = ""
        self.ended = False
        self._lines = b""

    def lines(self, lines: bytes) -> None:
        """Header lines, each but the last with its line end; sent before the head."""
        self._lines = lines + b"\r\n"

    def head(self, status: int, sse: bool, data: bytes, end: bool, tokens: bytes = b"") -> None:
        """The first frame: the HTTP status, and whether the answer is an event stream. `end`: it is
        also the last.
        """
        self._progressed()
        self._request.outbox.frame(
            self._sid,
            status << messages.STATUS_SHIFT
            | (messages.SSE if sse else 0)
            | (messages.LINES if self._lines else 0)
            | (messages.END if end else 0),
            self._lines + data,
            tokens if self._movable else b"",
        )
        if end:
            self._end()

    def answered(self, status: int, data: bytes) -> None:
        """The whole answer for the client. The rest is made in the background. It is no progress:
        the engine has made nothing yet.
        """
        flags = status << messages.STATUS_SHIFT | messages.ANSWERED
        self._request.outbox.frame(self._sid, flags, data)

    def more(self, data: bytes, end: bool, tokens: bytes = b"") -> None:
        """A later frame."""
        flags = messages.END if end else 0
        self._request.outbox.frame(self._sid, flags, data, tokens if self._movable else b"")
        if end:
            self._end()

    async def room(self) -> None:
        await self._request.session.room()

    def progress(self, tokens: bytes) -> None:
        """Tokens of an answer that is sent whole at its end. They are reported every
        PROGRESS_TOKENS.
        """
        if not self._movable or self.ended:
            return
        self._unsent += tokens
        if len(self._unsent) >= PROGRESS_TOKENS * BYTES_PER_TOKEN:
            self._progressed()
            self._request.outbox.frame(self._sid, messages.TOKENS, b"", self._unsent)
            self._unsent = b""

    def stored(self, copy: bytes) -> None:
        """The engine stores the answer, which ends now. `copy` is for another worker."""
        request = self._request
        if not request.alone:
            request.session.outbox.send(messages.StoredCopy(request.message.answer_id, copy))

    def _progressed(self) -> None:
        if self._request.trial is not None:
            self._request.trial.progressed()

    def _end(self) -> None:
        self.ended = True
        self.account()

    def account(self) -> None:
        """Reports what the request has used up to now."""
        request = self._request
        wait_s = request.started - request.arrived
        was_loaded = request.came_from is not messages.Tier.GPU
        load_s = wait_s - request.slot_wait_s if was_loaded else 0.0
        fetch_s = check_s = 0.0
        if request.adapter is not None and request.came_from >= messages.Tier.DISK:
            # who came while it was under way has waited for a part of them
            check_s = min(request.adapter.check_s, load_s)
            fetch_s = min(request.adapter.fetch_s, load_s - check_s)
        request.outbox.done(
            messages.Done(
                self._sid,
                self.prompt_tokens,
                self.output_tokens,
                wait_s,
                load_s,
                request.came_from,
                fetch_s,
                check_s,
                self.finish_reasons,
            )
        )
