"""Pure. One request in sentences: what became of it, what it waited for, what that cost, and what
would have made it faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from gateway.telemetry.ended_request import EndedRequest
from gateway.telemetry.request_phases import phases_ms
from shared.link.messages import Tier

OPEN = "open"
"""The outcome of a request that has not ended yet, as in dispatch/request_summary.py."""
NOT_LET_IN = ("refused", "limited", "invalid")
WORTH_SAYING_MS = 10.0
"""A shorter phase did not make the request slow, so no sentence mentions it."""
MOST = 0.5
"""A phase with so large a share of the time is named first."""
FAR_OFF = 2.0
"""A first token that took so many times as long as expected is worth a sentence."""
FROM = {
    "remote": "the store: it was fetched, checked and loaded",
    "disk": "the worker's disk: it was loaded into a slot",
    "cpu": "the worker's host memory: it was put into a slot",
}
REASONS = {
    "base": "any worker serves the base model",
    "resident": "it had the adapter, or was loading it",
    "spill": "all that had the adapter were busy",
    "cold": "no worker had the adapter",
    "blind": "the policy does not look at adapters",
    "kept": "it keeps what the request refers to",
}
SPENT_ON = {
    "queue": "the wait in the gateway's queue",
    "lost": "work on workers that did not finish it",
    "moved": "the wait for another worker, after one was lost",
    "wait": "the wait on its worker, before the engine began",
    "fetch": "the fetch of its adapter from the store",
    "check": "the check of its adapter's files",
    "load": "the load of its adapter into a slot",
    "prefill": "the engine, until the first token",
    "decode": "the engine, for the tokens of its answer",
}
WHAT_TO_DO = {
    "adapter_not_found": "A name that is there: loraplex adapters ls",
    "invalid_adapter": "A new version of the adapter, without its mistake: loraplex adapters show",
    "model_not_found": "A model that is served: GET /v1/models lists them",
    "model_unavailable": "A worker that can start: the log of `serve` has the reason",
    "worker_unavailable": "A worker of this model: loraplex status",
    "store_unavailable": "A store that answers: loraplex check tries it",
    "deadline_exceeded": "More time: x-loraplex-timeout-ms, or gateway.request_timeout_s",
}
"""Of requests that failed or were turned away, by their error's code."""


def words(e: EndedRequest) -> Iterator[str]:
    """What happened, in sentences."""
    spent = phases_ms(e)
    total_ms = (e.t_end - e.t_start) * 1e3
    who = f"The request for {_model(e)}" if e.base else "The request"
    yield f"{who} {_ending(e)} after {total_ms:.0f} ms."
    if e.message:
        yield f"Its client was told: {e.message}"
    if e.outcome not in NOT_LET_IN or e.t_sent:
        yield from _most(spent, total_ms)
    if not e.t_sent:
        if spent["queue"] >= WORTH_SAYING_MS and e.outcome not in NOT_LET_IN:
            yield f"{_never(e)}: {_waited_for(e)} for {spent['queue']:.0f} ms."
        else:
            yield f"{_never(e)}."
        return
    if spent["queue"] >= WORTH_SAYING_MS:
        yield f"It waited {spent['queue']:.0f} ms in the gateway's queue: {_waited_for(e)}."
    yield from _workers(e, spent)
    yield from _on_worker(e, spent)


def advice(e: EndedRequest) -> Iterator[str]:
    """What would have made it faster, the largest saving first. For one that failed, what would
    have helped it.
    """
    code = next((c for c in WHAT_TO_DO if e.code == c or e.code.startswith(f"{c}_")), "")
    if e.outcome == "limited":
        yield f"Higher limits for the key {e.tenant}: its entry in the file of gateway.keys_file"
    elif code:
        named = f" {e.adapter}" if code == "invalid_adapter" and e.adapter else ""
        yield WHAT_TO_DO[code] + named
    if e.outcome in ("limited", "invalid"):
        return
    for saved_ms, text in sorted(_savings(e), key=lambda saving: -saving[0]):
        if saved_ms >= WORTH_SAYING_MS:
            yield f"{text} (about {saved_ms:.0f} ms)"


def _most(spent: Mapping[str, float], total_ms: float) -> Iterator[str]:
    """The phase that took most of the time, if one did."""
    name, ms = max(spent.items(), key=lambda phase: phase[1])
    if total_ms >= WORTH_SAYING_MS and ms >= MOST * total_ms:
        yield f"Most of that was {SPENT_ON[name]}: {ms:.0f} ms."


def _never(e: EndedRequest) -> str:
    return "It has not reached a worker yet" if e.outcome == OPEN else "It never reached a worker"


def _workers(e: EndedRequest, spent: Mapping[str, float]) -> Iterator[str]:
    for earlier in e.earlier:
        yield f"Before that, {earlier}"
    yield f"{e.worker} got it{_because(e)}."
    if e.attempts > 1:
        yield f"{e.attempts} workers were tried; that cost {_lost_ms(e, spent):.0f} ms."
    if e.moves:
        yield f"Its answer had begun, and another worker went on with it ({_times(e.moves)})."


def _on_worker(e: EndedRequest, spent: Mapping[str, float]) -> Iterator[str]:
    adapter_ms = _adapter_ms(spent)
    if adapter_ms >= WORTH_SAYING_MS and e.done is not None:
        came = FROM.get(e.done.tier.name.lower(), "elsewhere")
        yield f"Its adapter cost {adapter_ms:.0f} ms. It came from {came}."
    if spent["wait"] >= WORTH_SAYING_MS:
        behind = "for a slot that others used" if adapter_ms else "behind other requests"
        yield (
            f"It waited {spent['wait']:.0f} ms on the worker, {behind}, "
            "before the engine began with it."
        )
    if e.first_token_s is not None:
        yield f"Its first token came {e.first_token_s * 1e3:.0f} ms after its arrival."
        yield from _expectation(e)
    elif e.outcome == OPEN:
        yield "No token has come yet."
    if e.done is not None and e.done.output_tokens > 1 and spent["decode"] and not e.moves:
        each_ms = spent["decode"] / e.done.output_tokens
        yield f"{e.done.output_tokens} tokens took {spent['decode']:.0f} ms, {each_ms:.1f} ms each."


def _expectation(e: EndedRequest) -> Iterator[str]:
    if e.cost is None or e.attempts > 1 or e.t_head <= e.t_sent:
        return
    expected_ms, took_ms = e.cost.ttft_s * 1e3, (e.t_head - e.t_sent) * 1e3
    if took_ms - expected_ms >= WORTH_SAYING_MS and took_ms >= FAR_OFF * expected_ms:
        yield (
            f"From its dispatch that took {took_ms:.0f} ms; routing had expected waits and loads "
            f"of {expected_ms:.0f} ms."
        )


def _savings(e: EndedRequest) -> Iterator[tuple[float, str]]:
    spent = phases_ms(e)
    if e.blocked == "slot":
        yield spent["queue"], "One more adapter slot (max_loras), or one more worker"
    elif e.blocked == "worker":
        yield spent["queue"], "A worker that serves already (min_replicas of 1 or more)"
    else:
        yield spent["queue"], "One more worker, or more requests on each (max_ongoing_requests)"
    if e.adapter is not None and e.done is not None:
        yield _adapter_ms(spent), f"A pin: loraplex adapters pin {e.adapter}"
        if e.done.tier is Tier.REMOTE:
            text = f"At least its files on disk before: loraplex adapters prefetch {e.adapter}"
            yield spent["fetch"] + spent["check"], text
    if _adapter_ms(spent):
        yield spent["wait"], "One more adapter slot (max_loras), or a pin"
    else:
        yield spent["wait"], "A worker with fewer requests on it"
    yield _lost_ms(e, spent), "Workers that do not give requests back or die"


def _lost_ms(e: EndedRequest, spent: Mapping[str, float]) -> float:
    """What its workers before the last one have cost. The tokens of an answer that moved count."""
    return spent["moved"] + (0.0 if e.moves else spent["lost"])


def _adapter_ms(spent: Mapping[str, float]) -> float:
    return spent["fetch"] + spent["check"] + spent["load"]


def _model(e: EndedRequest) -> str:
    return e.base if e.adapter is None else f"{e.base}:{e.adapter}"


def _ending(e: EndedRequest) -> str:
    if e.outcome == OPEN:
        return "is still open,"
    if e.outcome == "aborted":
        return f"was given up by its client, {_left_at(e)},"
    if e.engine_status:
        return f"was refused by the engine ({e.engine_status})"
    if e.outcome in NOT_LET_IN:
        return f"was turned away ({e.code})" if e.code else "was turned away"
    return e.outcome if not e.code else f"{e.outcome} ({e.code})"


def _left_at(e: EndedRequest) -> str:
    if not e.t_sent:
        return "while it waited in the queue"
    return "while its answer came" if e.t_head else "before its first token"


def _waited_for(e: EndedRequest) -> str:
    if e.blocked == "room":
        return "no worker had room for another request"
    if e.blocked == "worker":
        return "no worker served its model"
    if e.blocked == "slot":
        return "no worker had a slot for another adapter"
    return "it waited for its turn"


def _because(e: EndedRequest) -> str:
    why = REASONS.get(e.reason, e.reason)
    expected = "" if e.cost is None else f"; its cost was put at {e.cost.total_s * 1e3:.0f} ms"
    return f", for {why}{expected}" if why else expected


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
