"""Shell. How long a routing decision takes: `python -m bench.micro.routing [--policy expected-ttft]`. No sockets; fleet and policy as in production.

Prints microseconds per decision (choose, reserve, release) at 64 workers and at 1,000 workers with 10,000 adapters: for adapters that are held,
that are nowhere, and for the base model; with one worker excluded; and for a heartbeat.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence

from gateway.fleet import Fleet
from gateway.policies import DEFAULT, POLICIES, make_policy
from gateway.routing import Ask, Choice, Policy
from shared.adapters import AdapterRef
from shared.wire import AdapterState, Heartbeat, Tier, WorkerState

SIZES = ((64, 1000), (1000, 10_000))
SLOTS, CPU_ADAPTERS, RUNNING = 16, 64, 40
DECISIONS = 3000
ADAPTER_BYTES = 26 << 20


def adapter(index: int) -> AdapterRef:
    return AdapterRef("base", f"a{index:05}", f"{index:016x}")


def beat(worker: int, adapters: int, seq: int, rng: random.Random) -> Heartbeat:
    """Of a busy worker: full slots, half of them in flight by others' requests, and a full CPU tier."""
    drawn = rng.sample(range(adapters), SLOTS + CPU_ADAPTERS)
    states = tuple(
        AdapterState(f"a{i:05}", f"{i:016x}", Tier.GPU if n < SLOTS else Tier.CPU, in_flight=int(n % 2 and n < SLOTS))
        for n, i in enumerate(drawn)
    )
    return Heartbeat(f"w{worker:04}", 1, seq, "base", WorkerState.SERVING, 256, SLOTS, RUNNING, adapters=states)


def fleet_of(workers: int, adapters: int) -> Fleet:
    fleet, rng = Fleet(3600.0), random.Random(1)
    for worker in range(workers):
        fleet.beat(beat(worker, adapters, 1, rng), 0.0)
        fleet.attach(f"w{worker:04}", 1)
    return fleet


def decide(policy: Policy, fleet: Fleet, asks: Sequence[Ask], excluded: Sequence[str] = ()) -> float:
    """Median microseconds of a decision and its reservation."""
    rng, took = random.Random(2), []
    for sid, ask in enumerate(asks, 1):
        policy.arrived(ask, 0.0)
        began = time.perf_counter()
        if excluded:
            with fleet.without(excluded):
                choice = policy.choose(ask, fleet, 0.0, rng)
        else:
            choice = policy.choose(ask, fleet, 0.0, rng)
        if isinstance(choice, Choice):
            fleet.reserve(choice.worker, sid, ask.adapter, ask.prompt_tokens)
        took.append(time.perf_counter() - began)
        if isinstance(choice, Choice):
            policy.sent(ask, choice, 0.0)
            fleet.release(sid)
    return 1e6 * sorted(took)[len(took) // 2]


def hear(fleet: Fleet, workers: int, adapters: int) -> float:
    rng = random.Random(3)
    beats = [beat(n % workers, adapters, 2 + n, rng) for n in range(300)]
    began = time.perf_counter()
    for b in beats:
        fleet.beat(b, 1.0)
    return 1e6 * (time.perf_counter() - began) / len(beats)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.micro.routing", description="Microseconds per routing decision.")
    parser.add_argument("--policy", choices=sorted(POLICIES), default=DEFAULT)
    flags = parser.parse_args(arguments)
    print(f"{flags.policy}: median microseconds per decision with its reservation")
    for workers, adapters in SIZES:
        rng = random.Random(4)
        fleet = fleet_of(workers, adapters)
        cases: dict[str, Callable[[], Ask]] = {
            "adapter, Zipf-like": lambda adapters=adapters, rng=rng: ask(int(adapters ** rng.random()) - 1),  # type: ignore[misc]
            "adapter, uniform": lambda adapters=adapters, rng=rng: ask(rng.randrange(adapters)),  # type: ignore[misc]
            "adapter nowhere": lambda adapters=adapters, rng=rng: ask(adapters + rng.randrange(adapters)),  # type: ignore[misc]
            "base model": lambda: Ask("base", None, 0, 128),
        }
        print(f"{workers} workers, {adapters} adapters")
        for name, make in cases.items():
            print(f"  {name:28} {decide(make_policy(flags.policy), fleet, [make() for _ in range(DECISIONS)]):8.1f}")
        few = [ask(rng.randrange(adapters)) for _ in range(DECISIONS // 10)]
        print(f"  {'one worker excluded':28} {decide(make_policy(flags.policy), fleet, few, ['w0007']):8.1f}")
        print(f"  {'a heartbeat of 80 adapters':28} {hear(fleet, workers, adapters):8.1f}")
    return 0


def ask(index: int) -> Ask:
    return Ask("base", adapter(index), ADAPTER_BYTES, 128, 128)


if __name__ == "__main__":
    sys.exit(main())
