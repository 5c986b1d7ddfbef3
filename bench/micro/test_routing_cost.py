"""Shell. How long a routing decision takes: fleet and policy as in production, without sockets.

Each decision is timed with its reservation, at 64 workers, and at 1,000 workers with 10,000
adapters. Adapters are held somewhere or nowhere, or the base model is asked for. One variant
excludes a worker, and one times a heartbeat. The median counts, because some decisions are rarer
and longer.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence, Set
from typing import Any

import msgspec
import pytest

from gateway.fleet.fleet import Fleet
from gateway.routing.policy import Choice, Policy, RoutingRequest
from gateway.routing.registry import DEFAULT, make_policy
from shared.adapters.identity import AdapterRef
from shared.link.messages import AdapterState, Heartbeat, Tier, WorkerState

SIZES = ((64, 1000), (1000, 10_000))
SLOTS, CPU_ADAPTERS, RUNNING = 16, 64, 40
DECISIONS = 3000
SEQ = itertools.count(10_000)


def adapter(index: int) -> AdapterRef:
    return AdapterRef("base", f"a{index:05}", f"{index:016x}")


def heartbeat(worker: int, adapters: int, seq: int, rng: random.Random) -> Heartbeat:
    """Of a busy worker: full slots, half of them in flight by others' requests, a quarter in steady
    use, and a full CPU tier.
    """
    drawn = rng.sample(range(adapters), SLOTS + CPU_ADAPTERS)
    states = tuple(
        AdapterState(f"a{i:05}", f"{i:016x}", Tier.GPU, in_flight=n % 2, steady=n % 8 < 2)
        if n < SLOTS
        else AdapterState(f"a{i:05}", f"{i:016x}", Tier.CPU)
        for n, i in enumerate(drawn)
    )
    return Heartbeat(
        f"w{worker:04}",
        1,
        seq,
        "base",
        WorkerState.SERVING,
        256,
        SLOTS,
        RUNNING,
        adapters=states,
        host=f"h{worker // 8}",
    )


def fleet_of(workers: int, adapters: int) -> Fleet:
    fleet, rng = Fleet(3600.0), random.Random(1)
    for worker in range(workers):
        fleet.heartbeat(heartbeat(worker, adapters, 1, rng), 0.0)
        fleet.attach(f"w{worker:04}", 1)
    return fleet


@pytest.fixture(
    scope="module", params=SIZES, ids=lambda size: f"{size[0]} workers, {size[1]} adapters"
)
def crowd(request: Any) -> tuple[Fleet, int, int]:
    workers, adapters = request.param
    return fleet_of(workers, adapters), workers, adapters


def request(index: int) -> RoutingRequest:
    return RoutingRequest("base", adapter(index), 128, 128)


CASES: dict[str, Callable[[int, random.Random], RoutingRequest]] = {
    "Zipf-like adapter": lambda adapters, rng: request(int(adapters ** rng.random()) - 1),
    "uniform adapter": lambda adapters, rng: request(rng.randrange(adapters)),
    "adapter that is nowhere": lambda adapters, rng: request(adapters + rng.randrange(adapters)),
    "base model": lambda adapters, rng: RoutingRequest("base", None, 128),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("policy", [DEFAULT, "ray"])
def test_decision(benchmark: Any, crowd: tuple[Fleet, int, int], policy: str, case: str) -> None:
    fleet, _, adapters = crowd
    rng = random.Random(4)
    _decide(
        benchmark,
        fleet,
        make_policy(policy),
        [CASES[case](adapters, rng) for _ in range(DECISIONS)],
    )


def test_decision_with_one_worker_excluded(benchmark: Any, crowd: tuple[Fleet, int, int]) -> None:
    fleet, _, adapters = crowd
    rng = random.Random(4)
    _decide(
        benchmark,
        fleet,
        make_policy(DEFAULT),
        [request(rng.randrange(adapters)) for _ in range(DECISIONS // 10)],
        {"w0007"},
    )


@pytest.mark.parametrize("others", [3, 80])
def test_heartbeat_of_80_adapters(
    benchmark: Any, crowd: tuple[Fleet, int, int], others: int
) -> None:
    """As decoded: it shares no object with the heartbeat before. `others`: adapters that the one
    before did not have.
    """
    fleet, workers, adapters = crowd
    rng = random.Random(3)
    last: dict[int, Heartbeat] = {}

    def fresh() -> tuple[tuple[Heartbeat, float], dict[str, Any]]:
        number = next(SEQ)
        worker = number % min(workers, 50)
        new = heartbeat(worker, adapters, number, rng)
        before = last.get(worker)
        if before is not None:
            new = msgspec.structs.replace(
                new, adapters=before.adapters[:-others] + new.adapters[-others:]
            )
        last[worker] = new
        return (msgspec.msgpack.decode(msgspec.msgpack.encode(new), type=Heartbeat), 1.0), {}

    benchmark.pedantic(fleet.heartbeat, setup=fresh, rounds=300)


def _decide(
    benchmark: Any,
    fleet: Fleet,
    policy: Policy,
    requests: Sequence[RoutingRequest],
    excluded: Set[str] = frozenset(),
) -> None:
    """Of each ask: the decision and its reservation. What ends the request again is not counted."""
    rng, of_stream = random.Random(2), dict(enumerate(requests, 1))
    stream, taken = itertools.count(1), dict[int, Choice]()

    def arrive() -> tuple[tuple[int], dict[str, Any]]:
        for sid, choice in taken.items():
            policy.sent(of_stream[sid], choice, 0.0)
            fleet.release(sid)
        taken.clear()
        sid = next(stream)
        return (sid,), {}

    def choose(sid: int) -> None:
        wanted = of_stream[sid]
        choice = policy.choose(wanted, fleet, 0.0, rng, excluded)
        if isinstance(choice, Choice):
            fleet.reserve(choice.worker, sid, wanted.adapter, wanted.prompt_tokens)
            taken[sid] = choice

    benchmark.pedantic(choose, setup=arrive, rounds=len(requests))
    for sid in taken:
        fleet.release(sid)
