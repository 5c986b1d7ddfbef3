"""Pure. The few request fields that the gateway reads, the OpenAI shapes that it writes itself, and
the one table from errors to HTTP statuses.
"""

from __future__ import annotations

import re

import msgspec

from shared import errors
from shared.endpoints import Endpoint, ModelIn


class BodyFields(msgspec.Struct, frozen=True):
    """What routing needs of a request body; everything else is passed on unread."""

    model: str | None = None
    stream: bool | None = False
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    priority: int | None = None
    n: int | None = None
    max_output_tokens: int | None = None
    previous_response_id: str | None = None
    user: msgspec.Raw = msgspec.Raw(b"")
    """As it came, unread: only its being the same counts."""

    @property
    def limit(self) -> int | None:
        """Of the answer's tokens, by whichever name it was given."""
        return self.max_completion_tokens or self.max_tokens or self.max_output_tokens


_decode_head = msgspec.json.Decoder(BodyFields).decode


JSON_TYPE = "application/json"
FORM_TYPE = "multipart/form-data"


def read_fields(endpoint: Endpoint, content_type: str, body: bytes) -> BodyFields:
    """Of a body as the endpoint takes it. A JSON body may come without a type.

    Raises InvalidRequest.
    """
    kind = content_type.partition(";")[0].strip().lower()
    expected = FORM_TYPE if endpoint.model_in is ModelIn.FORM else JSON_TYPE
    if kind != expected and (kind or expected == FORM_TYPE):
        raise errors.InvalidRequest(
            f"The Content-Type of this request must be {expected}, "
            f"not {kind[:100] or 'left out'!r}."
        )
    if endpoint.model_in is ModelIn.FORM:
        return form_fields(content_type, body)
    return parse_body_fields(body)


_BOUNDARY = re.compile(r"""boundary=(?:"([^"]{1,200})"|([^\s;"]{1,200}))""", re.IGNORECASE)
_NAME = re.compile(rb"""[;\s]name=(?:"([^"]*)"|([^\s;"]+))""", re.IGNORECASE)
MAX_FORM_PARTS = 64
MAX_FORM_VALUE_BYTES = 1024
"""Of a field that is read here; the others are the worker's."""


def form_fields(content_type: str, body: bytes) -> BodyFields:
    """The same of multipart/form-data, whose files are passed over unread."""
    found = _BOUNDARY.search(content_type)
    if found is None:
        raise errors.InvalidRequest("The Content-Type of this request names no boundary.")
    mark = b"--" + (found[1] or found[2]).encode(errors="replace")
    fields: dict[str, str] = {}
    at = 0 if body.startswith(mark) else body.find(b"\r\n" + mark) + 2
    for _ in range(MAX_FORM_PARTS):
        start = at + len(mark) + 2
        end = body.find(b"\r\n" + mark, start)
        if at < 0 or end < 0:
            break
        head, blank, value = body[start : min(end, start + 2 * MAX_FORM_VALUE_BYTES)].partition(
            b"\r\n\r\n"
        )
        name = _NAME.search(head)
        if blank and name is not None and b"filename" not in head.lower():
            key = (name[1] or name[2] or b"").decode(errors="replace")
            if key in ("model", "stream") and len(value) <= MAX_FORM_VALUE_BYTES:
                fields[key] = value.decode(errors="replace").strip()
        at = end + 2
    return BodyFields(
        model=fields.get("model") or None,
        stream=fields.get("stream", "").lower() in ("true", "1", "on", "yes"),
    )


def parse_body_fields(body: bytes) -> BodyFields:
    """Raises InvalidRequest, with `param` where a field is at fault."""
    try:
        return _decode_head(body)
    except msgspec.ValidationError as exc:
        field = str(exc).rpartition("`$.")[2].rstrip("`") if "`$." in str(exc) else None
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


_PROMPTS = (b'"messages"', b'"prompt"', b'"input"')


def prefix_hash(digest: str, body: bytes) -> int:
    """Of the adapter's digest and the first bytes after the body's first prompt or message; 0 if
    there is none.
    """
    starts = [at for mark in _PROMPTS if (at := body.find(mark)) >= 0]
    return hash((digest, body[min(starts) : min(starts) + PREFIX_BYTES])) or 1 if starts else 0
