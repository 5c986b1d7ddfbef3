"""Pure. A request as its account may make it: too much is refused, what the account fixes is
written into the body before a worker reads it.
"""

from __future__ import annotations

import msgspec

from gateway.accounts.account import Account
from gateway.api.schema import BodyFields
from shared.errors import BodyTooLarge, InvalidRequest

_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def allowed_body(account: Account, head: BodyFields, body: bytes, limit_field: str) -> bytes:
    """The body for the worker: as it came, but for fields that the account fixes.
    `limit_field` bounds the answer's tokens; "" where nothing does.

    Raises InvalidRequest or BodyTooLarge for what is beyond the account's limits.
    """
    limits, fixed = account.limits, {}
    if limits.body_bytes is not None and len(body) > limits.body_bytes:
        raise BodyTooLarge(f"The request body is larger than this key's {limits.body_bytes} bytes.")
    if limits.n is not None and (head.n or 1) > limits.n:
        raise InvalidRequest(f"This key may ask for at most {limits.n} choices.", param="n")
    if limits.output_tokens is not None and limit_field:
        asked = head.limit
        if asked is not None and asked > limits.output_tokens:
            raise InvalidRequest(
                f"This key may ask for at most {limits.output_tokens} output tokens.",
                param="max_completion_tokens" if head.max_completion_tokens else limit_field,
            )
        if asked is None:
            fixed[limit_field] = limits.output_tokens
    if head.priority is not None and account.clamped(head.priority) != head.priority:
        # an engine that schedules by priority reads it as well
        fixed["priority"] = account.clamped(head.priority)
    return with_fields(body, fixed) if fixed else body


def with_fields(body: bytes, fixed: dict[str, int]) -> bytes:
    """`body` is a JSON object; all its other fields stay byte by byte as they are."""
    fields: dict[str, object] = {**_decode_fields(body), **fixed}
    return msgspec.json.encode(fields)
