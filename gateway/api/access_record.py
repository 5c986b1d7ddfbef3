"""Pure. What is reported about a request for tokens: response headers for its client, and one line
of the access log for operators.
"""

from __future__ import annotations

from urllib.parse import quote

import msgspec

from gateway.dispatch.lifecycle import RequestPhase
from gateway.dispatch.request import NOTHING_USED, InFlightRequest
from gateway.dispatch.request_summary import outcome_of
from shared.errors import LoraplexError

SHOWN_DIGEST = 12
"""How many characters of a version's digest are shown in headers and logs."""
CLIENT_LEFT_STATUS = 499
"""The status in the access log if the client left before any was sent. It is nginx's number for
that.
"""


class AccessRecord(msgspec.Struct, frozen=True, gc=False):
    """One request in the access log."""

    request: str
    model: str
    adapter: str | None
    digest: str | None
    status: int
    outcome: str
    worker: str | None
    reason: str | None
    tier: str | None
    queue_ms: float | None
    ttft_ms: float | None
    load_ms: float | None
    total_ms: float | None
    prompt_tokens: int | None
    output_tokens: int | None
    error: str | None
    moves: int | None
    """How often another worker continued the answer."""
    lost: str | None
    """Why no other worker could continue it."""
    key: str | None
    """The name of its account."""
    streamed: bool


def head_lines(inflight: InFlightRequest, policy: str) -> bytes:
    """The response headers, each as `name: value` with its line end. The worker's come first, then
    the gateway's.
    """
    choice, adapter = inflight.choice, inflight.model.adapter
    lines = f"x-request-id: {inflight.client_request.request_id}\r\nx-loraplex-policy: {policy}\r\n"
    # A comment to a stream that waits commits the head before a worker is known.
    if choice is None or inflight.lifecycle.phase is RequestPhase.QUEUED:
        return inflight.answer_lines + lines.encode()
    queue_ms = (inflight.t_sent - inflight.t_start) * 1e3
    lines += f"x-loraplex-worker: {choice.worker.id}\r\nx-loraplex-queue-ms: {queue_ms:.1f}\r\n"
    if adapter is not None:
        version = f"{in_header(adapter.name)}@{adapter.digest[:SHOWN_DIGEST]}"
        tier = choice.tier._name_.lower()
        lines += f"x-loraplex-adapter: {version}\r\nx-loraplex-adapter-tier: {tier}\r\n"
    if inflight.earlier:  # a stream that has begun has a comment where it moved
        lines += f"x-loraplex-moves: {len(inflight.earlier)}\r\n"
    return inflight.answer_lines + lines.encode()


def in_header(name: str) -> str:
    """An adapter's name in URL encoding, since header fields are ASCII."""
    return name if name.isascii() and not (" " in name or "%" in name) else quote(name)


def access_record(
    inflight: InFlightRequest, model: str, status: int, error: LoraplexError | None
) -> AccessRecord:
    """The line of the access log, once it is known what the request has used. `model` is the name
    that the client used. `status` 0: none was sent.
    """
    done, choice, adapter = inflight.done, inflight.choice, inflight.model.adapter
    start = inflight.t_start
    used = done or (inflight.used if inflight.used != NOTHING_USED else None)
    return AccessRecord(
        inflight.client_request.request_id,
        model,
        adapter.name if adapter else None,
        adapter.digest[:SHOWN_DIGEST] if adapter else None,
        status or (error.status if error else CLIENT_LEFT_STATUS),
        outcome_of(inflight),
        choice.worker.id if choice else None,
        choice.reason._value_ if choice else None,
        choice.tier._name_.lower() if choice and adapter else None,
        _ms(start, inflight.t_sent),
        _ms(start, inflight.t_head),
        round(done.load_s * 1e3, 1) if done else None,
        _ms(start, inflight.t_end),
        used.prompt_tokens if used is not None else None,
        used.output_tokens if used is not None else None,
        error.code if error else None,
        inflight.moves or None,
        inflight.lost or None,
        inflight.requester.tenant or None,
        inflight.client_request.streams,
    )


def _ms(start: float, end: float) -> float | None:
    return round((end - start) * 1e3, 1) if end else None
