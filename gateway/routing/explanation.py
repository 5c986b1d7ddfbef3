"""Pure. A decision as people read it: one row for each worker, with every term in milliseconds."""

from __future__ import annotations

from gateway.routing.policy import Candidate


def candidate_row(found: Candidate) -> dict[str, object]:
    """One worker of an explanation."""
    return {
        "worker": found.worker.id,
        "eligible": found.eligible,
        "note": found.note,
        "tier": found.tier.name.lower(),
        "load": found.worker.load,
        "open_slots": found.worker.open_slots,
        "cost_ms": round(found.cost.total_s * 1e3, 2),
        "terms_ms": found.cost.terms_ms(),
    }
