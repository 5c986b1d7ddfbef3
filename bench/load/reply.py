"""Pure. One HTTP/1.1 answer read from bytes: framing, server-sent events, and the few fields of
each event that are measured or checked.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import msgspec

from bench.load.measure import Meter

MAX_HEAD_BYTES = 64 << 10
MAX_EVENT_BYTES = 1 << 20
MAX_BODY_BYTES = 16 << 20
MAX_DETAIL_CHARS = 200


class _Text(msgspec.Struct, gc=False):
    """A `delta` or a `message`: what counts as content, under the names in use."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _ReplyChoice(msgspec.Struct, gc=False):
    delta: _Text | None = None
    message: _Text | None = None
    text: str | None = None
    finish_reason: str | None = None


class _ReplyUsage(msgspec.Struct, gc=False):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Document(msgspec.Struct, gc=False):
    """A streamed event, a whole answer or an error body, as far as they are read."""

    choices: list[_ReplyChoice] = []
    usage: _ReplyUsage | None = None
    error: Any = None  # an object in OpenAI's shape, a string elsewhere
    object: str = ""
    message: str | None = None


_decode = msgspec.json.Decoder(_Document).decode


def _has_content(choice: _ReplyChoice) -> bool:
    text = choice.delta or choice.message
    return bool(
        choice.text
        or (text is not None and (text.content or text.reasoning_content or text.reasoning))
    )


class _Framing(Enum):
    HEAD = auto()
    LENGTH = auto()
    CHUNKED = auto()
    TRAILER = auto()
    UNTIL_CLOSE = auto()


@dataclass(slots=True)
class LoadReply:
    """One answer being read, and what was measured of it. Times are `perf_counter` seconds.

    `error` is None for a good answer, else its kind: `connect_failed`, `timeout`, `closed_early`,
    `bad_http`, `http_<status>`, `not_a_stream`, `bad_event`, `error_event`, `no_done`,
    `no_finish_reason`, `bad_body`, `too_large`.
    """

    stream: bool
    meter: Meter
    first_byte_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    ended_s: float = 0.0
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    content_chunks: int = 0
    prompt_tokens: int | None = None
    usage_tokens: int | None = None
    finish_reason: str | None = None
    done: bool = False
    complete: bool = False
    error: str | None = None
    detail: str = ""
    body: bytes = b""
    _framing: _Framing = _Framing.HEAD
    _rest: bytes = b""
    _event_rest: bytes = b""
    _left: int = 0
    _is_stream: bool = False

    @property
    def keep_alive(self) -> bool:
        return (
            self.complete
            and self.headers.get("connection", "").lower() != "close"
            and self._framing is not _Framing.UNTIL_CLOSE
        )

    def fail(self, kind: str, detail: str = "") -> None:
        """Ends the answer with an error; the first one counts."""
        if self.error is None:
            self.error, self.detail = kind, detail[:MAX_DETAIL_CHARS]

    def feed(self, data: bytes, now: float) -> None:
        """Takes bytes as they came from the socket. Afterwards `complete` says whether the answer
        has ended, `error` whether it went wrong.
        """
        try:
            if self._framing is _Framing.HEAD:
                data = self._read_head(data, now)
            if data and self._framing is not _Framing.HEAD:
                self._read_body(data, now)
        except ValueError as error:
            self.fail("bad_http", str(error))

    def _read_head(self, data: bytes, now: float) -> bytes:
        if self.first_byte_s is None:
            self.first_byte_s = now
        data = self._rest + data
        while True:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                if len(data) > MAX_HEAD_BYTES:
                    raise ValueError("the head never ends")
                self._rest = data
                return b""
            head, data = data[:end].decode("latin-1"), data[end + 4 :]
            status_line, *lines = head.split("\r\n")
            if not status_line.startswith("HTTP/1."):
                raise ValueError(f"no HTTP status line: {status_line[:40]!r}")
            status = int(status_line[9:12])
            if status >= 200:  # 1xx heads come before the real one
                break
        self.status, self._rest = status, b""
        self.headers = {
            name.strip().lower(): text.strip()
            for name, _, text in (line.partition(":") for line in lines)
        }
        self._is_stream = status == 200 and self.stream
        if self._is_stream and not self.headers.get("content-type", "").startswith(
            "text/event-stream"
        ):
            self._is_stream = False
            self.fail("not_a_stream", f"content-type {self.headers.get('content-type', 'missing')}")
        self._choose_framing()
        return data

    def _choose_framing(self) -> None:
        if self.headers.get("transfer-encoding", "").lower().endswith("chunked"):
            self._framing = _Framing.CHUNKED
        elif "content-length" in self.headers:
            self._framing, self._left = _Framing.LENGTH, int(self.headers["content-length"])
            self.complete = self._left == 0
        elif self.status in (204, 304):
            self._framing, self.complete = _Framing.LENGTH, True
        else:
            self._framing = _Framing.UNTIL_CLOSE

    def _read_body(self, data: bytes, now: float) -> None:
        if self._framing is _Framing.CHUNKED:
            self._take(self._dechunk(data), now)
        elif self._framing is _Framing.LENGTH:
            self._left -= len(data)
            if self._left < 0:
                raise ValueError("more bytes than Content-Length")
            self.complete = self._left == 0
            self._take(data, now)
        elif self._framing is _Framing.UNTIL_CLOSE:
            self._take(data, now)
        else:
            self._read_trailer(data)

    def _dechunk(self, data: bytes) -> bytes:
        if self._rest:
            data = self._rest + data
        payloads: list[bytes] = []
        at = 0
        while True:
            line_end = data.find(b"\r\n", at)
            if line_end < 0:
                break
            size = int(data[at:line_end].partition(b";")[0], 16)
            if size == 0:
                self._framing, self._rest = _Framing.TRAILER, b""
                self._read_trailer(data[line_end:])
                return b"".join(payloads)
            payload_end = line_end + 2 + size
            if len(data) < payload_end + 2:
                if size > MAX_BODY_BYTES:
                    raise ValueError("a chunk is larger than any answer")
                break
            if data[payload_end : payload_end + 2] != b"\r\n":
                raise ValueError("a chunk does not end where it says")
            payloads.append(data[line_end + 2 : payload_end])
            at = payload_end + 2
        self._rest = data[at:]
        return payloads[0] if len(payloads) == 1 else b"".join(payloads)

    def _read_trailer(self, data: bytes) -> None:
        """`_rest` starts with the line end of the last chunk's size, so an empty trailer ends the
        body with the same mark as a full one.
        """
        self._rest += data
        if self._rest.endswith(b"\r\n\r\n"):
            self.complete = True
        elif len(self._rest) > MAX_HEAD_BYTES:
            raise ValueError("the trailer never ends")

    def _take(self, payload: bytes, now: float) -> None:
        if self._is_stream:
            self._read_events(payload, now)
        elif len(self.body) + len(payload) > MAX_BODY_BYTES:
            self.fail("too_large", f"the answer is over {MAX_BODY_BYTES} bytes")
        else:
            self.body += payload

    def _read_events(self, payload: bytes, now: float) -> None:
        if self._event_rest:
            payload = self._event_rest + payload
        # the standard allows CRLF lines; JSON holds no raw CR, so nothing else can be meant
        if b"\r" in payload:
            payload = payload.replace(b"\r\n", b"\n")
        *events, self._event_rest = payload.split(b"\n\n")
        if len(self._event_rest) > MAX_EVENT_BYTES:
            self.fail("too_large", f"one event is over {MAX_EVENT_BYTES} bytes")
        before = self.content_chunks
        for event in events:
            if event.startswith(b"data: ") and b"\n" not in event:
                self._read_event(event[6:], now)
            else:
                self._read_event(_event_data(event), now)
        if self.content_chunks > before:
            self.meter.tokens(self.content_chunks - before, now)

    def _read_event(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self.done = True
            return
        if not data:
            return
        try:
            document = _decode(data)
        except msgspec.MsgspecError as error:
            self.fail("bad_event", f"{error}: {data[:80]!r}")
            return
        if document.error is not None or document.object == "error":
            self.fail("error_event", _message(data))
            return
        for choice in document.choices:
            if _has_content(choice):
                self._count_chunk(now)
            if choice.finish_reason is not None:
                self.finish_reason = choice.finish_reason
        if document.usage is not None:
            self.prompt_tokens, self.usage_tokens = (
                document.usage.prompt_tokens,
                document.usage.completion_tokens,
            )

    def _count_chunk(self, now: float) -> None:
        self.content_chunks += 1
        if self.last_token_s is None:
            self.first_token_s = now
        else:
            self.meter.gap(now - self.last_token_s)
        self.last_token_s = now

    def close(self, now: float) -> None:
        """The answer ends here, complete or not: says what is wrong with it, if anything is."""
        self.ended_s = now
        if self._framing is _Framing.UNTIL_CLOSE:
            self.complete = True
        if self.status is not None and self.status != 200:
            self.fail(f"http_{self.status}", _message(self.body))
        elif not self.complete:
            self.fail(
                "closed_early",
                "the connection closed before the answer began"
                if self.status is None
                else "the answer was cut off",
            )
        elif not self.stream:
            self._read_whole(now)
        elif not self.done:
            self.fail("no_done", "the stream ended without [DONE]")
        elif self.finish_reason is None:
            self.fail("no_finish_reason", "the stream ended without a finish_reason")

    def _read_whole(self, now: float) -> None:
        try:
            document = _decode(self.body)
        except msgspec.MsgspecError as error:
            self.fail("bad_body", str(error))
            return
        if document.error is not None or not document.choices:
            self.fail("bad_body", _message(self.body))
        elif document.choices[0].finish_reason is None:
            self.fail("no_finish_reason", "the answer has no finish_reason")
        if document.usage is not None:
            self.prompt_tokens, self.usage_tokens = (
                document.usage.prompt_tokens,
                document.usage.completion_tokens,
            )
            self.meter.tokens(document.usage.completion_tokens, now)


def _event_data(event: bytes) -> bytes:
    """The data of an event that is not a single `data: ` line: fields with or without the space,
    comments, several lines.
    """
    lines = (line for line in event.split(b"\n") if line.startswith(b"data:"))
    return b"\n".join(line[5:].removeprefix(b" ") for line in lines)


def _message(body: bytes) -> str:
    """What an error body says to people: OpenAI's `error.message`, or the usual deviations from it;
    else the body's beginning.
    """
    try:
        document = _decode(body)
    except msgspec.MsgspecError:
        return body[:MAX_DETAIL_CHARS].decode(errors="replace")
    message = document.error.get("message") if isinstance(document.error, dict) else document.error
    return str(message or document.message or body[:MAX_DETAIL_CHARS].decode(errors="replace"))
