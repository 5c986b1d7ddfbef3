"""Which peers a worker is told to get an adapter from."""

from __future__ import annotations

from gateway.fleet.fleet import Fleet
from gateway.fleet.peer_hints import MOST, peer_hints
from shared.adapters.identity import AdapterRef, key_of
from shared.link.messages import AdapterState, Heartbeat, Tier, WorkerState

PIRATE = AdapterRef("tiny", "pirate", "d1")


def join(
    fleet: Fleet,
    worker: str,
    *,
    tier: Tier | None = None,
    loading: bool = False,
    running: int = 0,
    host: str | None = None,
    open_: bool = True,
) -> None:
    held = () if tier is None else (AdapterState("pirate", "d1", tier, loading),)
    endpoint = f"tcp://{worker}:1" if open_ else ""
    heartbeat = Heartbeat(
        worker,
        1,
        1,
        "tiny",
        WorkerState.SERVING,
        8,
        running=running,
        adapters=held,
        host=host or worker,
        peer_endpoint=endpoint,
    )
    fleet.heartbeat(heartbeat, 0.0)
    fleet.attach(worker, 1)


def told(fleet: Fleet, worker: str) -> list[str]:
    found = fleet.get(worker)
    assert found is not None
    return [
        e.removeprefix("tcp://").removesuffix(":1")
        for e in peer_hints(fleet.pool("tiny"), found, key_of(PIRATE))
    ]


def test_who_has_it_comes_before_who_fetches_it_and_the_less_loaded_first() -> None:
    fleet = Fleet(3.0)
    join(fleet, "me")
    join(fleet, "fetches", tier=Tier.REMOTE, loading=True)
    join(fleet, "busy", tier=Tier.GPU, running=5)
    join(fleet, "idle", tier=Tier.CPU)
    assert told(fleet, "me") == ["idle", "busy", "fetches"]


def test_who_was_just_sent_a_request_for_it_counts_as_fetching() -> None:
    fleet = Fleet(3.0)
    join(fleet, "me")
    join(fleet, "other")
    assert told(fleet, "me") == []
    other = fleet.get("other")
    assert other is not None
    fleet.reserve(other, 1, PIRATE)
    assert told(fleet, "me") == ["other"]


def test_nobody_of_the_same_host_and_nobody_without_an_endpoint_is_told() -> None:
    fleet = Fleet(3.0)
    join(fleet, "me", host="h")
    join(fleet, "fellow", tier=Tier.GPU, host="h")
    join(fleet, "closed", tier=Tier.GPU, open_=False)
    assert told(fleet, "me") == []


def test_of_one_host_the_least_loaded_worker_is_told_alone() -> None:
    fleet = Fleet(3.0)
    join(fleet, "me")
    join(fleet, "a", tier=Tier.GPU, host="h", running=2)
    join(fleet, "b", tier=Tier.GPU, host="h")
    join(fleet, "c", tier=Tier.GPU, running=4)
    assert told(fleet, "me") == ["b", "c"]


def test_of_an_adapter_that_is_everywhere_a_few_are_told() -> None:
    fleet = Fleet(3.0)
    join(fleet, "me")
    for number in range(100):
        join(fleet, f"w{number}", tier=Tier.GPU)
    assert len(told(fleet, "me")) == MOST
