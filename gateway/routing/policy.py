"""Pure. The terms of routing: what a policy is given (`RoutingRequest`), what it answers (`Choice`
or `Defer`), and what every policy can be told (`Policy`).
"""

from __future__ import annotations

import random
from collections.abc import Set
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, TypeAlias

import msgspec

from gateway.fleet.fleet import Fleet, WorkerView
from shared.adapters.identity import AdapterRef
from shared.link.messages import Tier, WorkerId

NONE_EXCLUDED: Set[WorkerId] = frozenset()


class RoutingRequest(msgspec.Struct, frozen=True, eq=False):
    """What routing knows of one request. It equals only itself, so that a policy can keep state per
    request.

    `prompt_tokens` is an estimate made from the body's length. `prefix` is a hash of the adapter's
    digest and the prompt's first bytes (0: unknown).
    """

    base: str
    adapter: AdapterRef | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    session: str = ""
    prefix: int = 0


class ChoiceReason(Enum):
    """Why a worker was chosen. It goes to the access log and the metrics."""

    __hash__ = object.__hash__  # as in request.Phase

    BASE = "base"  # any worker serves the base model
    RESIDENT = "resident"  # it holds the adapter (or loads it already) and is not overloaded
    SPILL = "spill"  # all holders are overloaded or full: another one loads it
    COLD = "cold"  # nobody holds the adapter
    BLIND = "blind"  # the policy does not look at adapters
    KEPT = "kept"  # it alone keeps what the request refers to: an earlier answer


class Blocked(Enum):
    """What a request waits for."""

    ROOM = "room"  # no worker takes another request
    # No worker has a slot for another adapter. Requests for adapters in flight may go first.
    SLOT = "slot"
    TURN = "turn"  # the policy wants to be asked again at `until`


class CostBreakdown(msgspec.Struct, frozen=True):
    """The parts of an expected time to first token, in seconds. `slot` and `stall` are not the
    request's own time: they are what the choice costs other requests.
    """

    queue_s: float = 0.0
    line_s: float = 0.0
    slot_s: float = 0.0
    load_s: float = 0.0
    stall_s: float = 0.0
    outside_s: float = 0.0
    prefix_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.ttft_s + self.slot_s + self.stall_s - self.prefix_s

    @property
    def ttft_s(self) -> float:
        """What the request itself waits for."""
        return self.queue_s + self.line_s + self.load_s + self.outside_s

    def terms_ms(self) -> dict[str, float]:
        """As people read them; they add up to the total."""
        terms = {
            "queue": self.queue_s,
            "line": self.line_s,
            "slot": self.slot_s,
            "load": self.load_s,
            "stall": self.stall_s,
            "outside": self.outside_s,
            "prefix": -self.prefix_s,
        }
        return {name: round(seconds * 1e3, 2) for name, seconds in terms.items()}


class Choice(msgspec.Struct, frozen=True):
    """The chosen worker. `tier` is where the adapter was on that worker at that moment (GPU for a
    request of the base model).
    """

    worker: WorkerView
    reason: ChoiceReason
    tier: Tier = Tier.GPU
    cost: CostBreakdown | None = None


@dataclass(frozen=True, slots=True)
class Defer:
    """No worker takes the request now. `until` is when to ask again at the latest, if time alone
    can change the answer.
    """

    blocked: Blocked
    until: float | None = None


Decision: TypeAlias = Choice | Defer


@dataclass(frozen=True, slots=True)
class Candidate:
    """One worker in an explanation: whether it may take the request, and what that would cost.
    `note` says why it may not.
    """

    worker: WorkerView
    tier: Tier
    eligible: bool
    note: str
    cost: CostBreakdown


class Policy(Protocol):
    """Decides, and is told at once of everything that follows. `choose` may be called twice: a
    second call has no further effect.
    """

    @property
    def name(self) -> str: ...

    def choose(
        self,
        request: RoutingRequest,
        fleet: Fleet,
        now: float,
        rng: random.Random,
        excluded: Set[WorkerId] = NONE_EXCLUDED,
    ) -> Decision:
        """Never chooses a worker of `excluded`: those do not take this request."""
        ...

    def explain(self, request: RoutingRequest, fleet: Fleet, now: float) -> list[Candidate]:
        """Every routable worker of the base model, best first."""
        ...

    def warm_set(self, worker: WorkerView, fleet: Fleet, now: float) -> list[AdapterRef]:
        """What a new worker, which may not serve yet, should load before its first request."""
        ...

    def sent(self, request: RoutingRequest, choice: Choice, now: float) -> None:
        """The choice was reserved and sent."""
        ...

    def left(self, request: RoutingRequest, now: float) -> None:
        """The request is over, or it was given back without having ended on a worker. What was
        reserved for it is free.
        """
        ...

    def finished(
        self,
        request: RoutingRequest,
        choice: Choice,
        service_s: float,
        first_token_s: float,
        now: float,
    ) -> None:
        """The request ended on the worker, `service_s` after it was sent. Its first token left
        `first_token_s` after that (0.0: that is not known).
        """
        ...


class StatelessPolicy:
    """A policy that learns nothing. It ignores all events and explains itself by the loads."""

    def sent(self, request: RoutingRequest, choice: Choice, now: float) -> None: ...
    def left(self, request: RoutingRequest, now: float) -> None: ...
    def finished(
        self,
        request: RoutingRequest,
        choice: Choice,
        service_s: float,
        first_token_s: float,
        now: float,
    ) -> None: ...

    def warm_set(self, worker: WorkerView, fleet: Fleet, now: float) -> list[AdapterRef]:
        return []

    def explain(self, request: RoutingRequest, fleet: Fleet, now: float) -> list[Candidate]:
        workers = sorted(fleet.routable(request.base), key=lambda w: w.load)
        return [
            Candidate(
                w,
                tier_of(w, request.adapter),
                w.has_room,
                "" if w.has_room else "no room",
                CostBreakdown(),
            )
            for w in workers
        ]


def tier_of(worker: WorkerView, adapter: AdapterRef | None) -> Tier:
    return Tier.GPU if adapter is None else worker.tier(adapter)
