"""Pure. The few request fields that the gateway reads, the OpenAI shapes that it writes itself, and
the one table from errors to HTTP statuses.
"""

from __future__ import annotations

import msgspec

from shared import errors

GENERATE_PATHS = ("/v1/chat/completions", "/v1/completions")
"""Paths that are forwarded to a worker as they are."""


class BodyFields(msgspec.Struct, frozen=True):
    """What routing needs of a request body; everything else is passed on unread."""

    model: str
    stream: bool | None = False
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    priority: int | None = None
    n: int | None = None
    user: msgspec.Raw = msgspec.Raw(b"")
    """As it came, unread: only its being the same counts."""


_decode_head = msgspec.json.Decoder(BodyFields).decode


def parse_body_fields(body: bytes) -> BodyFields:
    """Raises InvalidRequest, with `param` where a field is at fault."""
    try:
        return _decode_head(body)
    except msgspec.ValidationError as exc:
        field = str(exc).rpartition("`$.")[2].rstrip("`") if "`$." in str(exc) else None
        if "missing required field `model`" in str(exc):
            field = "model"
        raise errors.InvalidRequest(str(exc), param=field) from exc
    except msgspec.MsgspecError as exc:
        raise errors.InvalidRequest(
            f"The request body is not valid JSON: {exc}", param=None
        ) from exc
    except RecursionError as exc:
        raise errors.InvalidRequest("The request body is nested too deeply.") from exc
    except UnicodeDecodeError as exc:
        raise errors.InvalidRequest("The request body is not valid UTF-8.", param=None) from exc


PREFIX_BYTES = 512
"""Of the prompt, for prefix affinity: a system prompt's first hundred tokens tell conversations
with different ones apart.
"""


def prefix_hash(digest: str, body: bytes) -> int:
    """Of the adapter's digest and the first bytes after the body's first prompt or message; 0 if
    there is none.
    """
    starts = [at for mark in (b'"messages"', b'"prompt"') if (at := body.find(mark)) >= 0]
    return hash((digest, body[min(starts) : min(starts) + PREFIX_BYTES])) or 1 if starts else 0
