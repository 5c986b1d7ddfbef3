"""Pure. Makes the EndedRequest record of a request at its end."""

from __future__ import annotations

from gateway.dispatch.lifecycle import RequestPhase
from gateway.dispatch.request import InFlightRequest
from gateway.telemetry.ended_request import EndedRequest
from shared.errors import DeadlineExceeded, Overloaded, RateLimited

REFUSED = "refused"
OPEN = "open"
"""It has not ended yet."""
LIMITED, INVALID = "limited", "invalid"
"""Outcomes of requests that never came to the dispatcher: their key was over its limits, or the
request itself could not be served.
"""


LEAST_SERVER_ERROR = 500
NO_TURN = frozenset((Overloaded.code, RateLimited.code, DeadlineExceeded.code))
"""The codes of requests for which there was no room, or none in time."""


def outcome_of(request: InFlightRequest) -> str:
    """How a request that was let in has ended. What the engine has refused did not finish, although
    its answer came whole: it was invalid, or else the engine failed on it.
    """
    phase, status = request.lifecycle.phase, request.engine_status
    if phase is RequestPhase.FAILED and _goes_on_waiting(request):
        return RequestPhase.ABORTED._value_
    if not status or phase is not RequestPhase.FINISHED:
        return phase._value_
    return INVALID if status < LEAST_SERVER_ERROR else RequestPhase.FAILED._value_


def refused_as(request: InFlightRequest) -> str:
    """How a request has ended that was not let in."""
    return RequestPhase.ABORTED._value_ if _goes_on_waiting(request) else REFUSED


def _goes_on_waiting(request: InFlightRequest) -> bool:
    """Whether it is a line of a batch whose turn has not come. It is asked again, and its client
    has seen no error.
    """
    return request.requester.in_batch and not request.t_sent and request.code in NO_TURN


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
