"""Pure. The story of one request: its phases in milliseconds, the decision that sent it where it
went, and all of it in words: what it waited for, and what would have made it faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import TypeAlias

from gateway.telemetry.ended_request import EndedRequest
from shared.link.messages import Tier

PHASES = ("queue", "lost", "moved", "wait", "load", "prefill", "decode")
"""In the gateway's queue; on workers that gave it back or were lost; without a worker in between;
at its worker before its start in the engine; the part of that for its adapter; until its first
token; until its last.
"""
WORTH_SAYING_MS = 10.0
"""A phase shorter than this is nobody's reason for being slow."""
FROM = {
    "remote": "the store: it was fetched, checked and loaded",
    "disk": "the worker's disk: it was loaded into a slot",
    "cpu": "the worker's host memory: it was put into a slot",
}
Story: TypeAlias = dict[str, object]


def phases_ms(e: EndedRequest) -> dict[str, float]:
    """They add up to the whole time. What the worker did not tell counts as prefill or decode; of
    an answer that came whole all of that is decode.
    """
    if not e.t_sent:
        return _rounded({"queue": e.t_end - e.t_start})
    done, sent = e.done, e.t_sent
    on_worker_s = e.t_end - sent
    told_s = min(done.wait_s, on_worker_s) if done is not None else 0.0
    load_s = min(done.load_s, told_s) if done is not None else 0.0
    prefill_s = max(0.0, _until_first_token_s(e) - told_s)
    return _rounded(
        {
            "queue": (e.t_first_sent or sent) - e.t_start,
            "lost": sent - (e.t_first_sent or sent) - e.moved_s,
            "moved": e.moved_s,
            "wait": told_s - load_s,
            "load": load_s,
            "prefill": prefill_s,
            "decode": on_worker_s - told_s - prefill_s,
        }
    )


def _until_first_token_s(e: EndedRequest) -> float:
    """From its last dispatch; 0 where an earlier worker had begun, or nobody saw it."""
    if not e.t_head:
        return e.t_end - e.t_sent
    return e.t_head - e.t_sent if e.streamed and e.t_head > e.t_sent else 0.0


def row(e: EndedRequest, wall: float) -> Story:
    """One line of the list. `wall` is what to add to its clock for seconds since 1970."""
    done = e.done
    return {
        "id": e.request_id,
        "at": datetime.fromtimestamp(e.t_start + wall, UTC).isoformat(timespec="milliseconds"),
        "base": e.base,
        "adapter": e.adapter,
        "key": e.tenant,
        "worker": e.worker or None,
        "outcome": e.outcome,
        "code": e.code or None,
        "tier": e.tier or None,
        "reason": e.reason or None,
        "moves": e.moves,
        "ttft_ms": round((e.t_head - e.t_start) * 1e3, 1) if _seen(e) else None,
        "total_ms": round((e.t_end - e.t_start) * 1e3, 1),
        "prompt_tokens": done.prompt_tokens if done is not None else None,
        "output_tokens": done.output_tokens if done is not None else None,
        "phases_ms": phases_ms(e),
    }


def story(e: EndedRequest, wall: float) -> Story:
    """All of one request. `expected_ms` is what the choice put its cost at, which counts what it
    does to others too; `happened_ms` is the time from its dispatch to its first token.
    """
    expected = _expected(e)
    return {
        **row(e, wall),
        "digest": e.digest or None,
        "attempts": e.attempts,
        "decision": {
            "candidates": list(e.candidates),
            "chosen_terms_ms": None if expected is None else expected["terms_ms"],
            "expected_ms": None if expected is None else expected["cost_ms"],
            "happened_ms": round((e.t_head - e.t_sent) * 1e3, 2)
            if _seen(e) and e.t_head > e.t_sent
            else None,
        },
        "words": list(words(e)),
        "faster": list(advice(e)),
    }


def _expected(e: EndedRequest) -> Mapping[str, object] | None:
    """As the choice had it, or as it was listed for the worker that was chosen."""
    if e.cost is not None:
        return {"cost_ms": round(e.cost.total_s * 1e3, 2), "terms_ms": e.cost.terms_ms()}
    return next((c for c in e.candidates if c["worker"] == e.worker), None)


def _seen(e: EndedRequest) -> bool:
    """Somebody saw its first token come."""
    return bool(e.t_head) and e.streamed


def words(e: EndedRequest) -> Iterator[str]:
    """What happened, in sentences."""
    spent, who = phases_ms(e), _model(e)
    total_ms = (e.t_end - e.t_start) * 1e3
    yield f"The request for {who} {_ending(e)} after {total_ms:.0f} ms."
    if not e.t_sent:
        if spent["queue"] >= WORTH_SAYING_MS:
            yield f"It never reached a worker: {_waited_for(e)} for {spent['queue']:.0f} ms."
        else:
            yield "It never reached a worker."
        return
    if spent["queue"] >= WORTH_SAYING_MS:
        yield f"It waited {spent['queue']:.0f} ms in the gateway's queue: {_waited_for(e)}."
    yield f"{e.worker} got it{_because(e)}."
    if e.attempts > 1:
        lost_ms = spent["lost"] + spent["moved"]
        yield f"{e.attempts} workers were tried; that cost {lost_ms:.0f} ms."
    if e.moves:
        yield f"Its answer had begun, and another worker went on with it ({_times(e.moves)})."
    if spent["load"] >= WORTH_SAYING_MS and e.done is not None:
        came = FROM.get(e.done.tier.name.lower(), "elsewhere")
        yield f"Its adapter cost {spent['load']:.0f} ms. It came from {came}."
    if spent["wait"] >= WORTH_SAYING_MS:
        yield f"It waited {spent['wait']:.0f} ms on the worker before the engine began with it."
    if _seen(e):
        yield f"Its first token came {(e.t_head - e.t_start) * 1e3:.0f} ms after its arrival."
    if e.done is not None and e.done.output_tokens > 1 and spent["decode"]:
        each_ms = spent["decode"] / e.done.output_tokens
        yield f"{e.done.output_tokens} tokens took {spent['decode']:.0f} ms, {each_ms:.1f} ms each."


def advice(e: EndedRequest) -> Iterator[str]:
    """What would have made it faster, the largest saving first."""
    found = sorted(_savings(e), key=lambda saving: -saving[0])
    for saved_ms, text in found:
        if saved_ms >= WORTH_SAYING_MS:
            yield f"{text} (about {saved_ms:.0f} ms)"


def _savings(e: EndedRequest) -> Iterator[tuple[float, str]]:
    spent = phases_ms(e)
    if e.blocked == "slot":
        yield spent["queue"], "One more adapter slot (max_loras), or one more worker"
    else:
        yield spent["queue"], "One more worker"
    if e.adapter is not None and e.done is not None:
        yield spent["load"], f"A pin: loraplex adapters pin {e.adapter}"
        if e.done.tier is Tier.REMOTE:
            text = f"At least its files on disk before: loraplex adapters prefetch {e.adapter}"
            yield spent["load"] / 2, text
    yield spent["wait"], "A worker with fewer requests on it"
    yield spent["lost"] + spent["moved"], "Workers that do not give requests back or die"


def _model(e: EndedRequest) -> str:
    return e.base if e.adapter is None else f"{e.base}:{e.adapter}"


def _ending(e: EndedRequest) -> str:
    if e.outcome == "aborted":
        return "was given up by its client"
    return e.outcome if not e.code else f"{e.outcome} ({e.code})"


def _waited_for(e: EndedRequest) -> str:
    if e.blocked == "room":
        return "no worker had room for another request"
    if e.blocked == "slot":
        return "no worker had a slot for another adapter"
    return "it waited for its turn"


REASONS = {
    "base": "any worker serves the base model",
    "resident": "it had the adapter, or was loading it",
    "spill": "all that had the adapter were busy",
    "cold": "no worker had the adapter",
    "blind": "the policy does not look at adapters",
}


def _because(e: EndedRequest) -> str:
    why = REASONS.get(e.reason, e.reason)
    found = _expected(e)
    expected = "" if found is None else f"; its cost was put at {found['cost_ms']:.0f} ms"
    return f", for {why}{expected}" if why else expected


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(max(0.0, seconds.get(name, 0.0)) * 1e3, 2) for name in PHASES}
