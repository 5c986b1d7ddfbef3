"""Pure. How much one request may ask of a worker, which also serves others: the bounds of a body's
lists, texts, sequences and grammars.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec

from gateway.api.body.schema_cost import check_schemas, unescaped
from shared.errors import InvalidRequest
from shared.lenient_values import integer

if TYPE_CHECKING:
    from gateway.api.body.schema import BodyFields

NOTHING = msgspec.Raw(b"")
"""A field that the body does not have."""
MAX_LIST_ITEMS = 1024
"""The longest list that the engine goes through at every step: stop ids, biases, forbidden
words.
"""
MAX_ALLOWED_IDS = 1 << 16
"""The engine gets a copy of them for each choice."""
MAX_BEAMS = 16
"""All prompts together. Each of n beams is scored with 2 n tokens at every step."""
MAX_PARTS = 3072
"""The most items of all lists inside messages: content parts, tool calls. vLLM takes 10 us to read
one.
"""
MAX_ARGUMENT_VALUES = 300_000
"""Of the arguments of tool calls, which are texts of JSON: vLLM reads those of earlier turns on its
loop.
"""
MESSAGES_PER_ITEM = 5
"""One item of a response's `input` takes vLLM as long to read as so many messages of a chat: it has
30 kinds of them to try.
"""
MAX_PATTERN_TOKENS = 128
"""The longest pattern that is looked for in an answer. The engine compares up to a quarter of its
square of tokens at every step of every choice.
"""
MAX_REPETITIONS = 10_000
"""The largest `{m,n}` of a regular expression. As a grammar, it has a state for each repetition."""


class Bounds(msgspec.Struct, frozen=True):
    """How much one request may ask of a worker, which also serves others."""

    max_messages: int = 2048
    max_sequences: int = 64
    max_prompt_bytes: int = 8 << 20
    max_structured_choices: int = 1000
    max_structured_bytes: int = 64 << 10
    processor_options: bool = False
    """Whether clients may choose to what sizes pictures are scaled, and how many frames of a video
    are read.
    """


DEFAULT_BOUNDS = Bounds()
_decode_any = msgspec.json.Decoder().decode
_decode_raw_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_items = msgspec.json.Decoder(list[msgspec.Raw]).decode

OF_TOKENIZERS = frozenset(
    {
        "max_length",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "truncation",
    }
)
"""Arguments of `apply_chat_template` that are none of a chat template's."""
SMALL_BYTES = 2048
"""A body up to this size cannot hold a list that is too long."""
_REGEX_TOKENS = re.compile(
    rb"\\\\.|(?P<open>\()|(?P<close>\))|(?P<times>\{(?P<least>[0-9]+)(?:,(?P<most>[0-9]*))?\})"
)


def check(fields: BodyFields, size: int, bounds: Bounds) -> None:
    """`size` is that of the whole body, in bytes. Raises InvalidRequest, which names the field."""
    if fields.n is not None or fields.prompt is not NOTHING:
        count = sequences(fields)
        if fields.use_beam_search and count > MAX_BEAMS:
            raise InvalidRequest(f"A beam search has at most {MAX_BEAMS} beams.", param="n")
        if count > bounds.max_sequences:
            raise InvalidRequest(
                f"The request asks for {count} sequences (prompts times `n`); at most "
                f"{bounds.max_sequences} are served at once.",
                param="prompt" if _is_list(fields.prompt) else "n",
            )
    if (
        fields.structured_outputs is not NOTHING
        or fields.response_format is not NOTHING
        or fields.text is not NOTHING
        or fields.output_config is not NOTHING
        or fields.tools is not NOTHING
    ):
        _check_structured(fields, bounds)
    if fields.repetition_detection is not NOTHING:
        _check_pattern(fields.repetition_detection)
    if fields.mm_processor_kwargs is not NOTHING or fields.media_io_kwargs is not NOTHING:
        _check_processor_options(fields, bounds)
    if fields.chat_template_kwargs is not NOTHING:
        _check_template_arguments(fields.chat_template_kwargs)
    if size <= SMALL_BYTES:
        return
    if len(fields.messages) > 3 * bounds.max_messages:
        _check_items("messages", fields.messages, bounds.max_messages)
    for name in ("messages", "input"):
        _check_parts(name, getattr(fields, name))
    _check_items("system", fields.system, MAX_PARTS)
    for name in FREE:
        if len(getattr(fields, name)) > MAX_FREE_BYTES:
            raise InvalidRequest(f"`{name}` is larger than {MAX_FREE_BYTES} bytes.", param=name)
    for name in SCORED:
        _check_items(name, getattr(fields, name), bounds.max_messages)
    _check_input(fields.input, bounds.max_messages)
    most = bounds.max_messages // MESSAGES_PER_ITEM
    _check_items("previous_input_messages", fields.previous_input_messages, most)
    _check_items("allowed_token_ids", fields.allowed_token_ids, MAX_ALLOWED_IDS)
    for name in ("tools", "stop_token_ids", "logprob_token_ids", "bad_words"):
        _check_items(name, getattr(fields, name), MAX_LIST_ITEMS)
    if len(fields.logit_bias) > SMALL_BYTES:
        _check_items("logit_bias", fields.logit_bias, MAX_LIST_ITEMS)


def _check_items(name: str, raw: msgspec.Raw, most: int) -> None:
    if len(raw) > most and _items(name, raw) > most:
        raise InvalidRequest(f"`{name}` has more than {most} items.", param=name)


def _check_input(raw: msgspec.Raw, most: int) -> None:
    """Texts and lists of token ids to embed, or the items of a response."""
    if len(raw) <= most // MESSAGES_PER_ITEM or not _is_list(raw):
        return
    count = _prompts(raw)
    if bytes(memoryview(raw)[1:64]).lstrip()[:1] == b"{":
        most //= MESSAGES_PER_ITEM
    if count > most:
        raise InvalidRequest(f"`input` has more than {most} items.", param="input")


def _check_processor_options(fields: BodyFields, bounds: Bounds) -> None:
    """`{"size": {"height": 30000, "width": 30000}}` has a picture of one pixel take 10 GB."""
    for name in ("mm_processor_kwargs", "media_io_kwargs"):
        given = bytes(getattr(fields, name)).translate(None, b" \t\r\n")
        if given not in (b"", b"null", b"{}") and not bounds.processor_options:
            raise InvalidRequest(
                f"`{name}` is not taken from clients here, since it decides how much memory a "
                "picture takes. Operators allow it with gateway.bounds.processor_options.",
                param=name,
            )


def _check_template_arguments(raw: msgspec.Raw) -> None:
    """`{"tokenize": true, "padding": "max_length", "max_length": 2000000000}` has the tokenizer
    pad a prompt of one word to that many tokens: 110 bytes each. vLLM takes all arguments of the
    tokenizer's function, and those of clients before its own.
    """
    if _first(raw) != ord("{") or len(raw) > MAX_FREE_BYTES:
        return
    for name in _fields("chat_template_kwargs", raw):
        if name in OF_TOKENIZERS:
            raise InvalidRequest(
                f"`chat_template_kwargs` has `{name}`, which is for the tokenizer and not for the "
                "template.",
                param="chat_template_kwargs",
            )


def _check_pattern(raw: msgspec.Raw) -> None:
    if _first(raw) != ord("{"):
        return
    given = _fields("repetition_detection", raw).get("max_pattern_size", NOTHING)
    try:
        most = integer(_decode_any(given)) if len(given) else None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        most = None
    if most is not None and most > MAX_PATTERN_TOKENS:
        raise InvalidRequest(
            f"`max_pattern_size` may be at most {MAX_PATTERN_TOKENS}.", param="repetition_detection"
        )


def _check_parts(name: str, raw: msgspec.Raw) -> None:
    """The worker reads and checks the lists inside messages item by item."""
    if len(raw) <= 2 * MAX_PARTS or not _is_list(raw) or bytes(raw).count(b",") <= MAX_PARTS:
        return
    parts = values = 0
    messages = _decode_items(raw)
    for several in [*messages]:  # conversations to embed, each a list of messages
        if _is_list(several) and b"{" in bytes(several):
            messages += _decode_items(several)
            parts = len(messages)
    for message in messages:
        if _first(message) != ord("{"):
            continue
        fields = _fields(name, message)
        lists = [v for v in fields.values() if _is_list(v)]
        parts += sum(len(_decode_items(value)) for value in lists)
        for holder in ("arguments", "tool_calls"):
            values += bytes(fields.get(holder, NOTHING)).count(b",")
    if values > MAX_ARGUMENT_VALUES:
        raise InvalidRequest(
            f"Arguments of tool calls in `{name}` have more than {MAX_ARGUMENT_VALUES} values.",
            param=name,
        )
    if parts > MAX_PARTS:
        raise InvalidRequest(
            f"`{name}` has {parts} parts and tool calls; at most {MAX_PARTS} are served.",
            param=name,
        )


def _items(name: str, raw: msgspec.Raw) -> int:
    """The items of a list or an object. Anything else is left for the worker to refuse."""
    if _is_list(raw):
        return len(_decode_items(raw))
    return len(_fields(name, raw)) if _first(raw) == ord("{") else 1


def _fields(name: str, raw: msgspec.Raw) -> dict[str, msgspec.Raw]:
    """The fields of an object in the field `name`. Raises InvalidRequest: what was not asked for
    before was not looked at, so the name of a field may be no text.
    """
    try:
        return _decode_raw_fields(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise InvalidRequest(f"`{name}` is not valid JSON.", param=name) from exc


def _prompts(raw: msgspec.Raw) -> int:
    """How many prompts there are. A prompt is a text or a list of token ids; a list of those is
    several.
    """
    if not _is_list(raw):
        return 1
    after = bytes(memoryview(raw)[1:64]).lstrip()
    return 1 if after[:1].isdigit() or after[:1] == b"-" else max(1, len(_decode_items(raw)))


def _is_list(raw: msgspec.Raw) -> bool:
    return _first(raw) == ord("[")


def _first(raw: msgspec.Raw) -> int:
    return memoryview(raw)[0] if len(raw) else 0


FREE = (
    "chat_template_kwargs",
    "mm_processor_kwargs",
    "media_io_kwargs",
    "vllm_xargs",
    "kv_transfer_params",
    "ec_transfer_params",
    "metadata",
)
"""Objects of any names, which vLLM copies and looks through on its loop."""
MAX_FREE_BYTES = 64 << 10
SCORED = (
    "documents",
    "queries",
    "items",
    "text_1",
    "text_2",
    "data_1",
    "data_2",
    "texts",
    "inputs",
    "images",
)
"""The lists of all paths whose items are embedded or scored, each as a request to the engine."""
_LEFT_OPEN = (b'"auto"', b'"none"')
"""Values of `tool_choice` that demand no call."""
STRUCTURED = ("structured_outputs", "response_format", "text", "output_config")
"""The fields of all paths from which the engine makes a grammar."""


def _check_structured(fields: BodyFields, bounds: Bounds) -> None:
    """A grammar is made of these fields before the first token, which can take seconds."""
    for name in STRUCTURED:
        _check_grammar(name, bytes(getattr(fields, name)), bounds)
    _check_grammar("tools", _constrained(fields), bounds)
    if _first(fields.structured_outputs) == ord("{"):
        found = _fields("structured_outputs", fields.structured_outputs)
        choices = found.get("choice", NOTHING)
        _check_items("structured_outputs.choice", choices, bounds.max_structured_choices)


def _check_grammar(name: str, raw: bytes, bounds: Bounds) -> None:
    if len(raw) > bounds.max_structured_bytes:
        raise InvalidRequest(
            f"`{name}` is larger than {bounds.max_structured_bytes} bytes.", param=name
        )
    if repetitions(unescaped(name, raw)) > MAX_REPETITIONS:
        raise InvalidRequest(
            f"`{name}` repeats more than {MAX_REPETITIONS} times in its `{{m,n}}`.", param=name
        )
    check_schemas(name, raw)


def _constrained(fields: BodyFields) -> bytes:
    """What the engine makes a grammar of in `tools`, as a list: tools that are `strict`, or all of
    them where `tool_choice` demands a call. Their descriptions are no part of it.
    """
    tools = _tools(fields.tools)
    for tool in [*tools]:
        tools += _tools(tool.get("tools", NOTHING))  # a namespace
        if len(tools) > MAX_LIST_ITEMS:
            raise InvalidRequest(f"`tools` has more than {MAX_LIST_ITEMS} items.", param="tools")
    for tool in [*tools]:
        function = tool.get("function", NOTHING)
        tools += [_fields("tools", function)] if _first(function) == ord("{") else []
    demanded = _demands_call(fields.tool_choice)
    parts = []
    for tool in tools:
        if demanded or bytes(tool.get("strict", NOTHING)) not in (b"", b"null", b"false"):
            for name in ("description", "function", "tools"):
                tool.pop(name, None)
            parts.append(b",".join(tool.values()))
    return b"[%b]" % b",".join(filter(None, parts)) if parts else b""


def _tools(raw: msgspec.Raw) -> list[dict[str, msgspec.Raw]]:
    _check_items("tools", raw, MAX_LIST_ITEMS)
    items = _decode_items(raw) if _is_list(raw) else []
    return [_fields("tools", item) for item in items if _first(item) == ord("{")]


def _demands_call(choice: msgspec.Raw) -> bool:
    """Whether `tool_choice` is neither missing nor `auto` or `none`, as a text or a type. It may
    name a function without a type.
    """
    if _first(choice) == ord("{"):
        return bytes(_fields("tool_choice", choice).get("type", NOTHING)) not in _LEFT_OPEN
    return bool(choice) and bytes(choice) not in (*_LEFT_OPEN, b"null")


def repetitions(text: bytes) -> int:
    """How often the `{m,n}` of the regular expressions in a JSON text repeat what stands before
    them. Numbers side by side are added. Numbers inside each other are multiplied.
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
            open_groups[-1] += weight_before * int(digits.lstrip(b"0")[:9] or b"0")
            weight_before = 1
        if open_groups[-1] > MAX_REPETITIONS:
            break
    return max(open_groups)


def sequences(fields: BodyFields) -> int:
    """How many sequences the engine makes of the request: its choices times its prompts."""
    each = fields.n or 1
    return each * _prompts(fields.prompt) if len(fields.prompt) else each
