"""Pure. The timeline of one request: its phases in milliseconds, the decision that chose its
worker, and all of it in sentences. They say what it waited for, and what would have made it faster.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TypeAlias

from gateway.admin.requests.explanation import advice, words
from gateway.telemetry.ended_request import EndedRequest
from gateway.telemetry.request_phases import phases_ms

Timeline: TypeAlias = dict[str, object]


def row(e: EndedRequest, wall: float, process: str) -> Timeline:
    """One row of the list. `wall` is added to its times to get seconds since 1970. `process` is the
    gateway process that had it.
    """
    return {
        "process": process,
        "id": e.request_id,
        "at": datetime.fromtimestamp(e.t_start + wall, UTC).isoformat(timespec="milliseconds"),
        "base": e.base,
        "adapter": e.adapter,
        "key": e.tenant,
        "worker": e.worker or None,
        "outcome": e.outcome,
        "code": e.code or None,
        "engine_status": e.engine_status or None,
        "tier": e.tier or None,
        "reason": e.reason or None,
        "moves": e.moves,
        "trace_id": e.trace_id or None,
        "ttft_ms": None if e.first_token_s is None else round(e.first_token_s * 1e3, 1),
        "total_ms": round((e.t_end - e.t_start) * 1e3, 1),
        "prompt_tokens": e.prompt_tokens if e.is_counted else None,
        "output_tokens": e.output_tokens if e.is_counted else None,
        "phases_ms": phases_ms(e),
    }


def timeline(e: EndedRequest, wall: float, process: str) -> Timeline:
    """Everything about one request. `expected_ms` is the cost that the decision expected, which
    includes what the request costs others. `happened_ms` is the time from its dispatch to its first
    token.
    """
    expected = _expected(e)
    return {
        **row(e, wall, process),
        "digest": e.digest or None,
        "attempts": e.attempts,
        "message": e.message or None,
        "earlier": list(e.earlier),
        "decision": {
            "candidates": list(e.candidates),
            "chosen_terms_ms": None if expected is None else expected["terms_ms"],
            "expected_ms": None if expected is None else expected["cost_ms"],
            "happened_ms": round((e.t_head - e.t_sent) * 1e3, 2)
            if e.first_token_s is not None and e.t_head > e.t_sent
            else None,
        },
        "words": list(words(e)),
        "faster": list(advice(e)),
    }


def _expected(e: EndedRequest) -> Mapping[str, object] | None:
    """The expected cost of the chosen worker: of the decision, or else of the list of
    candidates.
    """
    if e.cost is not None:
        return {"cost_ms": round(e.cost.total_s * 1e3, 2), "terms_ms": e.cost.terms_ms()}
    return next((c for c in e.candidates if c["worker"] == e.worker), None)
