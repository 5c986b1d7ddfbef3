"""Pure. The phases of a request, one after the other, and how long each took."""

from __future__ import annotations

from collections.abc import Mapping

from gateway.telemetry.ended_request import EndedRequest

PHASES = ("queue", "lost", "moved", "wait", "fetch", "check", "load", "prefill", "decode")
"""queue: in the gateway's queue. lost: on workers that gave it back or died. moved: without a
worker, in between. wait: at its worker, until the engine began, but for the next three. fetch: its
adapter's files came to the worker. check: they were checked. load: they went into a slot. prefill:
until its first token. decode: until its last token.
"""


def phases_ms(e: EndedRequest) -> dict[str, float]:
    """The phases. They add up to the whole time. What the worker did not report counts as prefill
    or decode. If the answer was sent whole, all of that counts as decode.
    """
    if not e.t_sent:
        return _rounded({"queue": e.t_end - e.t_start})
    done, sent = e.done, e.t_sent
    on_worker_s = e.t_end - sent
    told_s = min(done.wait_s, on_worker_s) if done is not None else 0.0
    load_s = min(done.load_s, told_s) if done is not None else 0.0
    fetch_s = min(done.fetch_s, load_s) if done is not None else 0.0
    check_s = min(done.check_s, load_s - fetch_s) if done is not None else 0.0
    prefill_s = max(0.0, _until_first_token_s(e) - told_s)
    return _rounded(
        {
            "queue": (e.t_first_sent or sent) - e.t_start,
            "lost": sent - (e.t_first_sent or sent) - e.moved_s,
            "moved": e.moved_s,
            "wait": told_s - load_s,
            "fetch": fetch_s,
            "check": check_s,
            "load": load_s - fetch_s - check_s,
            "prefill": prefill_s,
            "decode": on_worker_s - told_s - prefill_s,
        }
    )


def _until_first_token_s(e: EndedRequest) -> float:
    """From the last dispatch to the first token. 0 if an earlier worker had sent it, or if nobody
    saw it.
    """
    if not e.t_head:
        return e.t_end - e.t_sent
    return e.t_head - e.t_sent if e.streamed and e.t_head > e.t_sent else 0.0


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(max(0.0, seconds.get(name, 0.0)) * 1e3, 2) for name in PHASES}
