"""Pure. Is the answer that a client got the one that was due? Every token, the id, the usage and
the end are looked at.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

MOVED = b": continued by another worker"
SHOWN_CHARACTERS = 160
"""Of a text in a message."""


class Verdict(enum.Enum):
    WHOLE = "whole"
    FAILED = "failed"
    """It ended with an honest error, or was cut. What came before is right."""
    WRONG = "wrong"
    """It has a token that was not due, lacks one, or ends as if it were whole and is not."""


@dataclass(frozen=True, slots=True)
class Due:
    """What an undisturbed cluster answers to the same question."""

    text: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Judgement:
    verdict: Verdict
    detail: str = ""
    moves: int = 0


@dataclass(slots=True)
class ReadStream:
    """What the events of one stream say."""

    text: str = ""
    tokens: int | None = None
    error: str = ""
    finished: bool = False
    done: int = 0
    after_done: bool = False
    moves: int = 0
    heads: set[tuple[Any, ...]] = field(default_factory=set)
    """(id, created, model) of its events: one of each."""


def read_stream(raw: bytes) -> ReadStream:
    """Raises ValueError for an event that is no JSON."""
    stream = ReadStream(moves=raw.count(MOVED))
    for data in _events(raw):
        stream.after_done = stream.after_done or bool(stream.done)
        if data == b"[DONE]":
            stream.done += 1
            continue
        event = json.loads(data)
        if "error" in event:
            stream.error = str(event["error"].get("message"))
            continue
        stream.heads.add((event["id"], event["created"], event["model"]))
        for choice in event["choices"]:
            stream.text += choice["delta"].get("content") or ""
            stream.finished = stream.finished or bool(choice["finish_reason"])
        if event.get("usage"):
            stream.tokens = event["usage"]["completion_tokens"]
    return stream


def judge_stream(raw: bytes, due: Due) -> Judgement:
    """`raw`: all bytes of a stream that was answered with 200, up to its end or its cut."""
    try:
        stream = read_stream(raw)
    except (ValueError, KeyError, TypeError) as exc:
        return Judgement(Verdict.WRONG, f"unreadable ({exc!r}): {raw[-SHOWN_CHARACTERS:]!r}")
    wrong = _wrong(stream, due)
    if wrong:
        return Judgement(Verdict.WRONG, wrong, stream.moves)
    if stream.error:
        return Judgement(Verdict.FAILED, stream.error[:SHOWN_CHARACTERS], stream.moves)
    if not stream.done:
        return Judgement(Verdict.FAILED, f"cut after {len(stream.text)} characters", stream.moves)
    return Judgement(Verdict.WHOLE, "", stream.moves)


def judge_whole(body: bytes, due: Due) -> Judgement:
    """`body`: an answer with 200 to a request without `stream`."""
    try:
        answer = json.loads(body)
        choice = answer["choices"][0]
        text, tokens = choice["message"]["content"], answer["usage"]["completion_tokens"]
    except (ValueError, KeyError, IndexError, TypeError) as exc:
        return Judgement(Verdict.WRONG, f"unreadable ({exc!r}): {body[-SHOWN_CHARACTERS:]!r}")
    if text != due.text or not choice["finish_reason"]:
        return Judgement(Verdict.WRONG, _difference(text, due.text))
    if tokens != due.tokens:
        return Judgement(Verdict.WRONG, f"usage says {tokens} tokens, {due.tokens} were due")
    return Judgement(Verdict.WHOLE)


def read_due(raw: bytes) -> Due:
    """The answer of an undisturbed cluster. Raises ValueError if it is not whole."""
    stream = read_stream(raw)
    if stream.error or stream.done != 1 or not stream.finished or stream.tokens is None:
        raise ValueError(f"the undisturbed answer is not whole: {raw[-SHOWN_CHARACTERS:]!r}")
    return Due(stream.text, stream.tokens)


def goes_on_from(begun: bytes, raw: bytes) -> bool:
    """Whether a stream has the events that its client got of it at an earlier gateway. The last of
    them may have been cut.
    """
    return b"".join(_events(raw)).startswith(b"".join([*_events(begun)][:-1]))


def _wrong(stream: ReadStream, due: Due) -> str:
    """Why this cannot be a right answer. Empty: it can."""
    if stream.done > 1 or stream.after_done:
        return "it ended twice"
    if len(stream.heads) > 1:
        return f"its id, time or model changed: {sorted(stream.heads)}"
    if not due.text.startswith(stream.text):
        return _difference(stream.text, due.text)
    if stream.error or not stream.done:
        return ""
    if stream.text != due.text or not stream.finished:
        return _difference(stream.text, due.text)
    if stream.tokens != due.tokens:
        return f"usage says {stream.tokens} tokens, {due.tokens} were due"
    return ""


def _difference(text: str, due: str) -> str:
    pairs = enumerate(zip(text, due, strict=False))
    at = next((i for i, (got, want) in pairs if got != want), min(len(text), len(due)))
    shown = slice(max(0, at - 12), at + 24)
    return f"at character {at}: {text[shown]!r} where {due[shown]!r} was due"


def _events(raw: bytes) -> Iterator[bytes]:
    for line in raw.split(b"\n"):
        if line.startswith(b"data: "):
            yield line[6:].strip()
