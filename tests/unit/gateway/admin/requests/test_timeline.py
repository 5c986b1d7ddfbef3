"""Shell. The story of a request: phases that add up, sentences that say why."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from gateway.admin.requests.explanation import advice, words
from gateway.admin.requests.timeline import timeline
from gateway.routing.policy import CostBreakdown
from gateway.telemetry.ended_request import EndedRequest
from gateway.telemetry.request_phases import PHASES, phases_ms
from shared.link.messages import Done, Tier

WARM = EndedRequest(
    "base", "a", "finished", Done(1, 10, 11), 10.0, 10.0, 10.1, 10.6, "r", worker="w0",
    reason="resident", tier="gpu", cost=CostBreakdown(queue_s=0.02), t_first_sent=10.0, attempts=1,
)  # fmt: skip


def like(**more: Any) -> EndedRequest:
    return msgspec.structs.replace(WARM, **more)


COLD = like(done=Done(1, 10, 11, 0.08, 0.06, Tier.REMOTE, 0.03, 0.02), reason="cold", tier="remote")
COLD_PHASES = {"wait": 20.0, "fetch": 30.0, "check": 20.0, "load": 10.0, "prefill": 20.0}
QUEUED = like(t_start=9.0, blocked="slot")
FROM_ZERO = like(t_start=9.0, blocked="worker")
MOVED = like(t_sent=10.4, t_head=10.1, moved_s=0.1, moves=1, attempts=2)
NEVER_SENT = like(done=None, t_sent=0.0, t_head=0.0, t_first_sent=0.0, worker="", cost=None,
                  outcome="failed", code="overloaded", blocked="room")  # fmt: skip
WHOLE = like(
    streamed=False, cost=None, candidates=({"worker": "w0", "cost_ms": 7.0, "terms_ms": {}},)
)
LEFT = like(done=None, t_head=0.0, outcome="aborted")
TURNED_AWAY = like(done=None, t_start=10.6, t_sent=0.0, t_head=0.0, t_first_sent=0.0, worker="",
                   cost=None)  # fmt: skip
LIMITED = msgspec.structs.replace(
    TURNED_AWAY, outcome="limited", code="rate_limit_exceeded", tenant="team-a",
    message="This key may use 2 requests a minute.",
)  # fmt: skip
INVALID = msgspec.structs.replace(
    TURNED_AWAY, outcome="invalid", code="invalid_adapter_rank", message="Its rank is 512."
)
FAILED_OVER = like(
    t_sent=10.4, t_head=10.5, attempts=2, earlier=("w1 had it: The worker was lost.",)
)
STILL = like(done=None, t_sent=0.0, t_head=0.0, t_first_sent=0.0, worker="", cost=None,
             outcome="open", blocked="slot")  # fmt: skip
LATE = like(t_head=10.5, cost=CostBreakdown(queue_s=0.02))
SLOT_WAIT = like(done=Done(1, 10, 11, 0.5, 0.02, Tier.CPU), t_head=10.55)


@pytest.mark.parametrize("e", [WARM, COLD, QUEUED, MOVED, NEVER_SENT, WHOLE, LEFT, LIMITED, STILL])
def test_the_phases_add_up_to_the_whole_time(e: EndedRequest) -> None:
    spent = phases_ms(e)
    assert tuple(spent) == PHASES and min(spent.values()) >= 0
    assert sum(spent.values()) == pytest.approx((e.t_end - e.t_start) * 1e3, abs=0.1)


def test_each_phase_is_what_it_is_called() -> None:
    assert phases_ms(WARM) | {"prefill": 100.0, "decode": 500.0} == phases_ms(WARM)
    assert phases_ms(COLD) | COLD_PHASES == phases_ms(COLD)
    assert phases_ms(QUEUED)["queue"] == 1000
    assert phases_ms(MOVED) | {"lost": 300.0, "moved": 100.0, "decode": 200.0} == phases_ms(MOVED)
    assert phases_ms(NEVER_SENT)["queue"] == 600
    assert phases_ms(WHOLE)["decode"] == 600
    assert phases_ms(LEFT)["prefill"] == 600


@pytest.mark.parametrize(
    ("e", "said"),
    [
        (COLD, "Its adapter cost 60 ms. It came from the store: it was fetched"),
        (QUEUED, "It waited 1000 ms in the gateway's queue: no worker had a slot"),
        (FROM_ZERO, "It waited 1000 ms in the gateway's queue: no worker served its model"),
        (MOVED, "another worker went on with it (once)"),
        (NEVER_SENT, "failed (overloaded) after 600 ms."),
        (NEVER_SENT, "It never reached a worker: no worker had room"),
        (LEFT, "was given up by its client, before its first token, after"),
        (
            LIMITED,
            "turned away (rate_limit_exceeded) after 0 ms. Its client was told: This key may",
        ),
        (INVALID, "turned away (invalid_adapter_rank)"),
        (FAILED_OVER, "Before that, w1 had it: The worker was lost. w0 got it"),
        (STILL, "is still open, after 600 ms. Most of that was the wait in the gateway's queue"),
        (STILL, "It has not reached a worker yet: no worker had a slot for another adapter"),
        (LATE, "that took 500 ms; routing had expected waits and loads of 20 ms."),
        (SLOT_WAIT, "It waited 480 ms on the worker, for a slot that others used, before"),
        (COLD, "Most of that was the engine, for the tokens of its answer: 500 ms."),
        (WARM, "w0 got it, for it had the adapter, or was loading it; its cost was put at 20 ms."),
    ],
)
def test_the_words_say_what_it_waited_for(e: EndedRequest, said: str) -> None:
    assert said in " ".join(words(e))


def test_the_tokens_that_a_lost_worker_made_of_an_answer_that_moved_are_no_loss() -> None:
    said = " ".join(words(MOVED))
    assert "2 workers were tried; that cost 100 ms." in said
    assert " each." not in said, "the last worker has made a part of the tokens"
    lost = "Workers that do not give requests back or die"
    assert [*advice(MOVED)] == [f"{lost} (about 100 ms)"]
    assert f"{lost} (about 400 ms)" in [*advice(FAILED_OVER)]


def test_the_advice_is_what_would_have_saved_most_first() -> None:
    assert [*advice(WARM)] == []
    assert next(iter(advice(COLD))) == "A pin: loraplex adapters pin a (about 60 ms)"
    assert next(iter(advice(QUEUED))).startswith("One more adapter slot (max_loras)")
    assert next(iter(advice(NEVER_SENT))).startswith("One more worker")
    assert next(iter(advice(FROM_ZERO))).startswith("A worker that serves already (min_replicas")
    assert next(iter(advice(LIMITED))).startswith("Higher limits for the key team-a")
    assert [*advice(INVALID)] == [
        "A new version of the adapter, without its mistake: loraplex adapters show a"
    ]
    assert next(iter(advice(SLOT_WAIT))).startswith("One more adapter slot")


def test_the_decision_tells_what_was_expected_and_what_happened() -> None:
    decision = timeline(WARM, 0.0, "g0")["decision"]
    assert isinstance(decision, dict)
    assert (decision["expected_ms"], decision["happened_ms"]) == (20.0, 100.0)
    assert decision["chosen_terms_ms"]["queue"] == 20.0
    whole = timeline(WHOLE, 0.0, "g0")
    assert isinstance(whole["decision"], dict) and whole["decision"]["expected_ms"] == 7.0
    assert whole["ttft_ms"] is None and whole["decision"]["happened_ms"] is None
    unplanned = timeline(NEVER_SENT, 0.0, "g0")["decision"]
    assert isinstance(unplanned, dict) and unplanned["expected_ms"] is None
