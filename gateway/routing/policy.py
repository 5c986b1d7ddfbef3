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
from shared.adapters.identity import AdapterKey, AdapterRef
from shared.link.messages import Tier, WorkerId

NONE_EXCLUDED: Set[WorkerId] = frozenset()


class RoutingRequest(msgspec.Struct, frozen=True, eq=False):
    """What routing knows of one request. It equals only itself, so that a policy can keep state per
    request.

    `prompt_tokens` is an estimate made from the body's length. `tenant` is the digest of the API
    key. `prefix` is a hash of the adapter's digest and the prompt's first bytes (0: unknown). A
    lower `priority` goes first. `arrived` is on the dispatcher's clock.
    """

    base: str
    adapter: AdapterRef | None = None
    size_bytes: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    tenant: str = ""
    session: str = ""
    prefix: int = 0
    priority: int = 0
    arrived: float = 0.0


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
    """The parts of an expected time to first token, in seconds. `stall` is not the request's own
    time: it is what the choice costs other requests.
    """

    queue_s: float = 0.0
    slot_s: float = 0.0
    load_s: float = 0.0
    stall_s: float = 0.0
    evict_s: float = 0.0
    prefix_s: float = 0.0

    @property
    def total_s(self) -> float:
        return (
            self.queue_s + self.slot_s + self.load_s + self.stall_s + self.evict_s - self.prefix_s
        )

    def terms_ms(self) -> dict[str, float]:
        """As people read them; they add up to the total."""
        terms = {
            "queue": self.queue_s,
            "slot": self.slot_s,
            "load": self.load_s,
            "stall": self.stall_s,
            "evict": self.evict_s,
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
        """What a worker that has just become routable should load before its first request."""
        ...

    def reserved_for(self, base: str, fleet: Fleet, now: float) -> list[AdapterKey]:
        """Adapters that a free slot or place is reserved for. Requests that wait for them are tried
        before all others.
        """
        ...

    def arrived(self, request: RoutingRequest, now: float) -> None:
        """Once per request, before its first `choose`."""
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
        worker: WorkerView,
        service_s: float,
        output_tokens: int,
        now: float,
    ) -> None:
        """The request ended on the worker, `service_s` after it was sent."""
        ...


class StatelessPolicy:
    """A policy that learns nothing. It ignores all events and explains itself by the loads."""

    def arrived(self, request: RoutingRequest, now: float) -> None: ...
    def sent(self, request: RoutingRequest, choice: Choice, now: float) -> None: ...
    def left(self, request: RoutingRequest, now: float) -> None: ...
    def finished(
        self,
        request: RoutingRequest,
        worker: WorkerView,
        service_s: float,
        output_tokens: int,
        now: float,
    ) -> None: ...

    def warm_set(self, worker: WorkerView, fleet: Fleet, now: float) -> list[AdapterRef]:
        return []

    def reserved_for(self, base: str, fleet: Fleet, now: float) -> list[AdapterKey]:
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
