"""Values of `autoscaling_config` beside what Ray 2.60's own class says of them.

The verdicts were written down from `ray.serve.config.AutoscalingConfig` of the 2.60.0 wheel.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from gateway.supervisor.autoscaling.autoscaler import Autoscaler
from gateway.supervisor.autoscaling.reports import ModelLoad, WorkerLoad
from shared.config.deployment import AutoscalingConfig
from shared.config.llm import LLMConfig
from shared.errors import ConfigError

INF = float("inf")
TAKEN: list[dict[str, Any]] = [
    {"initial_replicas": 0, "min_replicas": 0},
    {"initial_replicas": None},
    {"upscale_delay_s": 0},
    {"downscale_delay_s": 0.0},
    {"downscale_to_zero_delay_s": 0},
    {"downscale_to_zero_delay_s": None},
    {"target_ongoing_requests": 2},
    {"target_ongoing_requests": 0.25},
    {"target_ongoing_requests": None},
    {"smoothing_factor": 2},
    {"upscale_smoothing_factor": 2},
    {"downscale_smoothing_factor": 0.5},
    {"upscaling_factor": None},
    {"downscaling_factor": 1.5},
    {"look_back_period_s": 5, "metrics_interval_s": 10},
    {"aggregation_function": "mean"},
    {"max_replicas": 10**9},
]
REFUSED_BY_BOTH: list[dict[str, Any]] = [
    {"min_replicas": 1.5},
    {"min_replicas": -1},
    {"max_replicas": 0},
    {"min_replicas": 5},
    {"initial_replicas": 5},
    {"initial_replicas": 0},
    {"upscale_delay_s": -1},
    {"upscale_delay_s": "5s"},
    {"downscale_to_zero_delay_s": -1},
    {"target_ongoing_requests": 0},
    {"target_ongoing_requests": -2},
    {"target_ongoing_requests": float("nan")},
    {"smoothing_factor": 0},
    {"upscaling_factor": 0},
    {"downscaling_factor": -1},
    {"look_back_period_s": 0},
    {"metrics_interval_s": -1},
    {"aggregation_function": "median"},
    {"policy": "m:f"},
    {"policy": {"policy_function": 5}},
    {"max_replicas": "auto"},
]
SAID: list[tuple[dict[str, Any], str]] = [
    ({"min_replicas": "2"}, "write it without quotes"),
    ({"min_replicas": 2.0}, "expected a whole number"),
    ({"min_replicas": True}, "got true"),
    ({"downscale_delay_s": "5"}, "write it without quotes"),
    ({"target_ongoing_requests": INF}, "got inf"),
    ({"look_back_period_s": INF}, "got inf"),
    ({"target_num_ongoing_requests_per_replica": 2}, "did you mean 'target_ongoing_requests'"),
    ({"policy": {"name": "m:f"}}, "known keys: policy_function"),
    ({"upscale_delay": 3}, "did you mean 'upscale_delay_s'"),
]
"""Ray converts these, or passes over what it does not know without a word."""


def scaling(given: dict[str, Any]) -> AutoscalingConfig:
    found = LLMConfig(
        model_loading_config={"model_id": "m"},
        deployment_config={"autoscaling_config": {"max_replicas": 4, **given}},
    ).deployment_config.autoscaling_config
    assert found is not None
    return found


@pytest.mark.parametrize("given", TAKEN, ids=str)
def test_what_ray_takes_is_taken_with_its_value(given: dict[str, Any]) -> None:
    found = scaling(given)
    assert {name: getattr(found, name) for name in given} == given


def test_null_stands_for_the_default_that_auto_gives() -> None:
    for given in (None, {"max_replicas": None, "target_ongoing_requests": None}):
        found = LLMConfig(
            model_loading_config={"model_id": "m"},
            deployment_config={"num_replicas": "auto", "autoscaling_config": given},
        ).deployment_config.autoscaling_config
        assert found is not None
        assert (found.max_replicas, found.target_ongoing_requests) == (100, 2.0)


@pytest.mark.parametrize("given", REFUSED_BY_BOTH, ids=str)
def test_what_ray_refuses_is_refused_with_the_name_of_its_key(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"autoscaling_config.*{next(iter(given))}"):
        scaling(given)


@pytest.mark.parametrize(("given", "said"), SAID, ids=str)
def test_what_ray_guesses_or_passes_over_is_refused_and_the_way_out_is_said(
    given: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        scaling(given)


@pytest.mark.parametrize("seed", range(8))
def test_a_load_that_swings_at_random_changes_the_count_once_per_downscale_delay_at_most(
    seed: int,
) -> None:
    """Any two loads, for any times each: one way down and one way back per delay."""
    rng, delay_s, seconds = random.Random(seed), 30.0, 900
    low, high = sorted((rng.randint(1, 40), rng.randint(1, 40)))
    config = scaling(
        {
            "max_replicas": 50,
            "target_ongoing_requests": rng.choice((1.0, 2.0, 3.5)),
            "upscale_delay_s": rng.choice((0.0, 3.0)),
            "downscale_delay_s": delay_s,
            "look_back_period_s": rng.choice((1.0, 5.0)),
            "metrics_interval_s": 0.5,
        }
    )
    scaler = Autoscaler("m", config, 1, 100)
    ongoing, until, downs, before = low, 0.0, [], 1
    for second in range(seconds):
        if second >= until:
            ongoing = high if ongoing == low else low
            until = second + rng.choice((1, 5, 20, 31, 70))
        names = [f"w{n}" for n in range(scaler.wanted)]
        spread = {
            name: WorkerLoad(serving=True, requests=ongoing if not n else 0)
            for n, name in enumerate(names)
        }
        scaler.report("g0", ModelLoad(workers=spread), float(second))
        scaler.decide(float(second), names)
        if scaler.wanted < before:
            downs.append(second)
        before = scaler.wanted
    assert all(b - a >= delay_s for a, b in itertools.pairwise(downs))
    assert len(downs) <= 1 + seconds / delay_s
