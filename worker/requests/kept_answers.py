"""Pure. The answers that this worker keeps for clients that may ask again with the same
`Idempotency-Key`. Each is recorded while it is sent, and goes on even if nobody listens. A client
that asks again gets it once more from its start.

A tag says whose an answer is. The gateway derives it from the account and the client's key. So no
account can name the answer of another one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import msgspec

from shared.errors import WorkerUnavailable
from shared.link import messages
from worker.settings import KeepBounds

OK = 200
MAX_UNHEARD = 32
"""Answers that are generated while nobody listens, each until its time is over. Beyond that the one
that was left first is given up, because they take places of the engine.
"""


class FrameSink(Protocol):
    """Where the frames of one gateway go (see Outbox)."""

    def frame(
        self, sid: messages.StreamId, flags: int, data: bytes, tokens: bytes = b""
    ) -> None: ...
    def done(self, done: messages.Done) -> None: ...
    def refuse(self, refused: messages.Refused) -> None: ...


@dataclass(frozen=True, slots=True)
class AnswerListener:
    """A stream of a gateway that gets the answer. `session` is that gateway's session."""

    session: object
    sink: FrameSink
    sid: messages.StreamId


class KeptAnswer:
    """One answer, from its request on. For its request it is the FrameSink. It keeps what it has
    sent as one head and the bytes that followed, so a joiner gets the same bytes in fewer frames.
    """

    def __init__(
        self,
        number: int,
        message: messages.Generate,
        key: messages.AnswerKey,
        first: AnswerListener,
    ) -> None:
        self.number, self.key = number, key
        self.request_id, self.created = message.request_id, message.created
        self._first, self.listeners = first, [first]
        self.unheard_since = math.inf
        self.ended = False
        # Of an answer that has begun on another worker. Its engine renders the begin once more, and
        # who joins before that has happened waits for it.
        self._elsewhere = b"" if message.resume is None else message.resume.tokens
        self._awaits_begin = message.resume is not None
        self._joined_early: list[AnswerListener] = []
        self.size_bytes = 0
        self.grown: Callable[[int], None] = lambda _: None
        self.refused: Callable[[], None] = lambda: None
        self._head: tuple[int, bytes, bytes] | None = None
        self._early, self._body, self._words = bytearray(), bytearray(), bytearray()
        self._wordless = False  # some bytes came without their tokens
        self._used = messages.Done(0)
        self._charged = messages.Done(0)

    # ---- from its request ------------------------------------------------------------------------

    def frame(self, sid: messages.StreamId, flags: int, data: bytes, tokens: bytes = b"") -> None:
        if self._awaits_begin:
            self._take_begin(flags)
        self._record(flags, data, tokens)
        for listener in self.listeners:
            listener.sink.frame(listener.sid, flags, data, tokens)

    def seen(self, data: bytes) -> None:
        """Bytes of a stream that its client has had from another worker. Of several choices one may
        lag behind, so some come after the first frame.
        """
        if self._head is None:
            self._head = (OK << messages.STATUS_SHIFT | messages.SSE, data, self._elsewhere)
        else:
            self._body += data
        self._add(len(data))
        if not self._awaits_begin:
            for listener in self.listeners:
                if listener is not self._first:
                    listener.sink.frame(listener.sid, 0, data)

    def done(self, done: messages.Done) -> None:
        """What the answer has used so far is charged once, to the listener who came last. The
        gateways of the others may be dead without anybody having noticed.
        """
        self._used = done
        for listener in self.listeners:
            listener.sink.done(self._bill(listener, charge=listener is self.listeners[-1]))

    def refuse(self, refused: messages.Refused) -> None:
        """No more of it comes. Nobody may join from now on: it would wait for ever."""
        self.refused()
        for listener in self.listeners:
            listener.sink.refuse(msgspec.structs.replace(refused, sid=listener.sid))

    # ---- from gateways ---------------------------------------------------------------------------

    def join(self, listener: AnswerListener) -> None:
        """Sends everything there is, and what follows if the answer has not ended."""
        if self._awaits_begin:
            self._joined_early.append(listener)
        else:
            self._send_all(listener)
        if not self.ended:
            self.listeners.append(listener)
            self.unheard_since = math.inf

    def _send_all(self, listener: AnswerListener) -> None:
        sink, sid, end = listener.sink, listener.sid, messages.END if self.ended else 0
        if self._early:
            sink.frame(sid, messages.TOKENS, b"", bytes(self._early))
        if self._head is not None:
            sink.frame(sid, *self._head)
            if self._body or (end and not self._head[0] & messages.END):
                words = b"" if self._wordless else bytes(self._words)
                sink.frame(sid, end, bytes(self._body), words)
        if self.ended:
            sink.done(self._bill(listener, charge=True))

    def leave(self, session: object, sid: messages.StreamId, now: float) -> None:
        """The listener wants no more of it."""
        self.listeners = [x for x in self.listeners if (x.session, x.sid) != (session, sid)]
        if not self.listeners:
            self.unheard_since = min(self.unheard_since, now)

    # ---- inside ----------------------------------------------------------------------------------

    def _take_begin(self, flags: int) -> None:
        """The first frame of an answer that goes on here comes next. Its begin is known: what
        `seen` was called with of a stream, and the tokens alone of an answer that is sent whole.
        """
        self._awaits_begin = False
        if flags == messages.TOKENS or not flags & messages.SSE:
            self._early += self._elsewhere
        elif self._head is None:
            self.refused()
        for listener in self._joined_early:
            if flags & messages.SSE and self._head is None:
                why = "The begin of this answer is not known here."
                refused = messages.Refused(listener.sid, WorkerUnavailable.code, why, True)
                listener.sink.refuse(refused)
            elif listener in self.listeners:
                self._send_all(listener)
        self._joined_early.clear()

    def _record(self, flags: int, data: bytes, tokens: bytes) -> None:
        self.ended = bool(flags & messages.END)
        if flags == messages.TOKENS:
            self._early += tokens
        elif self._head is None:
            self._head = (flags, data, tokens)
        else:
            self._body += data
            self._words += tokens
            self._wordless = self._wordless or not (tokens or self.ended)
        self._add(len(data) + len(tokens))

    def _add(self, size_bytes: int) -> None:
        self.size_bytes += size_bytes
        self.grown(size_bytes)

    def _bill(self, listener: AnswerListener, *, charge: bool) -> messages.Done:
        used, before = self._used, self._charged
        if not charge:
            before = used
        else:
            self._charged = used
        return msgspec.structs.replace(
            used,
            sid=listener.sid,
            prompt_tokens=max(0, used.prompt_tokens - before.prompt_tokens),
            output_tokens=max(0, used.output_tokens - before.output_tokens),
        )


class KeptAnswers:
    """All answers that are kept, by their tags, oldest first."""

    def __init__(self, bounds: KeepBounds) -> None:
        self._bounds = bounds
        self._answers: dict[bytes, KeptAnswer] = {}
        self._total_bytes = 0

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, tag: bytes) -> KeptAnswer | None:
        return self._answers.get(tag)

    def holds(self, answer: KeptAnswer) -> bool:
        """Whether somebody may still ask for it. False: it was dropped."""
        return self._answers.get(answer.key.tag) is answer

    def begin(
        self, number: int, message: messages.Generate, first: AnswerListener
    ) -> KeptAnswer | None:
        """Begins to keep the answer. None if the request does not ask for it, if its answer has
        begun elsewhere, or if no answer is kept here.
        """
        return None if message.resume is not None else self.go_on(number, message, first)

    def go_on(
        self, number: int, message: messages.Generate, first: AnswerListener
    ) -> KeptAnswer | None:
        """Like `begin`, also for an answer that has begun elsewhere."""
        key = message.key
        if key is None or not self._bounds.keep_s:
            return None
        before = self._answers.get(key.tag)
        if before is not None:
            self._drop(before)
        answer = self._answers[key.tag] = KeptAnswer(number, message, key, first)
        answer.grown, answer.refused = self._grow, functools.partial(self._drop, answer)
        return answer

    def over(self, answer: KeptAnswer, now: float) -> None:
        """The answer's request has left the engine. An answer without an end is dropped, because
        nobody can use it.
        """
        if not answer.ended:
            self._drop(answer)
        else:
            answer.listeners.clear()
            answer.unheard_since = min(answer.unheard_since, now)

    def expire(self, now: float) -> list[KeptAnswer]:
        """Drops the answers whose time is over, and those beyond the bounds: ended ones first, the
        oldest first. Returns those of them that are still generated and that nobody listens to.
        """
        bounds, answers = self._bounds, list(self._answers.values())
        gone = [a for a in answers if now - a.unheard_since > bounds.keep_s]
        unheard = [a for a in answers if not a.ended and not a.listeners and a not in gone]
        unheard.sort(key=lambda a: a.unheard_since)
        gone += unheard[: max(0, len(unheard) - MAX_UNHEARD)]
        for answer in gone:
            self._drop(answer)
        for answer in sorted(self._answers.values(), key=lambda a: not a.ended):
            if len(self) <= bounds.max_answers and self._total_bytes <= bounds.max_bytes:
                break
            self._drop(answer)
            gone.append(answer)
        return [a for a in gone if not a.ended and not a.listeners]

    def _drop(self, answer: KeptAnswer) -> None:
        if self.holds(answer):
            del self._answers[answer.key.tag]
            self._total_bytes -= answer.size_bytes
        answer.grown = lambda _: None

    def _grow(self, size_bytes: int) -> None:
        self._total_bytes += size_bytes
