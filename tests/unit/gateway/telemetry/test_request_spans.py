"""Shell. The spans of one request lie inside it, one after the other, and say what decided."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest

from gateway.routing.policy import CostBreakdown
from gateway.telemetry.ended_request import EndedRequest
from gateway.telemetry.request_spans import (
    asked_attributes,
    operation,
    phase_spans,
    request_span,
)
from shared.link.messages import Done, Tier

COLD = EndedRequest(
    "base", "a", "finished", Done(1, 10, 11, 0.08, 0.06, Tier.REMOTE, 0.03, 0.02),
    10.0, 10.1, 10.3, 10.6, "r", worker="w0", reason="cold", tier="remote", digest="d",
    cost=CostBreakdown(queue_s=0.02, load_s=0.05), t_first_sent=10.1, attempts=1,
    path="/v1/chat/completions", prompt_tokens=10, output_tokens=11,
)  # fmt: skip


def like(**more: Any) -> EndedRequest:
    return msgspec.structs.replace(COLD, **more)


REFUSED = like(t_sent=0.0, t_head=0.0, t_first_sent=0.0, done=None, worker="", code="overloaded",
               outcome="refused", cost=None)  # fmt: skip
MOVED = like(t_sent=10.2, t_first_sent=10.05, moved_s=0.05, moves=1, t_head=10.15, attempts=2)


@pytest.mark.parametrize("e", [COLD, REFUSED, MOVED, like(adapter=None), like(t_end=10.0)])
def test_phases_lie_inside_their_request_one_after_the_other(e: EndedRequest) -> None:
    whole, inside = request_span(e, 9.9), list(phase_spans(e, 9.9))
    assert whole.start == 9.9 and whole.end == e.t_end
    in_order = [span for span in inside if span.name != "routing"]
    assert in_order[0].name == "admission"
    for before, after in itertools.pairwise(in_order):
        assert before.end == pytest.approx(after.start, abs=1e-4) and after.start <= after.end
    assert in_order[-1].end == pytest.approx(e.t_end, abs=1e-3)


def test_the_choice_is_told_with_what_it_was_expected_to_cost() -> None:
    routing = next(span for span in phase_spans(COLD, 9.9) if span.name == "routing")
    assert routing.attributes["loraplex.routing.expected_ms"] == 70.0
    assert routing.attributes["loraplex.routing.load_ms"] == 50.0
    assert not [span for span in phase_spans(REFUSED, 9.9) if span.name == "routing"]


def test_the_request_is_told_in_the_words_of_the_conventions() -> None:
    facts = request_span(COLD, 9.9).attributes
    assert facts["gen_ai.request.model"] == "base:a" and facts["gen_ai.operation.name"] == "chat"
    assert (facts["gen_ai.usage.input_tokens"], facts["gen_ai.usage.output_tokens"]) == (10, 11)
    assert facts["gen_ai.response.time_to_first_chunk"] == pytest.approx(0.3)
    assert "error.type" not in facts and request_span(COLD, 9.9).error == ""
    assert request_span(REFUSED, 9.9).attributes["error.type"] == "overloaded"
    assert "loraplex.adapter.tier" not in request_span(like(adapter=None), 9.9).attributes


def test_each_path_has_an_operation() -> None:
    assert operation("/v1/completions") == "text_completion"
    assert operation("/v1/rerank?x=1") == "rerank"


def test_a_stream_that_another_worker_took_at_once_has_a_span_for_its_move() -> None:
    at_once = like(t_sent=10.2, moved_s=0.0, moves=1, earlier=("w1 had it: lost",))
    (move,) = [span for span in phase_spans(at_once, 9.9) if span.name == "move"]
    assert move.attributes["loraplex.before"] == ("w1 had it: lost",)
    assert not [span for span in phase_spans(COLD, 9.9) if span.name == "move"]


def test_what_was_asked_of_the_model_is_told_without_the_prompt() -> None:
    body = b'{"messages":[{"content":"secret"}],"max_tokens":5,"temperature":0,"n":1,"stop":"x"}'
    facts = request_span(COLD, 9.9, asked_attributes(body)).attributes
    assert facts["gen_ai.request.max_tokens"] == 5 and facts["gen_ai.request.temperature"] == 0.0
    assert facts["gen_ai.request.stop_sequences"] == ["x"]
    assert "gen_ai.request.choice.count" not in facts and "secret" not in str(facts)
    assert "gen_ai.request.seed" in asked_attributes(b'{"seed":9223372036854775807}')
    for odd in (
        b"",
        b"\xff",
        b'{"seed":9223372036854775808}',
        b'{"top_k":-9223372036854775809}',
        b"[]",
        b'{"n":"two"}',
        b"[" * 100_000,
    ):
        assert asked_attributes(odd) == {}


@pytest.mark.parametrize("stop", ["x" * 2000, ["x" * 600, "y" * 600], [""] * 2000, []])
def test_a_span_that_waits_for_its_collector_holds_no_long_stop_sequences(stop: object) -> None:
    body = msgspec.json.encode({"stop": stop, "max_tokens": 5})
    assert asked_attributes(body) == {"gen_ai.request.max_tokens": 5}
