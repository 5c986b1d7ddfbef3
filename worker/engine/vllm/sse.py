"""Pure. Writes the event stream of a plain chat or completion request. Its constant pieces are made
once per request, so only the text is escaped per token.

The stream equals, byte for byte, what vLLM 0.32 or 0.33 writes with pydantic (its
`chat_completion_stream_generator` and `completion_stream_generator`). It covers requests that ask
for nothing beyond the text: `is_plain_chat` and `is_plain_completion` say which those are. All
others are left to vLLM. tests/engine/requests/test_fast_path.py compares both with vLLM's own
generators.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

escape = msgspec.json.Encoder().encode
r"""A value as JSON. Strings get the same escapes as in pydantic: short ones, \u00xx for other
control characters, and everything else as UTF-8.
"""

DONE = b"data: [DONE]\n\n"

_SAMPLING = frozenset(
    {
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "max_tokens",
        "stop",
        "stop_token_ids",
        "include_stop_str_in_output",
        "ignore_eos",
        "min_tokens",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
        "logit_bias",
        "allowed_token_ids",
        "bad_words",
    }
)
"""Fields that decide which tokens come, but not how they are written."""
_ENVELOPE = frozenset({"model", "stream", "stream_options", "n", "user"})
PLAIN_CHAT = _SAMPLING | _ENVELOPE | {"messages", "max_completion_tokens"}
PLAIN_COMPLETION = _SAMPLING | _ENVELOPE | {"prompt"}


@dataclass(frozen=True, slots=True)
class ChunkFields:
    """What a vLLM writes at the end of a choice, and at the end of a chunk with choices."""

    of_choice: bytes = b""
    of_chunk: bytes = b""


V0_32 = ChunkFields()
V0_33 = ChunkFields(b',"weight_versions":null', b',"kv_transfer_params":null')


@dataclass(frozen=True, slots=True)
class Chunks:
    """The constant pieces of one request's stream. A chunk is `before`, the escaped text, and
    `after`; `opening` precedes the first chunk.

    The last chunk has the finish reason and the stop reason between `reasons` and `ending`.
    `closing` ends that chunk, and carries the fingerprint if no usage is asked for. If usage is
    asked for, `usage` begins one more event.
    """

    opening: bytes
    before: bytes
    after: bytes
    reasons: bytes
    ending: bytes
    closing: bytes
    usage: bytes | None
    usage_closing: bytes

    def last(self, text: str, finish_reason: str, stop_reason: int | str | None) -> bytes:
        """The chunk that gives the reason why the stream ends."""
        return b"".join(
            (
                self.before,
                escape(text),
                self.reasons,
                escape(finish_reason),
                b',"stop_reason":',
                escape(stop_reason),
                self.ending,
                self.closing,
            )
        )

    def end(self, prompt_tokens: int, output_tokens: int) -> bytes:
        """The bytes that follow the last chunk."""
        if self.usage is None:
            return DONE
        counts = b'{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d}'
        return b"".join(
            (
                self.usage,
                counts % (prompt_tokens, prompt_tokens + output_tokens, output_tokens),
                self.usage_closing,
                DONE,
            )
        )


def chat_chunks(
    request_id: str,
    created: int,
    model: str,
    role: str,
    fingerprint: str | None,
    include_usage: bool,
    fields: ChunkFields = V0_32,
) -> Chunks:
    """The pieces for `/v1/chat/completions`. The first event carries the role."""
    head = _head(request_id, b"chat.completion.chunk", created, model)
    return _chunks(
        head,
        fingerprint,
        include_usage,
        fields,
        opening=b'%b[{"index":0,"delta":{"role":%b,"content":""},"logprobs":null,'
        b'"finish_reason":null}]'
        b',"prompt_token_ids":null,"prompt_text":null}\n\n' % (head, escape(role)),
        before=b'[{"index":0,"delta":{"content":',
        after=b'},"logprobs":null,"finish_reason":null,"token_ids":null}]%b}\n\n' % fields.of_chunk,
        reasons=b'},"logprobs":null,"finish_reason":',
        ending=b',"token_ids":null%b}]' % fields.of_choice,
    )


def completion_chunks(
    request_id: str,
    created: int,
    model: str,
    fingerprint: str | None,
    include_usage: bool,
    fields: ChunkFields = V0_32,
) -> Chunks:
    """The pieces for `/v1/completions`."""
    return _chunks(
        _head(request_id, b"text_completion", created, model),
        fingerprint,
        include_usage,
        fields,
        opening=b"",
        before=b'[{"index":0,"text":',
        after=b',"logprobs":null,"finish_reason":null,"stop_reason":null,'
        b'"prompt_token_ids":null,"token_ids":null%b}]%b}\n\n'
        % (fields.of_choice, fields.of_chunk),
        reasons=b',"logprobs":null,"finish_reason":',
        ending=b',"prompt_token_ids":null,"token_ids":null%b}]' % fields.of_choice,
    )


def is_plain_chat(body: Mapping[str, Any]) -> bool:
    """Whether the stream of a chat request is text and nothing else. It does not check whether the
    request's values are valid.
    """
    return _is_plain(body, PLAIN_CHAT)


def is_plain_completion(body: Mapping[str, Any]) -> bool:
    """The same for a completion request. Several prompts count as several choices, so they are not
    plain.
    """
    prompt = body.get("prompt")
    one = isinstance(prompt, str) or (
        isinstance(prompt, list) and len(prompt) > 0 and type(prompt[0]) is int
    )
    return one and _is_plain(body, PLAIN_COMPLETION)


def _is_plain(body: Mapping[str, Any], known: frozenset[str]) -> bool:
    if body.get("stream") is not True or body.get("n") not in (None, 1):
        return False
    options = body.get("stream_options")
    if options is not None and not (
        isinstance(options, dict) and options.keys() <= {"include_usage"}
    ):
        return False
    return all(key in known or value is None for key, value in body.items())


def _head(request_id: str, kind: bytes, created: int, model: str) -> bytes:
    return b'data: {"id":%b,"object":"%b","created":%d,"model":%b,"choices":' % (
        escape(request_id),
        kind,
        created,
        escape(model),
    )


def _chunks(
    head: bytes,
    fingerprint: str | None,
    include_usage: bool,
    fields: ChunkFields,
    *,
    opening: bytes,
    before: bytes,
    after: bytes,
    reasons: bytes,
    ending: bytes,
) -> Chunks:
    stamp = b"" if fingerprint is None else b',"system_fingerprint":%b' % escape(fingerprint)
    return Chunks(
        opening=opening,
        before=head + before,
        after=after,
        reasons=reasons,
        ending=ending,
        closing=(b"" if include_usage else stamp) + fields.of_chunk + b"}\n\n",
        usage=head + b'[],"usage":' if include_usage else None,
        usage_closing=stamp + b"}\n\n",
    )
