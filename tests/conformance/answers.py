"""Pure. An answer with all that is left to chance taken out, and what differs between two.

Ids, times and how many tokens one event holds are no part of an answer. Everything else is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from shared.error_bodies import error_type

_IDS = re.compile(
    r"\b(chatcmpl-tool|chatcmpl|cmpl|resp|msg|rs|fc|embd|score|rerank|pool|classify|"
    r"tokenize|detokenize|modelperm|call|toolu)[-_][0-9A-Za-z-]{8,}"
)
_HEX = re.compile(r"\b[0-9a-f]{16,}(?:-[0-9a-f]+)*\b")
_FLAG = re.compile(r"--([a-z][a-z0-9-]*)")
_FIELDS = re.compile(r"<dict of \d+ items>")
"""How vLLM shows a body; ours has the id of its answer in it."""
_TIMES = frozenset(("created", "created_at", "completed_at"))
_IDENTITIES = frozenset(("id", "item_id", "response_id", "request_id", "previous_response_id"))
_GROWING = frozenset(
    ("content", "text", "delta", "reasoning", "token_ids", "partial_json", "arguments")
)
"""Parts of an event that another event of the same kind may continue."""
_SET_ONCE = frozenset(("finish_reason", "stop_reason", "system_fingerprint"))
"""Parts that come with the last piece, or alone after it."""
_LISTS = frozenset(("token_ids", "logprobs", "content", "tokens", "token_logprobs")) | {
    "top_logprobs",
    "text_offset",
}
NEAR, NEAR_ZERO = 1e-3, 1e-4
"""How far two figures may be apart: sums are made in another order where batches differ."""
_COUNTED = frozenset(("usage", "sequence_number"))
"""Parts that tell how far a stream is; in all but the last event they depend on its steps."""
_LOST = object()


@dataclass(frozen=True, slots=True)
class Answer:
    """As it came."""

    status: int
    kind: str
    body: bytes
    allow: str = ""

    @property
    def streams(self) -> bool:
        return self.kind.startswith("text/event-stream")


@dataclass(frozen=True, slots=True)
class Difference:
    """`kind`: status, type, shape, message, param, body, events. `ours` and `theirs` are short."""

    kind: str
    where: str
    ours: str
    theirs: str


def differences(ours: Answer, theirs: Answer) -> Iterator[Difference]:
    """Of our answer and vLLM's. The first kind that is found tells most."""
    if ours.status != theirs.status:
        yield Difference("status", "", _said(ours), _said(theirs))
        return
    if ours.status >= 400:
        yield from _errors(ours, theirs)
        return
    if ours.kind.partition(";")[0] != theirs.kind.partition(";")[0]:
        yield Difference("type", "", ours.kind, theirs.kind)
        return
    if ours.streams:
        yield from _apart("events", "", merged(ours.body), merged(theirs.body))
    else:
        yield from _apart("body", "", _value(ours.body), _value(theirs.body))


def merged(body: bytes) -> list[Any]:
    """The events of a stream. Those that follow one another and continue the same thing are one."""
    found: list[Any] = []
    for new in _by_choice(_events(body)):
        joined = _joined(found[-1], new) if found else _LOST
        if joined is _LOST:
            found.append(new)
        else:
            found[-1] = joined
    for event in found[:-3]:
        _drop(event, _COUNTED)
    for event in found:
        _drop(event, frozenset(("sequence_number",)))
    return found


def _events(body: bytes) -> Iterator[Any]:
    for event in body.replace(b"\r\n", b"\n").split(b"\n\n"):
        lines = [line for line in event.split(b"\n") if line and not line.startswith(b":")]
        if not lines:
            continue
        name = b"".join(line[6:].strip() for line in lines if line.startswith(b"event:"))
        data = b"".join(line[5:].strip() for line in lines if line.startswith(b"data:"))
        yield {"event": name.decode(), "data": _value(data)}


def _by_choice(events: Iterable[Any]) -> list[Any]:
    """Which of several choices comes first in a step is up to the engine."""
    return sorted(events, key=_choice)


def _choice(event: Any) -> int:
    data = event["data"]
    choices = data.get("choices") if isinstance(data, dict) else None
    if choices is None:
        return 0 if isinstance(data, dict) else AFTER_ALL
    return int(choices[0].get("index", 0)) if choices else AFTER_ALL


AFTER_ALL = 1 << 30


def _errors(ours: Answer, theirs: Answer) -> Iterator[Difference]:
    given = _value(ours.body)
    error = given.get("error") if isinstance(given, dict) else None
    if not ours.body and not theirs.body:  # to a HEAD
        return
    if (
        not isinstance(error, dict)
        or {*error} != {"message", "type", "param", "code"}
        or not isinstance(error["code"], str)
        or error["code"].isdigit()
        or error["type"].removesuffix("_error") == error["type"]
    ):
        yield Difference("shape", "", _short(given), _short(_value(theirs.body)))
        return
    said = _value(theirs.body)
    inner = said.get("error", said) if isinstance(said, dict) else {"message": str(said)}
    message = inner.get("message") or inner.get("detail")
    said_here, said_there = (_FIELDS.sub("<dict>", str(m)) for m in (error["message"], message))
    if said_here != _FLAG.sub(_as_key, said_there):
        yield Difference("message", "", _short(error["message"]), _short(message))
    elif error["param"] != inner.get("param"):
        yield Difference("param", "", _short(error["param"]), _short(inner.get("param")))
    if error["type"] not in (error_type(ours.status), "overloaded_error", "api_error"):
        yield Difference("shape", "type", error["type"], error_type(ours.status))
    if ours.allow != theirs.allow and theirs.allow:
        yield Difference("shape", "Allow", ours.allow, theirs.allow)


def _as_key(flag: re.Match[str]) -> str:
    """A message of ours names the key that its reader has in a file."""
    return "engine_kwargs." + flag[1].replace("-", "_")


def _apart(kind: str, where: str, ours: Any, theirs: Any) -> Iterator[Difference]:
    """Where two values first differ, along every path."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted({*ours} | {*theirs}):
            a, b = ours.get(key, _LOST), theirs.get(key, _LOST)
            yield from _apart(kind, f"{where}.{key}", a, b)
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for a, b in zip(ours, theirs, strict=True):
            yield from _apart(kind, f"{where}[]", a, b)
    elif isinstance(ours, float) and isinstance(theirs, float):
        if not math.isclose(ours, theirs, rel_tol=NEAR, abs_tol=NEAR_ZERO):
            yield Difference(kind, where, str(ours), str(theirs))
    elif ours != theirs:
        yield Difference(kind, where, _short(ours), _short(theirs))


def _value(body: bytes) -> Any:
    try:
        return _plain("", msgspec.json.decode(body))
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return body.decode("latin1")


def _plain(key: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(name, part) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain("", part) for part in value]
    if key in _TIMES and isinstance(value, int):
        return "TIME"
    if isinstance(value, str):
        if key == "system_fingerprint":  # ends with a hash of all arguments
            return value.rpartition("-")[0]
        if key in _IDENTITIES:
            value = _HEX.sub("ID", value)
        return _IDS.sub(r"\1-ID", value)
    return value


def _joined(before: Any, after: Any) -> Any:
    """The one event that says what these two say; _LOST where they are not of one kind."""
    if isinstance(before, dict) and isinstance(after, dict):
        if ({*before} ^ {*after}) - _SET_ONCE or not {*before} <= {*after}:
            return _LOST
        found: dict[str, Any] = {}
        for key, new in after.items():
            value = before.get(key)
            if key in _GROWING and isinstance(value, str) and isinstance(new, str):
                found[key] = value + new
            elif key in _COUNTED or (key in _SET_ONCE and value is None):
                found[key] = new
            elif key in _LISTS:
                found[key] = _longer(value, new)
            else:
                found[key] = _joined(value, new)
            if found[key] is _LOST:
                return _LOST
        return found
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        parts = [_joined(a, b) for a, b in zip(before, after, strict=True)]
        return _LOST if any(part is _LOST for part in parts) else parts
    return before if before == after else _LOST


def _longer(before: Any, after: Any) -> Any:
    if isinstance(before, list) and isinstance(after, list):
        return before + after
    if isinstance(before, dict) and isinstance(after, dict):
        return _joined(before, after)
    return before if before == after else _LOST


def _drop(value: Any, names: frozenset[str]) -> None:
    if isinstance(value, dict):
        for name in names & {*value}:
            del value[name]
        for part in value.values():
            _drop(part, names)
    elif isinstance(value, list):
        for part in value:
            _drop(part, names)


def _said(answer: Answer) -> str:
    return f"{answer.status} {_short(_value(answer.body))}"


def _short(value: Any) -> str:
    if value is _LOST:
        return "(nothing)"
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return text if len(text) <= 160 else text[:157] + "..."
