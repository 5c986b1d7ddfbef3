"""Shell. What the gauges of the fleet say of a worker, and what is counted by key."""

from __future__ import annotations

import msgspec
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from gateway.dispatch.streams.journal import (
    NO_MEMORY,
    NOT_JOURNALED,
    SWITCHED_OFF,
    TOO_LONG,
)
from gateway.fleet.fleet import Fleet
from gateway.routing.policy import CostBreakdown
from gateway.supervisor.autoscaling.reports import ModelStatus
from gateway.telemetry.collectors import FleetCollector
from gateway.telemetry.ended_request import EndedRequest
from gateway.telemetry.metric_definitions import ADAPTER_LABELS, LOST_REASONS, USAGE_LABELS
from gateway.telemetry.prometheus import GaugeSources, Metrics
from shared.link.messages import AdapterState, Heartbeat, Tier, WorkerState


def state_of(fleet: Fleet) -> list[str]:
    (up, *_) = FleetCollector(fleet).collect()
    return [sample.labels["state"] for sample in up.samples]


def test_a_worker_that_nothing_can_be_sent_to_is_not_called_serving() -> None:
    fleet = Fleet(1.0)
    fleet.heartbeat(Heartbeat("w0", 1, 1, "base", WorkerState.SERVING, 8, 2), 0.0)
    assert state_of(fleet) == ["joining"]
    fleet.attach("w0", 1)
    assert state_of(fleet) == ["serving"]
    fleet.heartbeat(Heartbeat("w0", 1, 2, "base", WorkerState.DRAINING, 8, 2), 0.1)
    assert state_of(fleet) == ["draining"]


def test_requests_are_counted_by_key_up_to_a_bound_and_not_where_nobody_has_one() -> None:
    metrics = Metrics()
    ended = EndedRequest("a", None, "finished", None, 1.0, 1.0, 1.0, 2.0)
    metrics.finished(ended)
    for number in range(USAGE_LABELS + 10):
        metrics.finished(msgspec.structs.replace(ended, tenant=f"k{number}"))
    metrics.refused(msgspec.structs.replace(ended, tenant="k0", outcome="refused"))
    count = "loraplex_key_requests_total"
    assert metrics.value(count, {"key": "k0", "outcome": "finished"}) == 1
    assert metrics.value(count, {"key": "k0", "outcome": "refused"}) == 1
    assert metrics.value(count, {"key": "_other", "outcome": "finished"}) == 10
    assert metrics.value(count, {"key": "", "outcome": "finished"}) is None


def test_names_of_before_a_restart_count_for_the_bounds_of_labels() -> None:
    before, metrics = Metrics(), Metrics()
    ended = EndedRequest("a", None, "finished", None, 1.0, 1.0, 1.0, 2.0)
    for number in range(USAGE_LABELS):
        before.finished(msgspec.structs.replace(ended, tenant=f"k{number}"))
    for number in range(ADAPTER_LABELS):
        before.alias_request("a", f"v{number}", "x", failed=False)
    metrics.restore(before.snapshot())
    metrics.finished(msgspec.structs.replace(ended, tenant="new"))
    metrics.alias_request("a", "new", "x", failed=False)
    metrics.alias_rollback("a", "v0")
    count, aliases = "loraplex_key_requests_total", "loraplex_alias_requests_total"
    assert metrics.value(count, {"key": "new", "outcome": "finished"}) is None
    assert metrics.value(count, {"key": "_other", "outcome": "finished"}) == 1
    other = {"base": "a", "alias": "_other", "adapter": "_other", "outcome": "ok"}
    assert metrics.value(aliases, other) == 1
    assert metrics.value("loraplex_alias_rollbacks_total", {"base": "a", "alias": "v0"}) == 1


def test_what_routing_expected_is_put_beside_what_happened_where_both_are_known() -> None:
    metrics, cost = Metrics(), CostBreakdown(queue_s=0.1, load_s=0.1, slot_s=5.0, stall_s=5.0)
    ended = EndedRequest("a", None, "finished", None, 1.0, 1.0, 1.3, 2.0, cost=cost, attempts=1)
    metrics.finished(ended)  # 0.3 s for 0.2
    for other in ({"cost": None}, {"streamed": False}, {"attempts": 2}, {"t_head": 0.0}):
        metrics.finished(msgspec.structs.replace(ended, **other))
    name = "loraplex_ttft_over_expected"
    assert metrics.value(f"{name}_count", {"base": "a"}) == 1
    assert metrics.value(f"{name}_sum", {"base": "a"}) == pytest.approx(1.5)


def scraped(metrics: Metrics, **how: bool) -> str:
    return metrics.render([metrics.snapshot()], {}, **how).decode()


TRACED = EndedRequest(
    "a", None, "finished", None, 1.0, 1.0, 1.3, 2.0, path="/v1/completions", trace_id="4bf9"
)


def test_the_newest_traced_request_of_a_bucket_is_its_exemplar_in_openmetrics_alone() -> None:
    metrics = Metrics()
    metrics.gen_ai = True
    metrics.finished(msgspec.structs.replace(TRACED, trace_id=""))
    for trace_id, t_head in (("older", 1.25), ("newer", 1.29), ("slow", 1.9)):
        metrics.finished(msgspec.structs.replace(TRACED, trace_id=trace_id, t_head=t_head))
    text = scraped(metrics, exemplars=True)
    found = {
        (family.name, sample.labels["le"]): sample.exemplar.labels["trace_id"]
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.exemplar
    }
    assert found["loraplex_ttft_seconds", "0.3"] == "newer"
    assert found["loraplex_ttft_seconds", "1.0"] == "slow"
    assert found["loraplex_request_seconds", "1.0"] == "slow"
    assert found["gen_ai_server_time_to_first_token_seconds", "0.5"] == "newer"
    assert "trace_id" not in scraped(metrics)


def test_exemplars_of_all_processes_are_joined_and_without_traces_there_are_none() -> None:
    one, two = Metrics("g0"), Metrics("g1")
    for number, metrics in enumerate((one, two)):
        metrics.gen_ai = True
        for n in range(100):
            metrics.finished(msgspec.structs.replace(TRACED, trace_id=f"{number}-{n}"))
    text = one.render([two.snapshot(), one.snapshot()], {}, exemplars=True).decode()
    assert 'trace_id="1-99"' in text and "0-99" not in text
    assert len(one.snapshot().exemplars) == 4  # one bucket of each distribution
    off = Metrics()
    off.finished(msgspec.structs.replace(TRACED, trace_id=""))
    assert off.snapshot().exemplars == ()


@pytest.mark.parametrize("exemplars", [False, True])
def test_who_may_not_see_tenants_finds_no_name_of_theirs_in_any_series(exemplars: bool) -> None:
    fleet = Fleet(1.0)
    held = (AdapterState("theirs", "d", Tier.GPU),)
    beat = Heartbeat("w0", 1, 1, "a", WorkerState.SERVING, 8, 2, adapters=held)
    fleet.heartbeat(beat, 0.0)
    metrics = Metrics(gauge_sources=GaugeSources(fleet=fleet))
    metrics.gen_ai = True
    ended = msgspec.structs.replace(TRACED, adapter="theirs", tenant="theirs")
    metrics.finished(ended)
    metrics.refused(msgspec.structs.replace(ended, outcome="limited"), "requests_per_minute")
    metrics.used(("theirs", "a", "theirs"), 1, 1)
    metrics.alias_request("a", "theirs", "theirs", failed=False)
    metrics.alias_rollback("a", "theirs")
    assert scraped(metrics, exemplars=exemplars).count("theirs") > 7
    assert "theirs" not in scraped(metrics, tenants=False, exemplars=exemplars)


def test_an_answer_that_comes_whole_is_no_slow_first_token() -> None:
    metrics = Metrics()
    metrics.finished(msgspec.structs.replace(TRACED, streamed=False))
    labels = {"base": "a", "cold": "no"}
    count = "loraplex_ttft_seconds_count"
    assert metrics.value(count, labels | {"streamed": "no"}) == 1
    assert metrics.value(count, labels | {"streamed": "yes"}) == 0


def test_a_request_over_a_limit_is_counted_by_key_and_limit_and_its_key_within_the_bound() -> None:
    metrics = Metrics()
    limited = msgspec.structs.replace(TRACED, outcome="limited", tenant="k")
    metrics.refused(limited, "requests_per_minute")
    for number in range(USAGE_LABELS + 10):
        metrics.refused(msgspec.structs.replace(limited, tenant=f"k{number}"), "n")
    count = "loraplex_limits_hit_total"
    assert metrics.value(count, {"key": "k", "limit": "requests_per_minute"}) == 1
    assert metrics.value(count, {"key": "_other", "limit": "n"}) == 11
    assert metrics.value("loraplex_key_requests_total", {"key": "k", "outcome": "limited"}) == 1


def test_a_scaling_decision_is_exported_with_its_reason() -> None:
    metrics = Metrics()
    held = ModelStatus(
        wanted=2,
        serving=2,
        recommended=5,
        cause="slots",
        needs={"slots": 5, "kv_usage": 1},
        ongoing=7.5,
        target_ongoing=4.0,
        held_by="upscale_delay_s",
        held_s=12.5,
    )
    metrics.watch_scaling(lambda: {"m": held, "new": ModelStatus(wanted=1)}, lambda: {"new"})
    lines = scraped(metrics).splitlines()
    for said in (
        'workers{base="m",state="recommended"} 5.0',
        'workers{base="m",state="wanted"} 2.0',
        'scaling_requests{base="m",what="ongoing"} 7.5',
        'scaling_requests{base="m",what="target"} 4.0',
        'scaling_needs{base="m",bottleneck="slots"} 5.0',
        'scaling_cause{base="m",cause="slots"} 1.0',
        'scaling_held_seconds{base="m",delay="upscale_delay_s"} 12.5',
    ):
        assert f"loraplex_{said}" in lines
    assert not [x for x in lines if x.startswith("loraplex_scaling_cause") and '"new"' in x]
    assert [x for x in lines if x.startswith("loraplex_scales_to_zero{")] == [
        'loraplex_scales_to_zero{base="new"} 1.0'
    ]


def test_why_answers_break_off_is_shown_before_any_has() -> None:
    known = {SWITCHED_OFF, NOT_JOURNALED, TOO_LONG, NO_MEMORY}
    assert known <= set(LOST_REASONS)
    for reason in LOST_REASONS:
        assert Metrics().value("loraplex_streams_lost_total", {"reason": reason}) == 0
