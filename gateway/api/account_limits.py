"""Pure. Applies an account's limits to a request body. A request beyond them is refused. Fields
that the account fixes are written into the body before a worker reads it.
"""

from __future__ import annotations

import msgspec

from gateway.accounts.account import UNLIMITED, Account
from gateway.api.body.multipart import form_with
from gateway.api.body.schema import NOT_UTF8, BodyFields
from shared.api_endpoints import Endpoint, ModelIn
from shared.errors import BodyTooLarge, InvalidRequest, LoraplexError

_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def allowed_body(
    account: Account,
    head: BodyFields,
    body: bytes,
    endpoint: Endpoint,
    asked: int | None,
    content_type: str = "",
) -> bytes:
    """The body for the worker: unchanged, except for fields that the account fixes. Who asks for a
    stored answer sends none. `asked` is the limit of output tokens that the client gives, and
    `content_type` tells where the parts of a form begin.

    Raises InvalidRequest or BodyTooLarge if the request exceeds the account's limits.
    """
    limits, fixed = account.limits, {}
    if not body or (limits is UNLIMITED and head.priority is None):
        return body
    if limits.body_bytes is not None and len(body) > limits.body_bytes:
        text = f"The request body is larger than this key's {limits.body_bytes} bytes."
        raise _beyond("body_bytes", BodyTooLarge(text))
    if head.n is not None and limits.n is not None and head.n > limits.n:
        text = f"This key may ask for at most {limits.n} choices."
        raise _beyond("n", InvalidRequest(text, param="n"))
    most, names = limits.output_tokens, endpoint.limit_fields
    if most is not None and names:
        if asked is None:
            fixed[names[-1]] = most
        elif asked > most:
            text = f"This key may ask for at most {most} output tokens."
            param = next(name for name in names if getattr(head, name) is not None)
            raise _beyond("output_tokens", InvalidRequest(text, param=param))
    if head.priority is not None and account.clamped(head.priority) != head.priority:
        # an engine that schedules by priority reads it as well
        fixed["priority"] = account.clamped(head.priority)
    if fixed and endpoint.model_in is ModelIn.FORM:
        return form_with(content_type, body, fixed)
    return with_fields(body, fixed) if fixed else body


def _beyond(limit: str, error: LoraplexError) -> LoraplexError:
    error.limit = limit
    return error


def with_fields(body: bytes, fixed: dict[str, int]) -> bytes:
    """The body, which is a JSON object, with these fields set. All other fields stay byte by byte
    as they are. Raises InvalidRequest for a name that is no text.
    """
    try:
        fields: dict[str, object] = {**_decode_fields(body), **fixed}
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise InvalidRequest(NOT_UTF8) from exc
    return msgspec.json.encode(fields)
