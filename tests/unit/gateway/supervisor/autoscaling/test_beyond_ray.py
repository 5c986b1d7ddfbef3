"""What Ray does not count asks for workers too: adapters for slots, KV cache, tokens that wait."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.supervisor.autoscaling.autoscaler import Autoscaler, AutoscalingContext
from gateway.supervisor.autoscaling.reports import (
    HeldAdapter,
    LoadReport,
    ModelLoad,
    WorkerLoad,
    decode_report,
    encode,
)
from shared.config.deployment import AutoscalingConfig
from shared.config.llm import LLMConfig
from shared.config.loader import parse_settings
from shared.errors import ConfigError


def scaler(wanted: int = 1, **more: Any) -> Autoscaler:
    fields = {"max_replicas": 9, "target_ongoing_requests": 1000.0, "upscale_delay_s": 0.0, **more}
    return Autoscaler("m", AutoscalingConfig(**fields), wanted, 256)


def load(adapters: int = 0, workers: int = 1, queued_tokens: int = 0, **worker: Any) -> ModelLoad:
    return ModelLoad(
        adapters=tuple(f"a{n}" for n in range(adapters)),
        queued_tokens=queued_tokens,
        workers={f"w{n}": WorkerLoad(serving=True, **worker) for n in range(workers)},
    )


def test_more_adapters_in_use_than_slots_ask_for_a_worker_however_few_the_requests() -> None:
    s = scaler()
    s.report("g0", load(adapters=9, slots=4, requests=9), 0.0)
    decision = s.decide(1.0, ["w0"])
    assert (decision.wanted, decision.cause) == (3, "slots")
    assert "slots need 3" in decision.reason


def test_adapters_are_counted_once_however_many_processes_have_them() -> None:
    s = scaler()
    for process in ("g0", "g1", "g2"):
        s.report(process, load(adapters=4, slots=4), 0.0)
    assert s.decide(1.0, ["w0"]).wanted == 1


def test_a_switched_off_bottleneck_asks_for_nothing() -> None:
    for off in (None, {"slots": None}):
        s = scaler(bottlenecks=off)
        s.report("g0", load(adapters=9, slots=4, kv_usage=0.1), 0.0)
        assert s.decide(1.0, ["w0"]).wanted == 1


def test_workers_whose_kv_caches_are_full_ask_for_one_more_by_their_sum() -> None:
    s = scaler(2)
    s.report("g0", load(workers=2, kv_usage=0.95), 0.0)
    decision = s.decide(1.0, ["w0", "w1"])
    assert (decision.wanted, decision.cause) == (3, "kv_usage")
    s = scaler(2)
    s.report("g0", load(workers=2, kv_usage=0.85), 0.0)
    assert s.decide(1.0, ["w0", "w1"]).recommended <= 2


def test_prompt_tokens_that_wait_longer_than_the_ttft_ask_for_workers() -> None:
    s = scaler(bottlenecks={"ttft_s": 2.0})
    s.report("g0", load(prefill_tokens_per_s=1000.0, queued_tokens=5500), 0.0)
    decision = s.decide(1.0, ["w0"])
    assert (decision.wanted, decision.cause) == (3, "ttft")


def test_a_bottleneck_keeps_workers_that_the_requests_alone_would_let_go() -> None:
    s = scaler(3, downscale_delay_s=0.0)
    s.report("g0", load(adapters=9, workers=3, slots=4), 0.0)
    assert s.decide(1.0, ["w0", "w1", "w2"]).wanted == 3


def test_the_delays_hold_for_bottlenecks_too() -> None:
    s = scaler(upscale_delay_s=30.0)
    for second in range(30):
        s.report("g0", load(adapters=9, slots=4), float(second))
        assert s.decide(float(second), ["w0"]).wanted == 1
    assert s.decide(30.0, ["w0"]).wanted == 3


def test_without_a_target_it_is_a_share_of_what_the_worker_runs_at_once() -> None:
    s = scaler(target_ongoing_requests=None)
    assert s.target_ongoing([]) == pytest.approx(0.7 * 256)
    s.report("g0", load(capacity=10, requests=15), 0.0)
    decision = s.decide(1.0, ["w0"])
    assert decision.target_ongoing == pytest.approx(7.0) and decision.wanted == 3


def policy_of_two(ctx: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    return ctx.current_num_replicas + 1.2, {"asked": ctx.policy_state.get("asked", 0) + 1}


def test_a_policy_of_ones_own_is_asked_and_its_answer_is_delayed_and_bounded_as_any() -> None:
    config = AutoscalingConfig(max_replicas=2, upscale_delay_s=5.0)
    s = Autoscaler("m", config, 1, 256, policy_of_two)
    s.report("g0", load(), 0.0)
    assert (s.decide(1.0, ["w0"]).wanted, s.decide(1.0, ["w0"]).recommended) == (1, 3)
    decision = s.decide(6.0, ["w0"])
    assert (decision.wanted, decision.cause, decision.bounded_by) == (2, "policy", "max_replicas")
    assert s._policy_state == {"asked": 3}


def rays_own_policy(ctx: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """As Ray 2.60's replica_queue_length_autoscaling_policy reckons."""
    target = ctx.config.get_target_ongoing_requests()
    assert target == ctx.config.target_ongoing_requests is not None
    return ctx.current_num_replicas * (ctx.total_num_requests / target), {}


def test_a_policy_learns_the_target_that_holds_where_none_is_given() -> None:
    config = AutoscalingConfig(max_replicas=9, upscale_delay_s=0.0)
    s = Autoscaler("m", config, 1, 256, rays_own_policy)
    s.report("g0", load(capacity=10, requests=15), 0.0)
    assert s.decide(1.0, ["w0"]).wanted == 3


def test_a_report_survives_its_way_over_a_socket() -> None:
    report = LoadReport(
        "g0", {"m": load(adapters=2, slots=3, in_use=(HeldAdapter("a", "1"),), requests=1)}
    )
    assert decode_report(encode(report)) == report


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        ({"policy": {"policy_function": "nothing"}}, "expected module:function"),
        ({"bottlenecks": {"kv_usage": 2}}, "at most 1"),
        ({"bottlenecks": {"kv": 1}}, "known keys: slots, kv_usage"),
    ],
)
def test_what_cannot_be_is_refused(scaling: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        model(scaling)


def model(scaling: dict[str, Any]) -> LLMConfig:
    return LLMConfig(
        model_loading_config={"model_id": "m"},
        engine_kwargs={"max_num_seqs": 20},
        deployment_config={"autoscaling_config": scaling},
    )


def test_a_model_says_its_target_before_any_worker_serves() -> None:
    assert model({}).target_ongoing_requests == pytest.approx(14.0)
    assert model({"target_ongoing_requests": 3}).target_ongoing_requests == 3.0


def test_rays_own_policy_in_a_file_is_ours() -> None:
    name = "ray.serve.autoscaling_policy:default_autoscaling_policy"
    scaling = model({"policy": {"policy_function": name}}).deployment_config.autoscaling_config
    assert scaling is not None and scaling.policy is not None
    assert scaling.policy.policy_function is None


def test_a_function_is_taken_by_its_import_path() -> None:
    scaling = model({"policy": {"policy_function": policy_of_two}})
    found = scaling.deployment_config.autoscaling_config
    assert found is not None and found.policy is not None
    assert found.policy.policy_function == f"{__name__}:policy_of_two"


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        ("{max_replicas: 4}", "is not given, and Ray LLM's default (1e9) never scales"),
        ("{max_replicas: 4, target_ongoing_requests: 1000000000}", "never asks for another worker"),
        ("{look_back_period_s: 5}", "is not longer than metrics_interval_s (10)"),
    ],
)
def test_what_will_not_scale_as_expected_is_warned_about_with_its_line(
    scaling: str, said: str
) -> None:
    text = (
        "llm_configs:\n- model_loading_config: {model_id: m}\n"
        f"  deployment_config: {{autoscaling_config: {scaling}}}\n"
    )
    (warning,) = parse_settings(text, "c.yaml", lambda path: "").warnings
    assert warning.startswith("c.yaml:3: ") and said in warning
