"""Shell. A scaling policy of the user's that raises, says nonsense, or does not come back."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.cli.main import main
from gateway.supervisor.autoscaling import custom_policy
from gateway.supervisor.autoscaling.autoscaler import Autoscaler, AutoscalingContext
from gateway.supervisor.autoscaling.custom_policy import load_policy
from gateway.supervisor.autoscaling.decision import ScalingDecision
from gateway.supervisor.autoscaling.reports import ModelLoad, WorkerLoad
from shared.config.deployment import AutoscalingConfig, AutoscalingPolicy


def exits(ctx: AutoscalingContext) -> Any:
    sys.exit(3)


def divides(ctx: AutoscalingContext) -> Any:
    return 1 / 0, {}


async def waits(ctx: AutoscalingContext) -> Any:
    return 3, {}


NONSENSE: list[Callable[[AutoscalingContext], Any]] = [
    exits,
    divides,
    waits,
    lambda ctx: (math.nan, {}),
    lambda ctx: (math.inf, {}),
    lambda ctx: (None, {}),
    lambda ctx: 3,
    lambda ctx: None,
    lambda ctx: (3, 5),
]


def scaler(policy: Any, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Autoscaler:
    """It wants four workers of which two serve."""
    monkeypatch.setattr(sys.modules[__name__], "the_policy", policy, raising=False)
    loaded = load_policy(AutoscalingPolicy(policy_function=f"{__name__}:the_policy"))
    config = AutoscalingConfig(
        max_replicas=9, upscale_delay_s=0.0, downscale_delay_s=0.0, upscaling_factor=2.0, **more
    )
    s = Autoscaler("m", config, 4, 256, loaded)
    serving = WorkerLoad(serving=True, requests=3, capacity=8)
    s.report("g0", ModelLoad(workers={"w0": serving, "w1": serving}), 0.0)
    return s


def decide(s: Autoscaler, now: float) -> ScalingDecision:
    return s.decide(now, ["w0", "w1"])


@pytest.mark.filterwarnings("ignore:coroutine")
@pytest.mark.parametrize("policy", NONSENSE)
def test_a_policy_that_fails_or_says_no_number_changes_nothing_and_says_so_once(
    policy: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    s = scaler(policy, monkeypatch)
    decisions = [decide(s, now / 10) for now in range(20)]
    assert {(d.wanted, d.cause) for d in decisions} == {(4, "policy")}
    assert [r.message.partition(";")[0] for r in caplog.records] == ["the scaling policy failed"]


def test_a_number_beyond_all_bounds_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, wanted in ((1e308, 9), (-1e308, 1)):
        s = scaler(lambda ctx, said=number: (said, {}), monkeypatch, downscaling_factor=1e10)
        assert decide(s, 1.0).wanted == wanted


@pytest.fixture
def doors(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """A policy that waits for the first, and tells by the second that it was asked."""
    monkeypatch.setattr(custom_policy, "SLOW_S", 0.001)
    go_on, asked = threading.Event(), threading.Event()
    yield go_on, asked
    go_on.set()


def test_while_a_policy_thinks_the_supervisor_goes_on_with_its_last_answer(
    doors: tuple[threading.Event, threading.Event],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    go_on, asked = doors

    def slow(ctx: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        asked.set()
        assert go_on.wait(60.0)
        return 2.0 + ctx.policy_state.get("calls", 0), {"calls": 3}

    s = scaler(slow, monkeypatch)
    assert {decide(s, now / 10).wanted for now in range(9)} == {4}
    assert asked.wait(60.0) and [r.message for r in caplog.records] == [
        "the scaling policy is slow; its last answer holds"
    ]
    go_on.set()
    late = (decide(s, 1.0) for _ in iter(int, 1))
    assert next(d for d in late if d.wanted != 4).wanted == 2
    assert next(d for d in late if d.wanted != 2).recommended == 2 + 2 * 3, "it got its own state"


def test_a_target_so_small_that_the_quotient_is_endless_stops_at_the_bounds() -> None:
    tiny: list[dict[str, Any]] = [
        {"target_ongoing_requests": 5e-324},
        {"bottlenecks": {"ttft_s": 1e-300}},
    ]
    for given in tiny:
        config = AutoscalingConfig(max_replicas=9, upscale_delay_s=0.0, **given)
        s = Autoscaler("m", config, 1, 256)
        slow = WorkerLoad(serving=True, requests=3, capacity=8, prefill_tokens_per_s=1e-300)
        s.report("g0", ModelLoad(queued_tokens=9, workers={"w0": slow}), 0.0)
        assert s.decide(1.0, ["w0"]).wanted == 9


def test_check_warns_of_a_policy_that_cannot_be_loaded_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        "llm_configs:\n- model_loading_config: {model_id: m}\n  llm_engine: sim\n"
        "  deployment_config: {autoscaling_config: {max_replicas: 2, target_ongoing_requests: 1,\n"
        "    policy: {policy_function: 'no_such_rules:f'}}}\n"
    )
    assert main(["check", str(config)]) == 0
    assert "no_such_rules:f cannot be loaded" in capsys.readouterr().err
