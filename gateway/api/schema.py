"""Pure. The one place that says which fields of a request body the gateway reads, of which type
they are and how large they may be.

Types are as wide as vLLM's (pydantic takes 5.0, "5" and true for 5), and never wider than
arithmetic stands: no infinity, no NaN, nothing negative, nothing of 400 digits gets further than
here. Everything else of a body is passed on unread.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Annotated

import msgspec
from msgspec import Meta

from gateway.api.forms import form_values
from shared.endpoints import Endpoint, ModelIn
from shared.errors import InvalidRequest

MAX_MODEL_CHARACTERS = 1024
"""Of a model's name: a base id, an adapter and a digest. It comes back in messages and logs."""
MAX_COUNT = (1 << 31) - 1
"""Of tokens, sequences or log probabilities: more than any engine has, and exact as a float."""
MAX_PRIORITY = 10**9 - 1
MAX_LIST_ITEMS = 1024
"""Of lists that the engine goes through at every step: stop ids, biases, forbidden words."""
MAX_REPETITIONS = 10_000
"""Of a regular expression's `{m,n}`: as a grammar it has a state for each."""

Count = Annotated[int, Meta(ge=0, le=MAX_COUNT)]
CountOrAll = Annotated[int, Meta(ge=-1, le=MAX_COUNT)]
Name = Annotated[str, Meta(max_length=MAX_MODEL_CHARACTERS)]
Priority = Annotated[int, Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY)]
NOTHING = msgspec.Raw(b"")


class BodyFields(msgspec.Struct, frozen=True):
    """What the gateway reads of a request body. A Raw field is as it came: only its size counts,
    or its being the same.
    """

    model: Name | None = None
    stream: bool | None = False
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    priority: Priority | None = None
    n: Count | None = None
    max_output_tokens: Count | None = None
    previous_response_id: Name | None = None
    best_of: Count | None = None
    min_tokens: Count | None = None
    top_k: CountOrAll | None = None
    top_logprobs: CountOrAll | None = None
    prompt_logprobs: CountOrAll | None = None
    user: msgspec.Raw = NOTHING
    messages: msgspec.Raw = NOTHING
    prompt: msgspec.Raw = NOTHING
    input: msgspec.Raw = NOTHING
    documents: msgspec.Raw = NOTHING
    structured_outputs: msgspec.Raw = NOTHING
    response_format: msgspec.Raw = NOTHING
    tools: msgspec.Raw = NOTHING
    stop_token_ids: msgspec.Raw = NOTHING
    logprob_token_ids: msgspec.Raw = NOTHING
    logit_bias: msgspec.Raw = NOTHING
    bad_words: msgspec.Raw = NOTHING

    @property
    def limit(self) -> int | None:
        """Of the answer's tokens, by whichever name it was given."""
        return self.max_completion_tokens or self.max_tokens or self.max_output_tokens


class Bounds(msgspec.Struct, frozen=True):
    """How much one request may ask of a worker, which serves others beside it."""

    max_messages: int = 2048
    max_sequences: int = 64
    max_prompt_bytes: int = 8 << 20
    max_structured_choices: int = 1000
    max_structured_bytes: int = 64 << 10


JSON_TYPE = "application/json"
FORM_TYPE = "multipart/form-data"
DEFAULT_BOUNDS = Bounds()

_decode_fields = msgspec.json.Decoder(BodyFields).decode
_decode_raw_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_items = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_any = msgspec.json.Decoder().decode


def read_fields(
    endpoint: Endpoint, content_type: str, body: bytes, bounds: Bounds = DEFAULT_BOUNDS
) -> BodyFields:
    """Of a body as the endpoint takes it. A JSON body may come without a type.

    Raises InvalidRequest.
    """
    kind = content_type.partition(";")[0].strip().lower()
    expected = FORM_TYPE if endpoint.model_in is ModelIn.FORM else JSON_TYPE
    if kind != expected and (kind or expected == FORM_TYPE):
        raise InvalidRequest(
            f"The Content-Type of this request must be {expected}, "
            f"not {kind[:100] or 'left out'!r}."
        )
    if endpoint.model_in is ModelIn.FORM:
        values = form_values(content_type, body)
        stream = values.get("stream", "").lower() in ("true", "1", "on", "yes")
        return BodyFields(model=values.get("model") or None, stream=stream)
    return parse_body_fields(body, bounds)


BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""Some clients put it before their JSON. vLLM ignores it; a body is sent on without it."""


def parse_body_fields(body: bytes, bounds: Bounds = DEFAULT_BOUNDS) -> BodyFields:
    """Raises InvalidRequest, with `param` where a field is at fault."""
    try:
        fields = _decode_fields(body)
    except msgspec.ValidationError as exc:
        fields = _parse_leniently(body, exc)
    except msgspec.MsgspecError as exc:
        raise InvalidRequest(f"The request body is not valid JSON: {exc}") from exc
    except RecursionError as exc:
        raise InvalidRequest("The request body is nested too deeply.") from exc
    except UnicodeDecodeError as exc:
        raise InvalidRequest("The request body is not valid UTF-8.") from exc
    _check(fields, len(body), bounds)
    return fields


def sequences(fields: BodyFields) -> int:
    """How many the engine makes of the request: its choices, of each of its prompts."""
    each = fields.n or 1
    if fields.best_of is not None and fields.best_of > each:
        each = fields.best_of
    return each * _prompts(fields.prompt)


# ---- other forms of the same values --------------------------------------------------------------

_INTEGER = re.compile(r"\s*[+-]?[0-9]{1,20}(?:\.0{0,20})?\s*\Z")
_TRUE = frozenset(("1", "on", "t", "true", "y", "yes"))
_FALSE = frozenset(("0", "off", "f", "false", "n", "no"))


def _integer(value: object) -> int | None:
    """As pydantic takes it; None: it does not."""
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return int(value) if math.isfinite(value) and value.is_integer() else None
    if isinstance(value, str) and _INTEGER.match(value):
        return int(value.strip().partition(".")[0])
    return None


def _boolean(value: object) -> bool | None:
    if isinstance(value, (bool, int, float)):
        return bool(value) if value in (0, 1) else None
    if isinstance(value, str):
        word = value.lower()
        return True if word in _TRUE else False if word in _FALSE else None
    return None


def _between(least: int, most: int) -> Callable[[object], int]:
    def read(value: object) -> int:
        found = _integer(value)
        if found is None or not least <= found <= most:
            raise ValueError(f"a whole number from {least} to {most}")
        return found

    return read


def _flag(value: object) -> bool:
    found = _boolean(value)
    if found is None:
        raise ValueError("true or false")
    return found


_READERS: dict[str, Callable[[object], object]] = {
    "stream": _flag,
    "priority": _between(-MAX_PRIORITY, MAX_PRIORITY),
    **dict.fromkeys(
        ("max_tokens", "max_completion_tokens", "max_output_tokens", "n", "best_of", "min_tokens"),
        _between(0, MAX_COUNT),
    ),
    **dict.fromkeys(("top_k", "top_logprobs", "prompt_logprobs"), _between(-1, MAX_COUNT)),
}


def _parse_leniently(body: bytes, refused: msgspec.ValidationError) -> BodyFields:
    """For a body that has a field in another form than JSON's own."""
    try:
        raw = _decode_raw_fields(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        raise InvalidRequest(_told(refused)) from refused
    found: dict[str, object] = {}
    for name in BodyFields.__struct_fields__:
        if name not in raw:
            continue
        reader = _READERS.get(name)
        found[name] = raw[name] if reader is None else _read(name, raw[name], reader)
    for name in ("model", "previous_response_id"):
        if name in found:
            found[name] = _name(name, raw[name])
    return BodyFields(**found)  # type: ignore[arg-type]


def _read(name: str, raw: msgspec.Raw, reader: Callable[[object], object]) -> object:
    try:
        value = _decode_any(raw)
        return None if value is None else reader(value)
    except msgspec.MsgspecError as exc:  # a number of 5,000 digits, say
        raise InvalidRequest(f"`{name}` is out of range.", param=name) from exc
    except (ValueError, RecursionError) as exc:
        raise InvalidRequest(f"`{name}` must be {exc}.", param=name) from exc


def _name(field: str, raw: msgspec.Raw) -> str | None:
    try:
        value = _decode_any(raw)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        value = 0
    if value is not None and (not isinstance(value, str) or len(value) > MAX_MODEL_CHARACTERS):
        raise InvalidRequest(
            f"`{field}` must be a text of at most {MAX_MODEL_CHARACTERS} characters.", param=field
        )
    return value


def _told(refused: msgspec.ValidationError) -> str:
    return f"The request body is not what this path takes: {refused}"


# ---- how much ------------------------------------------------------------------------------------

SMALL_BYTES = 2048
"""A body that is no longer holds no list that is too long."""
_REGEX_TOKENS = re.compile(
    rb"\\\\.|(?P<open>\()|(?P<close>\))|(?P<times>\{(?P<least>[0-9]+)(?:,(?P<most>[0-9]*))?\})"
)


def _check(fields: BodyFields, size: int, bounds: Bounds) -> None:
    if fields.n is not None or fields.best_of is not None or fields.prompt is not NOTHING:
        count = sequences(fields)
        if count > bounds.max_sequences:
            raise InvalidRequest(
                f"The request asks for {count} sequences (prompts times `n`); at most "
                f"{bounds.max_sequences} are served at once.",
                param="prompt" if _is_list(fields.prompt) else "n",
            )
    if fields.structured_outputs is not NOTHING or fields.response_format is not NOTHING:
        _check_structured(fields, bounds)
    if size <= SMALL_BYTES:
        return
    if len(fields.messages) > 3 * bounds.max_messages:
        _check_items("messages", fields.messages, bounds.max_messages)
    _check_items("documents", fields.documents, bounds.max_messages)
    if len(fields.input) > bounds.max_messages and _prompts(fields.input) > bounds.max_messages:
        raise InvalidRequest(f"`input` has more than {bounds.max_messages} items.", param="input")
    for name in ("tools", "stop_token_ids", "logprob_token_ids", "bad_words"):
        _check_items(name, getattr(fields, name), MAX_LIST_ITEMS)
    if len(fields.logit_bias) > SMALL_BYTES and _items(fields.logit_bias) > MAX_LIST_ITEMS:
        raise InvalidRequest(
            f"`logit_bias` has more than {MAX_LIST_ITEMS} items.", param="logit_bias"
        )


def _check_items(name: str, raw: msgspec.Raw, most: int) -> None:
    if len(raw) > most and _items(raw) > most:
        raise InvalidRequest(f"`{name}` has more than {most} items.", param=name)


def _items(raw: msgspec.Raw) -> int:
    """Of a list or an object; anything else is for the worker to refuse."""
    if _is_list(raw):
        return len(_decode_items(raw))
    return len(_decode_raw_fields(raw)) if _first(raw) == ord("{") else 1


def _prompts(raw: msgspec.Raw) -> int:
    """A prompt is a text or a list of token ids; a list of either is several."""
    if not _is_list(raw):
        return 1
    after = bytes(memoryview(raw)[1:64]).lstrip()
    return 1 if after[:1].isdigit() or after[:1] == b"-" else max(1, len(_decode_items(raw)))


def _is_list(raw: msgspec.Raw) -> bool:
    return _first(raw) == ord("[")


def _first(raw: msgspec.Raw) -> int:
    return memoryview(raw)[0] if len(raw) else 0


def _check_structured(fields: BodyFields, bounds: Bounds) -> None:
    """A grammar is made of these before the first token, which can take seconds."""
    for name in ("structured_outputs", "response_format"):
        raw = getattr(fields, name)
        if len(raw) > bounds.max_structured_bytes:
            raise InvalidRequest(
                f"`{name}` is larger than {bounds.max_structured_bytes} bytes.", param=name
            )
        if repetitions(bytes(raw)) > MAX_REPETITIONS:
            raise InvalidRequest(
                f"`{name}` repeats more than {MAX_REPETITIONS} times in its `{{m,n}}`.", param=name
            )
    if _first(fields.structured_outputs) == ord("{"):
        choices = _decode_raw_fields(fields.structured_outputs).get("choice", NOTHING)
        _check_items("structured_outputs.choice", choices, bounds.max_structured_choices)


def repetitions(text: bytes) -> int:
    """How often the `{m,n}` of the regular expressions in a JSON text repeat what stands before
    them: added up, and multiplied where one is inside another.
    """
    open_groups, weight_before = [0], 1
    for token in _REGEX_TOKENS.finditer(text):
        if token.lastgroup == "open":
            open_groups.append(0)
        elif token.lastgroup == "close":
            inside = open_groups.pop() if len(open_groups) > 1 else 0
            open_groups[-1] += inside
            weight_before = max(1, inside) if text[token.end() : token.end() + 1] == b"{" else 1
        elif token.lastgroup == "times":
            digits = token["most"] or token["least"]
            open_groups[-1] += weight_before * int(digits[:9])
            weight_before = 1
        if open_groups[-1] > MAX_REPETITIONS:
            break
    return max(open_groups)


# ---- for routing ---------------------------------------------------------------------------------

PREFIX_BYTES = 512
"""Of the prompt, for prefix affinity: a system prompt's first hundred tokens tell conversations
with different ones apart.
"""
PREFIX_WITHIN_BYTES = 64 << 10
"""Of the body that is searched for the prompt's beginning."""


_PROMPTS = (b'"messages"', b'"prompt"', b'"input"')


def prefix_hash(digest: str, body: bytes) -> int:
    """Of the adapter's digest and the first bytes after the body's first prompt or message; 0 if
    there is none.
    """
    starts = [
        at
        for mark in (b'"messages"', b'"prompt"')
        if (at := body.find(mark, 0, PREFIX_WITHIN_BYTES)) >= 0
    ]
    return hash((digest, body[min(starts) : min(starts) + PREFIX_BYTES])) or 1 if starts else 0
