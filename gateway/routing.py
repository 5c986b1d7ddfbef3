"""Pure. Routing policies: functions from the workers of one base model to a choice with its reason. Chance is an argument."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from gateway.fleet import Worker
from shared.adapters import AdapterRef


class Reason(Enum):
    """Why a worker was chosen; goes to the access log and the metrics."""

    BASE = "base"  # any worker serves the base model
    RESIDENT = "resident"  # it holds the adapter and has room
    SPILL = "spill"  # all holders are full: another one loads it
    COLD = "cold"  # nobody holds the adapter


@dataclass(frozen=True, slots=True)
class Choice:
    worker: Worker
    reason: Reason


class Policy(Protocol):
    """`workers` are the routable workers of the request's base model. None means: nobody has room, wait."""

    def __call__(self, workers: Sequence[Worker], adapter: AdapterRef | None, rng: random.Random) -> Choice | None: ...


def residency_p2c(workers: Sequence[Worker], adapter: AdapterRef | None, rng: random.Random) -> Choice | None:
    """Residency first, then load.

    Among the workers that hold the adapter and have room, the better of two drawn at random; if all holders are full, the better of two of the
    others loads it; if nobody holds it, the better of two of all. Power of two choices: Mitzenmacher, "The Power of Two Choices in Randomized
    Load Balancing", 2001; the order of the steps: Ray Serve's multiplexed routing.
    """
    open_ = [w for w in workers if w.has_room]
    if adapter is None:
        return _choice(open_, Reason.BASE, rng)
    holders = [w for w in open_ if w.holds(adapter)]
    if holders:
        return _choice(holders, Reason.RESIDENT, rng)
    held = any(w.holds(adapter) for w in workers)
    return _choice(open_, Reason.SPILL if held else Reason.COLD, rng)


POLICIES: dict[str, Policy] = {"residency-p2c": residency_p2c}


def _choice(candidates: Sequence[Worker], reason: Reason, rng: random.Random) -> Choice | None:
    if not candidates:
        return None
    if len(candidates) == 1:
        return Choice(candidates[0], reason)
    first, second = rng.sample(candidates, 2)
    return Choice(first if first.load <= second.load else second, reason)
