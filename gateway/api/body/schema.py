"""Pure. The only place that says which fields of a request body the gateway reads, and with what
types. Which of them a path has is in the table of endpoints. How much one request may ask for is in
bounds.py.

Types are as wide as vLLM's: its pydantic takes 5.0, "5" and true for 5. But arithmetic on them must
be safe: no infinity, no NaN, nothing negative, and no number of 400 digits is let through. All
other fields are passed on unread.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any, cast

import msgspec
from msgspec import Meta

from gateway.api.body.bounds import DEFAULT_BOUNDS, NOTHING, Bounds, check
from gateway.api.body.multipart import form_values
from shared.api_endpoints import Endpoint, ModelIn
from shared.errors import BodyTooLarge, InvalidRequest
from shared.lenient_values import boolean, integer, is_true

MAX_MODEL_CHARACTERS = 1024
"""The longest model name: a base id, an adapter and a digest. It is repeated in messages and
logs.
"""
MAX_COUNT = (1 << 31) - 1
"""The largest number of tokens, sequences or log probabilities. No engine has as many, and a float
holds it exactly.
"""
MAX_PRIORITY = 10**9 - 1

Count = Annotated[int, Meta(ge=0, le=MAX_COUNT)]
CountOrAll = Annotated[int, Meta(ge=-1, le=MAX_COUNT)]
Name = Annotated[str, Meta(max_length=MAX_MODEL_CHARACTERS)]
Priority = Annotated[int, Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY)]


class BodyFields(msgspec.Struct, frozen=True, gc=False):
    """The fields of a request body that the gateway reads. A Raw field keeps its bytes, because
    only its size or its sameness matters.
    """

    model: Name | None = None
    stream: bool | None = False
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    priority: Priority | None = None
    n: Count | None = None
    max_output_tokens: Count | None = None
    previous_response_id: Name | None = None
    use_beam_search: bool | None = False
    min_tokens: Count | None = None
    top_k: CountOrAll | None = None
    top_logprobs: CountOrAll | None = None
    prompt_logprobs: CountOrAll | None = None
    user: msgspec.Raw = NOTHING
    messages: msgspec.Raw = NOTHING
    prompt: msgspec.Raw = NOTHING
    input: msgspec.Raw = NOTHING
    system: msgspec.Raw = NOTHING
    text: msgspec.Raw = NOTHING
    output_config: msgspec.Raw = NOTHING
    chat_template_kwargs: msgspec.Raw = NOTHING
    mm_processor_kwargs: msgspec.Raw = NOTHING
    media_io_kwargs: msgspec.Raw = NOTHING
    vllm_xargs: msgspec.Raw = NOTHING
    kv_transfer_params: msgspec.Raw = NOTHING
    ec_transfer_params: msgspec.Raw = NOTHING
    metadata: msgspec.Raw = NOTHING
    allowed_token_ids: msgspec.Raw = NOTHING
    documents: msgspec.Raw = NOTHING
    queries: msgspec.Raw = NOTHING
    items: msgspec.Raw = NOTHING
    text_1: msgspec.Raw = NOTHING
    text_2: msgspec.Raw = NOTHING
    data_1: msgspec.Raw = NOTHING
    data_2: msgspec.Raw = NOTHING
    texts: msgspec.Raw = NOTHING
    inputs: msgspec.Raw = NOTHING
    images: msgspec.Raw = NOTHING
    structured_outputs: msgspec.Raw = NOTHING
    response_format: msgspec.Raw = NOTHING
    tools: msgspec.Raw = NOTHING
    tool_choice: msgspec.Raw = NOTHING
    stop_token_ids: msgspec.Raw = NOTHING
    logprob_token_ids: msgspec.Raw = NOTHING
    logit_bias: msgspec.Raw = NOTHING
    bad_words: msgspec.Raw = NOTHING
    background: bool | None = False
    previous_input_messages: msgspec.Raw = NOTHING
    repetition_detection: msgspec.Raw = NOTHING
    return_token_strs: bool | None = False

    def limit(self, endpoint: Endpoint) -> int | None:
        """The limit of the answer's tokens, as the engine reads it on this path."""
        for name in endpoint.limit_fields:
            given: int | None = getattr(self, name)
            if given is not None:
                return given
        return None


JSON_TYPE = "application/json"
FORM_TYPE = "multipart/form-data"

ALL_FIELDS = frozenset(BodyFields.__struct_fields__)
_decode_raw_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_any = msgspec.json.Decoder().decode


def read_fields(
    endpoint: Endpoint, content_type: str, body: bytes, bounds: Bounds = DEFAULT_BOUNDS
) -> BodyFields:
    """The fields of a body in the form that the endpoint takes. A JSON body may come without a
    content type.

    Raises InvalidRequest or BodyTooLarge.
    """
    most = endpoint.most_bytes
    if most and len(body) > most:
        raise _too_large(endpoint, most)
    if content_type == JSON_TYPE and endpoint.model_in is not ModelIn.FORM:  # as nearly always
        return _parsed(endpoint, body, bounds)
    kind = content_type.partition(";")[0].strip().lower()
    expected = FORM_TYPE if endpoint.model_in is ModelIn.FORM else JSON_TYPE
    if kind != expected and (kind or expected == FORM_TYPE):
        raise InvalidRequest(
            f"The Content-Type of this request must be {expected}, "
            f"not {kind[:100] or 'left out'!r}."
        )
    if endpoint.model_in is ModelIn.FORM:
        values = form_values(content_type, body)
        stream, limit = is_true(values.get("stream", "")), values.get("max_completion_tokens")
        return BodyFields(
            model=values.get("model") or None,
            stream=stream,
            max_completion_tokens=_count("max_completion_tokens", limit) if limit else None,
        )
    return _parsed(endpoint, body, bounds)


def _parsed(endpoint: Endpoint, body: bytes, bounds: Bounds) -> BodyFields:
    fields = parse_body_fields(body, bounds, endpoint.fields)
    if fields.return_token_strs and len(body) > endpoint.most_bytes // 4:
        raise _too_large(endpoint, endpoint.most_bytes // 4)  # vLLM writes a text beside each id
    return fields


def _too_large(endpoint: Endpoint, most: int) -> BodyTooLarge:
    return BodyTooLarge(f"Such a request for {endpoint.what} may have at most {most} bytes.")


NOT_UTF8 = "The request body is not valid UTF-8."
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""Some clients put it before their JSON. vLLM ignores it, so it is removed before the body is sent
on.
"""


def parse_body_fields(
    body: bytes, bounds: Bounds = DEFAULT_BOUNDS, names: frozenset[str] = ALL_FIELDS
) -> BodyFields:
    """Reads the fields `names` and no other. Raises InvalidRequest. Its `param` names the field, if
    one is at fault.
    """
    try:
        fields = _decoder(names)(body)
    except msgspec.ValidationError as exc:
        fields = _parse_leniently(body, names, exc)
    except msgspec.MsgspecError as exc:
        raise InvalidRequest(f"The request body is not valid JSON: {exc}") from exc
    except RecursionError as exc:
        raise InvalidRequest("The request body is nested too deeply.") from exc
    except UnicodeDecodeError as exc:
        raise InvalidRequest(NOT_UTF8) from exc
    check(fields, len(body), bounds)
    return fields


@functools.cache
def _decoder(names: frozenset[str]) -> Callable[[bytes], BodyFields]:
    return msgspec.json.Decoder(_with_only(names)).decode


@functools.cache
def _with_only(names: frozenset[str]) -> type[BodyFields]:
    """BodyFields whose fields are `names`. All others are attributes of the class: the defaults."""
    fields: list[tuple[str, Any, Any]] = []
    space: dict[str, Any] = {"limit": BodyFields.limit}
    for one in msgspec.structs.fields(BodyFields):
        if one.name in names:
            fields.append((one.name, one.type, one.default))
        else:
            space[one.name] = one.default
    kind = msgspec.defstruct("BodyFields", fields, namespace=space, frozen=True, gc=False)
    return cast(type[BodyFields], kind)


# ---- other forms of the same values --------------------------------------------------------------


def _between(least: int, most: int) -> Callable[[object], int]:
    def read(value: object) -> int:
        found = integer(value)
        if found is None or not least <= found <= most:
            raise ValueError(f"a whole number from {least} to {most}")
        return found

    return read


def _flag(value: object) -> bool:
    found = boolean(value)
    if found is None:
        raise ValueError("true or false")
    return found


def _count(name: str, text: str) -> int:
    try:
        return _between(0, MAX_COUNT)(text)
    except ValueError as exc:
        raise InvalidRequest(f"`{name}` must be {exc}.", param=name) from exc


_READERS: dict[str, Callable[[object], object]] = {
    "stream": _flag,
    "use_beam_search": _flag,
    "background": _flag,
    "return_token_strs": _flag,
    "priority": _between(-MAX_PRIORITY, MAX_PRIORITY),
    **dict.fromkeys(
        ("max_tokens", "max_completion_tokens", "max_output_tokens", "n", "min_tokens"),
        _between(0, MAX_COUNT),
    ),
    **dict.fromkeys(("top_k", "top_logprobs", "prompt_logprobs"), _between(-1, MAX_COUNT)),
}


def _parse_leniently(
    body: bytes, names: frozenset[str], refused: msgspec.ValidationError
) -> BodyFields:
    """For a body with a field that is not in JSON's own form, such as "5" for 5."""
    try:
        raw = _decode_raw_fields(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        raise InvalidRequest(_described(refused)) from refused
    found: dict[str, object] = {}
    for name in BodyFields.__struct_fields__:
        if name not in raw or name not in names:
            continue
        reader = _READERS.get(name)
        found[name] = raw[name] if reader is None else _read(name, raw[name], reader)
    for name in ("model", "previous_response_id"):
        if name in found:
            found[name] = _name(name, raw[name])
    return _with_only(names)(**found)  # type: ignore[arg-type]


def _read(name: str, raw: msgspec.Raw, reader: Callable[[object], object]) -> object:
    try:
        value = _decode_any(raw)
        return None if value is None else reader(value)
    except UnicodeDecodeError as exc:
        raise InvalidRequest(NOT_UTF8, param=name) from exc
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


def _described(refused: msgspec.ValidationError) -> str:
    return f"The request body is not what this path takes: {refused}"


# ---- for routing ---------------------------------------------------------------------------------

PREFIX_BYTES = 512
"""How many bytes of the prompt identify its prefix. The first hundred tokens tell conversations
with different system prompts apart.
"""
PREFIX_WITHIN_BYTES = 64 << 10
"""How far into the body the beginning of the prompt is searched for."""


_PROMPTS = tuple((name, b'"%b"' % name.encode()) for name in ("messages", "input", "prompt"))


def prefix_hash(digest: str, body: bytes, endpoint: Endpoint) -> int:
    """A hash of the adapter's digest and the first bytes of the first prompt or message. 0: there
    is none, or none of which the engine keeps a cache that is worth a way.
    """
    if not endpoint.streams or endpoint.model_in is ModelIn.FORM:
        return 0
    for name, key in _PROMPTS:
        if name in endpoint.fields and (start := body.find(key, 0, PREFIX_WITHIN_BYTES)) >= 0:
            return hash((digest, body[start : start + PREFIX_BYTES])) or 1
    return 0
