"""Pure. How many workers a model should have: Ray Serve's rule (2.60,
serve/autoscaling_policy.py), and what we add to it.

With R workers that serve, P workers wanted so far, `ongoing` requests and a target T per worker:

    R = 0 and requests wait   max(ceil(gain), P), at once
    raw                       ongoing / T;  P while R = 0
    recommended               ceil(R + gain x (raw - R)); one less if a gain below 1 would never
                              get there; ceil(raw) while R = 0, and then at once
    recommended above P       acted on once it has lasted upscale_delay_s
    recommended below P       the same with downscale_delay_s, and never below 1; from 1 to 0 after
                              downscale_to_zero_delay_s
    otherwise                 both delays begin anew

When a delay is over, the newest recommendation is carried out in one step, whatever its size. We
add one rule to Ray's: `needs` of other bottlenecks (see bottlenecks.py) raise the recommendation
before the delays. Sums of floats are a few units in the last place off, so numbers are rounded up
with a tolerance. Without it, a steady load exactly at its target would sometimes ask for one worker
more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from shared.config.deployment import AutoscalingConfig

ELAPSED_TOLERANCE_S = 1e-6
"""Ray's tolerance: the difference of two large times may fall short of a delay by less than
this.
"""
MOST_WORKERS = 1e9
"""More than any `max_replicas`. A recommendation beyond it, even an endless one, counts as this."""
WHOLE_TOLERANCE = 1e-9
"""Far above the error of a mean of some thousand values, and far below any load that matters."""

Cause: TypeAlias = Literal["requests", "policy", "slots", "kv_usage", "ttft", "start", "nothing"]
Stay: TypeAlias = Literal["stay"]
"""What a policy without an answer asks for: as many workers as are wanted already."""
Delay: TypeAlias = Literal["", "upscale_delay_s", "downscale_delay_s", "downscale_to_zero_delay_s"]


@dataclass(frozen=True, slots=True)
class ScalingRules:
    """The bounds, delays and gains of one model."""

    min_workers: int
    max_workers: int
    upscale_delay_s: float
    downscale_delay_s: float
    downscale_to_zero_delay_s: float
    upscale_gain: float
    downscale_gain: float

    def bounded(self, workers: int) -> int:
        return max(self.min_workers, min(self.max_workers, workers))


def rules_of(config: AutoscalingConfig) -> ScalingRules:
    to_zero_s = config.downscale_to_zero_delay_s
    return ScalingRules(
        config.min_replicas,
        config.max_replicas,
        config.upscale_delay_s,
        config.downscale_delay_s,
        config.downscale_delay_s if to_zero_s is None else to_zero_s,
        config.get_upscaling_factor(),
        config.get_downscaling_factor(),
    )


@dataclass(frozen=True, slots=True)
class PendingChange:
    """A change that waits for its delay: more workers (1), fewer (-1) or no change (0). The load
    has asked for this direction without a break since `since`.
    """

    direction: Literal[-1, 0, 1] = 0
    since: float = 0.0


@dataclass(frozen=True, slots=True)
class ScalingDecision:
    """How many workers are wanted from now on, and why.

    `recommended` is the number that the load asks for, before delays and bounds. `cause` is what
    asks for it. `held_by` names the delay that holds the change back, for `held_s` more seconds.
    `needs` are the workers that each bottleneck needs.
    """

    wanted: int
    before: int
    recommended: int
    cause: Cause
    running: int
    ongoing: float
    target_ongoing: float
    held_by: Delay = ""
    held_s: float = 0.0
    bounded_by: Literal["", "min_replicas", "max_replicas"] = ""
    needs: tuple[tuple[str, int], ...] = ()

    @property
    def reason(self) -> str:
        """The decision as one sentence for operators."""
        sums = f"{self.ongoing:.4g} requests ongoing, target {self.target_ongoing:.4g} per worker"
        needs = "".join(f", {name} need {count}" for name, count in self.needs if count)
        text = f"{sums}{needs}: {self.recommended} recommended because of {self.cause}"
        if self.held_by:
            text += f", held back by {self.held_by} for {self.held_s:.1f} s"
        if self.bounded_by:
            text += f", bounded by {self.bounded_by}"
        return text


def decide(
    rules: ScalingRules,
    pending: PendingChange,
    now: float,
    *,
    running: int,
    wanted: int,
    ongoing: float,
    target_ongoing: float,
    desired: float | Stay | None = None,
    needs: Mapping[Cause, int] | None = None,
) -> tuple[ScalingDecision, PendingChange]:
    """The decision of this moment, and the pending change to hand in next time.

    Args:
        pending: what the last call returned.
        running: workers that serve now. wanted: the last decision.
        ongoing: requests that run or wait, over the window.
        desired: what a policy of the user's asks for instead of `ongoing / target_ongoing`.
        needs: workers that other bottlenecks would take; they count while workers serve.
    """
    needs = needs or {}
    delay: Delay = ""
    held_s = 0.0
    if not running and ongoing > 0:
        cause: Cause = "start"
        amount = result = max(whole(rules.upscale_gain), wanted)
    else:
        by_requests = ongoing / target_ongoing
        cause, amount = _recommended(rules, running, wanted, by_requests, desired, needs)
        if not running and amount > 0:
            result = amount
        else:
            result, delay, held_s, pending = _delayed(rules, pending, now, max(0, amount), wanted)
    bound = _bound(rules, amount if delay else result)
    if rules.bounded(amount) == wanted:
        delay, held_s = "", 0.0  # the bound is what keeps the number, however long it lasts
    decision = ScalingDecision(
        wanted=rules.bounded(result),
        before=wanted,
        recommended=amount,
        cause=cause,
        running=running,
        ongoing=ongoing,
        target_ongoing=target_ongoing,
        held_by=delay,
        held_s=held_s,
        bounded_by=bound,
        needs=tuple(sorted(needs.items())),
    )
    return decision, pending


def whole(amount: float) -> int:
    """The number of workers, rounded up."""
    return math.ceil(max(-MOST_WORKERS, min(MOST_WORKERS, amount)) - WHOLE_TOLERANCE)


def _recommended(
    rules: ScalingRules,
    running: int,
    wanted: int,
    by_requests: float,
    desired: float | Stay | None,
    needs: Mapping[Cause, int],
) -> tuple[Cause, int]:
    """What asks for how many workers, before delays and bounds."""
    if desired == "stay":
        return "policy", wanted
    if not running and desired is None:
        return "nothing", wanted
    cause: Cause = "requests" if desired is None else "policy"
    raw = by_requests if desired is None else desired
    if not running:
        return cause, whole(raw)
    gain = rules.upscale_gain if raw > running else rules.downscale_gain
    scaled = whole(running + gain * (raw - running))
    if whole(raw) < running and scaled == running:
        scaled -= 1
    for name, need in needs.items():
        if need > max(0, scaled):
            cause, scaled = name, need
    return cause, scaled


def _delayed(
    rules: ScalingRules, pending: PendingChange, now: float, amount: int, wanted: int
) -> tuple[int, Delay, float, PendingChange]:
    """(workers wanted now, the delay that holds `amount` back, its remaining seconds, the pending
    change).
    """
    if amount == wanted:
        return wanted, "", 0.0, PendingChange()
    direction: Literal[-1, 1] = 1 if amount > wanted else -1
    delay: Delay
    if direction > 0:
        delay, delay_s = "upscale_delay_s", rules.upscale_delay_s
    elif wanted == 1:
        delay, delay_s = "downscale_to_zero_delay_s", rules.downscale_to_zero_delay_s
    else:
        delay, delay_s = "downscale_delay_s", rules.downscale_delay_s
        amount = max(1, amount)
    since = pending.since if pending.direction == direction else now
    if now - since + ELAPSED_TOLERANCE_S >= delay_s:
        return amount, "", 0.0, PendingChange()
    return wanted, delay, since + delay_s - now, PendingChange(direction, since)


def _bound(rules: ScalingRules, workers: int) -> Literal["", "min_replicas", "max_replicas"]:
    if workers > rules.max_workers:
        return "max_replicas"
    return "min_replicas" if workers < rules.min_workers else ""
