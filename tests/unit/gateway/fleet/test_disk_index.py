"""Which host has which adapter on its disk."""

from __future__ import annotations

import msgspec

from gateway.fleet.disk_index import DiskIndex
from gateway.fleet.fleet import Fleet
from gateway.fleet.worker_view import WorkerView
from shared.adapters.identity import AdapterRef
from shared.link.messages import AdapterState, Heartbeat, Tier, WorkerState

PIRATE = AdapterRef("tiny", "pirate", "d")
NOTHING: tuple[AdapterState, ...] = ()


def holding(tier: Tier, *, loading: bool = False) -> tuple[AdapterState, ...]:
    return (AdapterState("pirate", "d", tier, loading),)


class Hosts:
    def __init__(self) -> None:
        self.fleet = Fleet(3.0)
        self.seq = 0

    def heartbeat(
        self, worker: str, host: str, adapters: tuple[AdapterState, ...], epoch: int = 1
    ) -> None:
        self.seq += 1
        heartbeat = Heartbeat(
            worker, epoch, self.seq, "tiny", WorkerState.SERVING, 4, 4, adapters=adapters
        )
        self.fleet.heartbeat(msgspec.structs.replace(heartbeat, host=host), 0.0)

    def tier(self, worker: str) -> Tier:
        found = self.fleet.get(worker)
        assert isinstance(found, WorkerView)
        return found.tier(PIRATE)


def test_what_a_worker_dropped_is_on_its_hosts_disk_for_all_workers_there_and_for_nobody_else() -> (
    None
):
    hosts = Hosts()
    for worker, host in (("w0", "a"), ("w1", "a"), ("w2", "b")):
        hosts.heartbeat(worker, host, NOTHING)
    assert [hosts.tier(w) for w in ("w0", "w1", "w2")] == [Tier.REMOTE] * 3
    hosts.heartbeat("w0", "a", holding(Tier.GPU))
    assert [hosts.tier(w) for w in ("w0", "w1", "w2")] == [Tier.GPU, Tier.DISK, Tier.REMOTE]
    hosts.heartbeat("w0", "a", NOTHING)
    assert [hosts.tier(w) for w in ("w0", "w1", "w2")] == [Tier.DISK, Tier.DISK, Tier.REMOTE]


def test_what_is_being_fetched_is_not_there_yet() -> None:
    hosts = Hosts()
    hosts.heartbeat("w0", "a", holding(Tier.REMOTE, loading=True))
    hosts.heartbeat("w1", "a", NOTHING)
    assert hosts.tier("w0") == hosts.tier("w1") == Tier.REMOTE
    hosts.heartbeat("w0", "a", holding(Tier.REMOTE))  # for the disk alone
    hosts.heartbeat("w0", "a", NOTHING)  # it failed, for all that is known
    assert hosts.tier("w1") is Tier.REMOTE


def test_a_load_from_a_disk_that_has_it_is_no_fetch_though_the_worker_has_only_begun() -> None:
    hosts = Hosts()
    hosts.heartbeat("w0", "a", holding(Tier.CPU))
    hosts.heartbeat("w1", "a", holding(Tier.REMOTE, loading=True))
    assert hosts.tier("w1") is Tier.DISK


def test_a_disk_outlives_its_workers() -> None:
    hosts = Hosts()
    hosts.heartbeat("w0", "a", holding(Tier.GPU))
    assert hosts.fleet.unreachable("w0", 1) is not None
    hosts.heartbeat("w0", "a", NOTHING, epoch=2)
    assert hosts.tier("w0") is Tier.DISK


def test_a_worker_that_names_no_host_shares_no_disk() -> None:
    hosts = Hosts()
    hosts.heartbeat("w0", "", holding(Tier.GPU))
    hosts.heartbeat("w1", "", NOTHING)
    assert hosts.tier("w1") is Tier.REMOTE


def test_memory_is_bounded_and_the_longest_unseen_is_forgotten_first() -> None:
    disk_index = DiskIndex(most=2)
    for name in ("a", "b", "a", "c"):
        disk_index.put("host", "tiny", [(name, "d")])
    assert len(disk_index) == 2
    assert [disk_index.has("host", "tiny", (name, "d")) for name in ("a", "b", "c")] == [
        True,
        False,
        True,
    ]


def test_an_adapter_of_another_base_model_is_another_adapter() -> None:
    disk_index = DiskIndex()
    disk_index.put("host", "tiny", [("a", "d")])
    assert disk_index.has("host", "tiny", ("a", "d")) and not disk_index.has(
        "host", "large", ("a", "d")
    )


def test_what_a_worker_was_told_to_fetch_is_on_its_disk_though_no_heartbeat_says_so() -> None:
    hosts = Hosts()
    hosts.heartbeat("w0", "a", NOTHING)
    hosts.heartbeat("w1", "a", NOTHING)
    worker = hosts.fleet.get("w0")
    assert worker is not None
    hosts.fleet.cached(worker, PIRATE)
    assert hosts.tier("w0") == hosts.tier("w1") == Tier.DISK
