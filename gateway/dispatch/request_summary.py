"""Pure. Makes the EndedRequest record of a request at its end."""

from __future__ import annotations

from gateway.dispatch.lifecycle import RequestPhase
from gateway.dispatch.request import InFlightRequest
from gateway.telemetry.ended_request import EndedRequest

REFUSED = "refused"
OPEN = "open"
"""It has not ended yet."""
LIMITED, INVALID = "limited", "invalid"
"""Outcomes of requests that never came to the dispatcher: their key was over its limits, or the
request itself could not be served.
"""


LEAST_SERVER_ERROR = 500


def outcome_of(request: InFlightRequest) -> str:
    """How a request that was let in has ended. What the engine has refused did not finish, although
    its answer came whole: it was invalid, or else the engine failed on it.
    """
    phase, status = request.lifecycle.phase, request.engine_status
    if not status or phase is not RequestPhase.FINISHED:
        return phase._value_
    return INVALID if status < LEAST_SERVER_ERROR else RequestPhase.FAILED._value_


def ended_request(request: InFlightRequest, outcome: str) -> EndedRequest:
    adapter, choice = request.model.adapter, request.choice
    return EndedRequest(
        request.model.base,
        None if adapter is None else adapter.name,
        outcome,
        request.done,
        request.t_start,
        request.t_sent,
        request.t_head,
        request.t_end,
        request.client_request.request_id,
        request.requester.tenant,
        "" if adapter is None else adapter.digest,
        request.code,
        "" if choice is None else choice.worker.id,
        "" if choice is None else choice.reason._value_,
        "" if choice is None or adapter is None else choice.tier._name_.lower(),
        None if choice is None else choice.cost,
        request.candidates,
        request.blocked,
        request.t_first_sent,
        request.moved_s,
        request.moves,
        request.lifecycle.attempts,
        request.client_request.streams,
        request.client_request.path,
        request.message,
        request.earlier,
        "" if request.trace is None else request.trace.id,
        request.engine_status,
        request.used.prompt_tokens,
        request.used.output_tokens,
    )
