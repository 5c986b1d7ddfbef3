"""Pure. How many workers a model should have: Ray Serve's rule (2.60,
serve/autoscaling_policy.py), and what we add to it.

With R workers that serve, P workers wanted so far, `ongoing` requests and a target T per worker:

    R = 0 and requests wait   max(ceil(gain), P), at once
    raw                       ongoing / T;  P while R = 0
    wish                      ceil(R + gain x (raw - R)); one less if a gain below 1 would never
                              get there; ceil(raw) while R = 0, and then at once
    wish above P              acted on once it has lasted upscale_delay_s
    wish below P              the same with downscale_delay_s, and never below 1; from 1 to 0 after
                              downscale_to_zero_delay_s
    otherwise                 both delays begin anew

A wish counts as of the moment at which its delay is over: there is no limit to a step. What we add:
`needs` of other bottlenecks (see bottlenecks.py) raise the wish before the delays. Sums of floats
are a few units in the last place off, so a whole number is met with a tolerance: without it, a
steady load exactly at its target would sometimes ask for one worker more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from shared.config.deployment import AutoscalingConfig

ELAPSED_TOLERANCE_S = 1e-6
"""Ray's: the difference of two large times may fall short of a delay by less."""
WHOLE_TOLERANCE = 1e-9
"""Far above the error of a mean of some thousand values, far below any load that matters."""

Cause: TypeAlias = Literal["requests", "policy", "slots", "kv_usage", "ttft", "start", "nothing"]
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
        config.upscale_gain,
        config.downscale_gain,
    )


@dataclass(frozen=True, slots=True)
class Wish:
    """More workers (1), fewer (-1) or neither (0), without a break since `since`."""

    direction: Literal[-1, 0, 1] = 0
    since: float = 0.0


@dataclass(frozen=True, slots=True)
class Decision:
    """How many workers are wanted from now on, and why.

    `wish` is what the load asks for before delays and bounds; `cause` says what asks for it;
    `held_by` names the delay that holds it back, for `held_s` more seconds; `needs` are the
    workers that each bottleneck would take.
    """

    wanted: int
    before: int
    wish: int
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
        """One sentence for operators."""
        sums = f"{self.ongoing:.4g} requests ongoing, target {self.target_ongoing:.4g} per worker"
        needs = "".join(f", {name} need {count}" for name, count in self.needs)
        text = f"{sums}{needs}: wish {self.wish} for {self.cause}"
        if self.held_by:
            text += f", held back by {self.held_by} for {self.held_s:.1f} s"
        if self.bounded_by:
            text += f", bounded by {self.bounded_by}"
        return text


def decide(
    rules: ScalingRules,
    wish: Wish,
    now: float,
    *,
    running: int,
    wanted: int,
    ongoing: float,
    target_ongoing: float,
    desired: float | None = None,
    needs: Mapping[Cause, int] | None = None,
) -> tuple[Decision, Wish]:
    """The decision of this moment, and the wish to hand in next time.

    Args:
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
        cause, amount = _load_wish(rules, running, wanted, ongoing / target_ongoing, desired)
        if running:
            for name, need in needs.items():
                if need > amount:
                    cause, amount = name, need
            result, delay, held_s, wish = _delayed(rules, wish, now, max(0, amount), wanted)
        elif amount > 0:
            result = amount
        else:
            result, delay, held_s, wish = _delayed(rules, wish, now, 0, wanted)
    bounded = rules.bounded(result)
    decision = Decision(
        wanted=bounded,
        before=wanted,
        wish=amount,
        cause=cause,
        running=running,
        ongoing=ongoing,
        target_ongoing=target_ongoing,
        held_by=delay,
        held_s=held_s,
        bounded_by=_bound(rules, amount if delay else result),
        needs=tuple(sorted(needs.items())),
    )
    return decision, wish


def whole(amount: float) -> int:
    """Workers, rounded up."""
    return math.ceil(amount - WHOLE_TOLERANCE)


def _load_wish(
    rules: ScalingRules, running: int, wanted: int, by_requests: float, desired: float | None
) -> tuple[Cause, int]:
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
    return cause, scaled


def _delayed(
    rules: ScalingRules, wish: Wish, now: float, amount: int, wanted: int
) -> tuple[int, Delay, float, Wish]:
    """What the wish comes to now, and else which delay holds it back for how long."""
    if amount == wanted:
        return wanted, "", 0.0, Wish()
    direction: Literal[-1, 1] = 1 if amount > wanted else -1
    delay: Delay
    if direction > 0:
        delay, delay_s = "upscale_delay_s", rules.upscale_delay_s
    elif wanted == 1:
        delay, delay_s = "downscale_to_zero_delay_s", rules.downscale_to_zero_delay_s
    else:
        delay, delay_s = "downscale_delay_s", rules.downscale_delay_s
        amount = max(1, amount)
    since = wish.since if wish.direction == direction else now
    if now - since + ELAPSED_TOLERANCE_S >= delay_s:
        return amount, "", 0.0, Wish()
    return wanted, delay, since + delay_s - now, Wish(direction, since)


def _bound(rules: ScalingRules, workers: int) -> Literal["", "min_replicas", "max_replicas"]:
    if workers > rules.max_workers:
        return "max_replicas"
    return "min_replicas" if workers < rules.min_workers else ""
