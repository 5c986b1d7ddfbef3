"""The fleet: who serves, with how much load, and what each worker holds."""

from __future__ import annotations

import math
import random

import msgspec
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway.fleet.fleet import (
    Fleet,
    FleetEvent,
    WorkerChanged,
    WorkerJoined,
    WorkerLost,
    WorkerView,
)
from gateway.fleet.past_lives import SUCCESSOR_S
from gateway.routing.policy import Choice, Defer, RoutingRequest
from gateway.routing.registry import POLICIES, make_policy
from shared.adapters.identity import AdapterRef
from shared.link.messages import AdapterState, Heartbeat, Tier, WorkerState

LEASE_S = 3.0
PIRATE = AdapterRef("tiny", "pirate", "d1")
HAIKU = AdapterRef("tiny", "haiku", "d2")


def heartbeat(
    worker: str = "w0",
    epoch: int = 1,
    seq: int = 1,
    *,
    base: str = "tiny",
    state: WorkerState = WorkerState.SERVING,
    capacity: int = 4,
    running: int = 0,
    waiting: int = 0,
    yours: int = 0,
    adapters: tuple[AdapterState, ...] = (),
    reason: str = "",
) -> Heartbeat:
    return Heartbeat(
        worker,
        epoch,
        seq,
        base,
        state,
        capacity=capacity,
        running=running,
        waiting=waiting,
        yours=yours,
        adapters=adapters,
        reason=reason,
    )


def of(adapter: AdapterRef, tier: Tier, loading: bool = False) -> AdapterState:
    return AdapterState(adapter.name, adapter.digest, tier, loading)


def serving(
    first: Heartbeat, fleet: Fleet | None = None, now: float = 0.0
) -> tuple[Fleet, WorkerView]:
    fleet = Fleet(LEASE_S) if fleet is None else fleet  # an empty one is false
    fleet.heartbeat(first, now)
    fleet.attach(first.worker, first.epoch)
    worker = fleet.get(first.worker)
    assert worker is not None
    return fleet, worker


# ---- membership ----------------------------------------------------------------------------------


def test_the_first_heartbeat_joins_and_the_second_says_nothing() -> None:
    fleet = Fleet(LEASE_S)
    assert fleet.heartbeat(heartbeat(seq=1), 0.0) == [WorkerJoined("w0")]
    assert fleet.heartbeat(heartbeat(seq=2), 1.0) == []
    assert len(fleet) == 1


def test_a_gateway_that_comes_later_counts_the_changes_of_slots_from_then_on() -> None:
    evictions = {"gpu:slot_needed": 900, "gpu:asked": 1, "cpu:memory_needed": 500}
    old = msgspec.structs.replace(
        heartbeat(seq=1), adapter_loads={"cpu": 800, "disk": 110}, adapter_evictions=evictions
    )
    fleet, worker = serving(old)
    assert worker.slot_changes == (0, 0)
    more = evictions | {"gpu:slot_needed": 902, "gpu:asked": 2, "cpu:memory_needed": 600}
    loads = {"cpu": 803, "disk": 111}
    newer = msgspec.structs.replace(old, seq=2, adapter_loads=loads, adapter_evictions=more)
    fleet.heartbeat(newer, 1.0)
    assert worker.slot_changes == (4, 3)


@pytest.mark.parametrize("seq", [4, 5])
def test_a_heartbeat_that_is_not_newer_changes_nothing_and_does_not_extend_the_lease(
    seq: int,
) -> None:
    fleet, worker = serving(heartbeat(seq=5, running=1))
    assert fleet.heartbeat(heartbeat(seq=seq, running=9, state=WorkerState.DRAINING), 2.0) == []
    assert worker.heartbeat.running == 1 and worker.lease_until == LEASE_S


@pytest.mark.parametrize("epochs", [(1, 2), (2, 1)])
def test_late_heartbeats_of_a_life_that_was_replaced_are_ignored_whichever_number_is_higher(
    epochs: tuple[int, int],
) -> None:
    fleet, _ = serving(heartbeat(epoch=epochs[0], seq=1))
    fleet.heartbeat(heartbeat(epoch=epochs[1], seq=1), 0.5)
    worker = fleet.get("w0")
    assert worker is not None and worker.heartbeat.epoch == epochs[1]
    for state in (WorkerState.SERVING, WorkerState.STOPPED):
        assert fleet.heartbeat(heartbeat(epoch=epochs[0], seq=99, state=state), 1.0) == []
    assert fleet.get("w0") is worker


def test_a_life_that_was_replaced_may_come_back_once_its_successor_is_gone() -> None:
    fleet, _ = serving(heartbeat(epoch=1, seq=1))
    fleet.heartbeat(heartbeat(epoch=2, seq=1), 0.0)
    assert [lost.epoch for lost in fleet.expire(LEASE_S)] == [2]
    assert fleet.heartbeat(heartbeat(epoch=1, seq=2), LEASE_S) == [WorkerJoined("w0")]


# ---- what carries --------------------------------------------------------------------------------


def test_a_worker_whose_data_connection_does_not_carry_keeps_its_streams_and_gets_no_new_ones() -> (
    None
):
    fleet, worker = serving(heartbeat())
    fleet.reserve(worker, 7, None)
    assert fleet.link("w0", 1, False) is worker and fleet.link("w0", 1, False) is None
    assert not fleet.routable("tiny") and worker.reserved == {7: None}
    fleet.heartbeat(heartbeat(seq=2), 1.0)
    assert not fleet.routable("tiny"), "heartbeats come by another connection"
    assert fleet.link("w0", 1, True) is worker and [w.id for w in fleet.routable("tiny")] == ["w0"]
    assert fleet.link("w0", 2, False) is None and fleet.link("nobody", 1, False) is None


def test_a_worker_whose_heartbeats_are_overdue_gets_no_new_requests_until_the_next_one() -> None:
    fleet, worker = serving(heartbeat(), Fleet(LEASE_S, silent_s=0.6))
    assert fleet.expire(0.6) == [] and worker.routable
    assert fleet.expire(0.7) == [] and not fleet.routable("tiny")
    fleet.heartbeat(heartbeat(seq=2), 0.8)
    assert [w.id for w in fleet.routable("tiny")] == ["w0"]


def test_a_worker_that_is_heard_by_its_data_connection_keeps_its_lease() -> None:
    fleet, _ = serving(heartbeat())
    fleet.heard("w0", 1, 2.0)
    fleet.heard("w0", 9, 99.0)
    assert fleet.expire(LEASE_S) == [] and len(fleet.expire(2.0 + LEASE_S)) == 1


# ---- lives ---------------------------------------------------------------------------------------


def test_a_new_epoch_returns_the_streams_of_the_old_one_and_starts_from_nothing() -> None:
    fleet, worker = serving(heartbeat(adapters=(of(PIRATE, Tier.GPU),)))
    fleet.reserve(worker, 7, PIRATE)
    events = fleet.heartbeat(heartbeat(epoch=2), 1.0)
    assert events == [WorkerLost("w0", 1, (7,), "restarted"), WorkerJoined("w0")]
    reborn = fleet.get("w0")
    assert reborn is not None and reborn is not worker
    assert reborn.load == 0 and not reborn.holds(PIRATE) and not reborn.routable


def test_a_change_of_state_is_told_once_with_its_reason() -> None:
    fleet, _ = serving(heartbeat())
    events = fleet.heartbeat(
        heartbeat(seq=2, state=WorkerState.DRAINING, reason="told to drain"), 0.0
    )
    assert events == [
        WorkerChanged("w0", WorkerState.SERVING, WorkerState.DRAINING, "told to drain")
    ]
    assert fleet.heartbeat(heartbeat(seq=3, state=WorkerState.DRAINING), 0.0) == []


def test_a_life_that_leaves_does_not_come_back_with_a_late_heartbeat_but_the_next_life_serves() -> (
    None
):
    fleet, worker = serving(heartbeat())
    assert fleet.leaves("w0", 2, "why") is None and worker.routable, "another life's refusal"
    assert fleet.leaves("w0", 1, "why") == WorkerChanged(
        "w0", WorkerState.SERVING, WorkerState.DRAINING, "why"
    )
    assert fleet.leaves("w0", 1, "why") is None, "told once"
    assert fleet.heartbeat(heartbeat(seq=2), 0.1) == [] and not fleet.routable(
        worker.heartbeat.base
    )
    assert (
        fleet.heartbeat(heartbeat(seq=3, state=WorkerState.STOPPED), 0.2)[0].worker == "w0"
        and len(fleet) == 0
    )
    fleet, worker = serving(heartbeat(epoch=2), fleet)
    assert worker.routable


def test_stopped_ends_the_epoch_for_good() -> None:
    fleet, worker = serving(heartbeat(epoch=3))
    fleet.reserve(worker, 1, None)
    assert fleet.heartbeat(
        heartbeat(epoch=3, seq=2, state=WorkerState.STOPPED, reason="bye"), 0.0
    ) == [WorkerLost("w0", 3, (1,), "bye")]
    for late in (
        heartbeat(epoch=3, seq=3),
        heartbeat(epoch=3, seq=4, state=WorkerState.STOPPED),
    ):
        assert fleet.heartbeat(late, 0.0) == []
    assert len(fleet) == 0
    assert fleet.heartbeat(heartbeat(epoch=2), 0.0) == [WorkerJoined("w0")], "no number is too low"


def test_stopped_as_the_first_word_of_another_life_changes_nothing_and_joins_nobody() -> None:
    fleet, worker = serving(heartbeat(epoch=1))
    fleet.reserve(worker, 1, None)
    assert fleet.heartbeat(heartbeat(epoch=2, state=WorkerState.STOPPED), 0.0) == []
    assert fleet.heartbeat(heartbeat(epoch=2, seq=2), 0.0) == [] and fleet.get("w0") is worker


def test_stopped_of_an_unknown_worker_is_no_event() -> None:
    fleet = Fleet(LEASE_S)
    assert fleet.heartbeat(heartbeat(state=WorkerState.STOPPED), 0.0) == []
    assert fleet.heartbeat(heartbeat(seq=2), 0.0) == []


# ---- leases --------------------------------------------------------------------------------------


def test_a_lease_runs_from_the_last_heartbeat_and_ends_exactly_then() -> None:
    fleet, _ = serving(heartbeat(seq=1), now=0.0)
    fleet.heartbeat(heartbeat(seq=2), 2.0)
    assert fleet.expire(math.nextafter(2.0 + LEASE_S, 0)) == []
    lost = fleet.expire(2.0 + LEASE_S)
    assert [(e.worker, e.epoch) for e in lost] == [("w0", 1)]
    assert fleet.expire(100.0) == []


def test_a_worker_whose_loop_is_held_is_kept_but_gets_nothing_new() -> None:
    fleet, worker = serving(heartbeat(), Fleet(LEASE_S, silent_s=0.6, hang_s=5.0))
    fleet.loop_held("w0", 1, held_s=2.0, now=2.0)
    assert fleet.expire(4.9) == [] and not worker.routable
    fleet.heartbeat(heartbeat(seq=2), 4.9)
    assert worker.routable


def test_a_loop_that_is_held_for_too_long_is_taken_for_hung() -> None:
    fleet, _ = serving(heartbeat(), Fleet(LEASE_S, hang_s=5.0))
    fleet.loop_held("w0", 1, held_s=2.9, now=2.9)
    fleet.loop_held("w0", 1, held_s=5.0, now=5.0)
    assert fleet.expire(5.8) == [] and len(fleet.expire(5.9)) == 1


def test_a_thread_of_an_earlier_life_keeps_no_later_one() -> None:
    fleet, _ = serving(heartbeat(), Fleet(LEASE_S, hang_s=5.0))
    fleet.loop_held("w0", 2, held_s=0.5, now=1.0)
    assert len(fleet.expire(LEASE_S)) == 1


def test_only_silent_workers_expire() -> None:
    fleet, quiet = serving(heartbeat("quiet"))
    fleet, _ = serving(heartbeat("loud"), fleet)
    fleet.reserve(quiet, 5, None)
    fleet.heartbeat(heartbeat("loud", seq=2), 2.0)
    assert [(e.worker, e.streams) for e in fleet.expire(LEASE_S)] == [("quiet", (5,))]
    assert [w.id for w in fleet] == ["loud"]


def test_a_worker_that_was_silent_too_long_comes_back_without_its_old_streams() -> None:
    fleet, worker = serving(heartbeat(seq=1))
    fleet.reserve(worker, 5, PIRATE)
    fleet.expire(LEASE_S)
    assert fleet.heartbeat(heartbeat(seq=2), 4.0) == [WorkerJoined("w0")]
    back = fleet.get("w0")
    assert back is not None and not back.routable and not back.reserved and not back.holds(PIRATE)


def test_losing_any_one_heartbeat_changes_nothing_but_time() -> None:
    heartbeats = [
        heartbeat(seq=1, state=WorkerState.JOINING, capacity=0),
        heartbeat(seq=2, running=1, adapters=(of(PIRATE, Tier.DISK, True),)),
        heartbeat(seq=3, running=2, adapters=(of(PIRATE, Tier.GPU),)),
        heartbeat(seq=4, running=3, adapters=(of(PIRATE, Tier.GPU), of(HAIKU, Tier.GPU))),
        heartbeat(seq=5, running=1, adapters=(of(HAIKU, Tier.GPU),)),
    ]

    def after(received: list[Heartbeat]) -> tuple[object, ...]:
        fleet = Fleet(LEASE_S)
        for b in received:
            fleet.heartbeat(b, b.seq * 0.5)
            fleet.attach("w0", 1)
        worker = fleet.get("w0")
        assert worker is not None
        return (
            worker.heartbeat,
            worker.load,
            worker.lease_until,
            worker.routable,
            [(worker.holds(a), worker.tier(a)) for a in (PIRATE, HAIKU)],
        )

    whole = after(heartbeats)
    for lost in range(len(heartbeats) - 1):
        assert after(heartbeats[:lost] + heartbeats[lost + 1 :]) == whole


# ---- attach and reach ----------------------------------------------------------------------------


def test_a_worker_is_routable_only_while_it_serves_and_its_data_socket_is_attached() -> None:
    fleet = Fleet(LEASE_S)
    fleet.heartbeat(heartbeat(state=WorkerState.JOINING), 0.0)
    fleet.attach("w0", 1)
    assert fleet.routable("tiny") == []
    fleet.heartbeat(heartbeat(seq=2), 0.0)
    assert [w.id for w in fleet.routable("tiny")] == ["w0"]
    assert fleet.routable("other") == []
    fleet.heartbeat(heartbeat(seq=3, state=WorkerState.DRAINING), 0.0)
    assert fleet.routable("tiny") == []


@pytest.mark.parametrize("epoch", [0, 2, -1])
def test_an_attach_of_another_epoch_does_not_count(epoch: int) -> None:
    fleet = Fleet(LEASE_S)
    fleet.heartbeat(heartbeat(epoch=1), 0.0)
    fleet.attach("w0", epoch)
    assert fleet.routable("tiny") == []


def test_an_attach_of_a_stranger_is_ignored() -> None:
    fleet = Fleet(LEASE_S)
    fleet.attach("w0", 1)
    fleet.heartbeat(heartbeat(), 0.0)
    assert fleet.routable("tiny") == []


def test_the_attach_of_an_earlier_life_does_not_carry_over_to_the_next() -> None:
    fleet, _ = serving(heartbeat(epoch=1))
    fleet.heartbeat(heartbeat(epoch=2), 0.0)
    assert fleet.routable("tiny") == []
    fleet.attach("w0", 2)
    assert [w.id for w in fleet.routable("tiny")] == ["w0"]


def test_a_late_attach_of_an_earlier_life_does_not_detach_the_present_one() -> None:
    fleet, _ = serving(heartbeat(epoch=2))
    fleet.attach("w0", 1)
    assert [w.id for w in fleet.routable("tiny")] == ["w0"]


def test_unreachable_ends_only_the_life_it_names() -> None:
    fleet, worker = serving(heartbeat(epoch=2))
    fleet.reserve(worker, 3, None)
    assert fleet.unreachable("w0", 1) is None and fleet.unreachable("nobody", 2) is None
    lost = fleet.unreachable("w0", 2)
    assert lost is not None and lost.streams == (3,)
    assert fleet.unreachable("w0", 2) is None
    assert fleet.heartbeat(heartbeat(epoch=2, seq=2), 0.0) == [WorkerJoined("w0")]


# ---- load and reservations -----------------------------------------------------------------------


def test_load_is_what_others_have_there_as_of_the_heartbeat_and_our_own_as_of_now() -> None:
    fleet, worker = serving(heartbeat(capacity=8, running=3, waiting=2, yours=1))
    assert worker.load == 4
    fleet.reserve(worker, 1, None)
    fleet.reserve(worker, 2, None)
    assert worker.load == 6
    fleet.heartbeat(heartbeat(seq=2, capacity=8, running=5, waiting=1, yours=2), 0.0)
    assert worker.load == 4 + 2
    fleet.release(1)
    assert worker.load == 5


def test_a_heartbeat_that_counts_more_of_ours_than_there_are_never_makes_load_negative() -> None:
    fleet, worker = serving(heartbeat(running=1, yours=5))
    assert worker.load == 0
    fleet.reserve(worker, 1, None)
    assert worker.load == 1


def test_a_worker_has_room_until_its_capacity_and_a_reservation_beyond_it_is_a_bug() -> None:
    fleet, worker = serving(heartbeat(capacity=2))
    for sid in (1, 2):
        assert worker.has_room
        fleet.reserve(worker, sid, None)
    assert not worker.has_room
    with pytest.raises(AssertionError):
        fleet.reserve(worker, 3, None)
    assert len(worker.reserved) == 2


def test_one_stream_is_never_reserved_twice() -> None:
    fleet, worker = serving(heartbeat())
    fleet.reserve(worker, 1, None)
    with pytest.raises(AssertionError):
        fleet.reserve(worker, 1, None)


def test_release_is_idempotent_and_unknown_streams_are_no_error() -> None:
    fleet, worker = serving(heartbeat())
    fleet.reserve(worker, 1, PIRATE)
    fleet.release(1)
    fleet.release(1)
    fleet.release(99)
    assert worker.load == 0 and not worker.holds(PIRATE) and not worker.reserved


def test_a_stream_released_before_the_loss_is_not_returned_by_it() -> None:
    fleet, worker = serving(heartbeat())
    fleet.reserve(worker, 1, None)
    fleet.reserve(worker, 2, None)
    fleet.release(1)
    assert [e.streams for e in fleet.expire(LEASE_S)] == [(2,)]
    fleet.release(2)


# ---- residency, as far as known ------------------------------------------------------------------


@pytest.mark.parametrize("tier", [Tier.CPU, Tier.DISK, Tier.REMOTE])
def test_a_loading_adapter_is_held_but_not_on_the_gpu(tier: Tier) -> None:
    _, worker = serving(heartbeat(adapters=(of(PIRATE, tier, loading=True),)))
    assert worker.holds(PIRATE)
    assert worker.tier(PIRATE) is tier is not Tier.GPU


def test_an_adapter_on_disk_that_nobody_loads_is_not_held() -> None:
    _, worker = serving(heartbeat(adapters=(of(PIRATE, Tier.DISK),)))
    assert not worker.holds(PIRATE) and worker.tier(PIRATE) is Tier.DISK


def test_another_version_or_base_of_an_adapter_is_not_that_adapter() -> None:
    fleet, worker = serving(heartbeat(adapters=(of(PIRATE, Tier.GPU),)))
    newer = AdapterRef("tiny", "pirate", "d9")
    assert not worker.holds(newer) and worker.tier(newer) is Tier.REMOTE
    fleet.reserve(worker, 1, newer)
    assert worker.holds(newer) and worker.tier(newer) is Tier.REMOTE


def test_an_open_reservation_holds_the_adapter_until_the_last_ends_whatever_heartbeats_say() -> (
    None
):
    fleet, worker = serving(heartbeat())
    fleet.reserve(worker, 1, PIRATE)
    fleet.reserve(worker, 2, PIRATE)
    fleet.heartbeat(heartbeat(seq=2), 0.0)
    assert worker.holds(PIRATE) and worker.tier(PIRATE) is Tier.REMOTE
    fleet.release(1)
    assert worker.holds(PIRATE)
    fleet.release(2)
    assert not worker.holds(PIRATE)


# ---- anything, in any order ----------------------------------------------------------------------

WORKERS = ["w0", "w1", "w2"]
worker_ids = st.sampled_from(WORKERS)
refs = st.sampled_from([None, PIRATE, HAIKU])


class FleetMachine(RuleBasedStateMachine):
    """Heartbeats, losses, restarts and requests in any order, against a model that only counts."""

    @initialize()
    def start(self) -> None:
        self.fleet = Fleet(LEASE_S)
        self.now = 0.0
        self.epoch = dict.fromkeys(WORKERS, 1)
        self.epochs = {worker: [1] for worker in WORKERS}
        self.seq = dict.fromkeys(WORKERS, 0)
        self.stopped: set[tuple[str, int]] = set()
        self.open: dict[int, tuple[str, int]] = {}
        self.returned: list[int] = []
        self.adapters: dict[int, AdapterRef | None] = {}
        self.last_sid = 0

    def take(self, events: list[FleetEvent] | list[WorkerLost]) -> None:
        for event in events:
            if isinstance(event, WorkerLost):
                for sid in event.streams:
                    assert self.open.pop(sid) == (event.worker, event.epoch), (
                        "a stream came back that was not open there"
                    )
                    self.returned.append(sid)

    @rule(
        worker=worker_ids,
        capacity=st.integers(1, 3),
        others=st.integers(0, 2),
        state=st.sampled_from(
            [WorkerState.SERVING, WorkerState.SERVING, WorkerState.DRAINING, WorkerState.STOPPED]
        ),
        lost=st.booleans(),
    )
    def heartbeats(
        self, worker: str, capacity: int, others: int, state: WorkerState, lost: bool
    ) -> None:
        epoch = self.epoch[worker]
        if (worker, epoch) in self.stopped:
            return
        self.seq[worker] += 1
        if state is WorkerState.STOPPED:
            self.stopped.add((worker, epoch))
        if not lost:
            mine = sum(at == (worker, epoch) for at in self.open.values())
            message = heartbeat(
                worker,
                epoch,
                self.seq[worker],
                capacity=capacity,
                running=others + mine,
                yours=mine,
                state=state,
            )
            self.take(self.fleet.heartbeat(message, self.now))

    @rule(worker=worker_ids, back=st.integers(0, 3))
    def an_old_heartbeat_arrives(self, worker: str, back: int) -> None:
        known = self.fleet.get(worker)
        old = heartbeat(
            worker,
            self.epoch[worker],
            self.seq[worker] - back,
            state=WorkerState.STOPPED if back else WorkerState.SERVING,
        )
        if known is None or known.heartbeat.epoch != old.epoch or known.heartbeat.seq < old.seq:
            return  # it would be news
        before = known.heartbeat
        assert self.fleet.heartbeat(old, self.now) == []
        assert self.fleet.get(worker) is known and known.heartbeat is before

    @rule(worker=worker_ids, epoch=st.integers(0, 1 << 53))
    def restarts(self, worker: str, epoch: int) -> None:
        """With any number that it has not had."""
        if epoch not in self.epochs[worker]:
            self.epochs[worker].append(epoch)
            self.epoch[worker] = epoch
            self.seq[worker] = 0

    @rule(worker=worker_ids, lives_ago=st.integers(1, 2))
    def attaches(self, worker: str, lives_ago: int) -> None:
        self.fleet.attach(worker, self.epochs[worker][-lives_ago:][0])

    @rule(adapter=refs, pick=st.randoms(use_true_random=False))
    def reserves(self, adapter: AdapterRef | None, pick: object) -> None:
        room = [w for w in self.fleet.routable("tiny") if w.has_room]
        if room:
            worker = pick.choice(room)  # type: ignore[attr-defined]
            self.last_sid += 1
            self.fleet.reserve(worker, self.last_sid, adapter)
            self.open[self.last_sid] = (worker.id, worker.heartbeat.epoch)
            self.adapters[self.last_sid] = adapter
            assert len(worker.reserved) <= worker.heartbeat.capacity
            assert adapter is None or worker.holds(adapter)

    @precondition(lambda self: self.last_sid)
    @rule(data=st.data())
    def releases(self, data: st.DataObject) -> None:
        sid = data.draw(st.integers(1, self.last_sid))
        before = {w.id: len(w.reserved) for w in self.fleet}
        at = self.open.pop(sid, None)
        self.fleet.release(sid)
        for worker in self.fleet:
            assert len(worker.reserved) == before[worker.id] - (
                at is not None and at[0] == worker.id
            )
        if at is not None:
            self.returned.append(sid)

    @rule(seconds=st.sampled_from([0.0, 0.5, LEASE_S]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.take(self.fleet.expire(self.now))
        assert all(w.lease_until > self.now for w in self.fleet)

    @rule(worker=worker_ids)
    def link_breaks(self, worker: str) -> None:
        known = self.fleet.get(worker)
        if known is not None:
            lost = self.fleet.unreachable(worker, known.heartbeat.epoch)
            assert lost is not None
            self.take([lost])

    @invariant()
    def every_stream_is_open_in_one_place_or_came_back_once(self) -> None:
        if not hasattr(self, "fleet"):
            return
        assert len(self.returned) == len(set(self.returned))
        held = {sid: (w.id, w.heartbeat.epoch) for w in self.fleet for sid in w.reserved}
        assert held == self.open
        assert sorted([*self.returned, *self.open]) == list(range(1, self.last_sid + 1))
        for worker in self.fleet:
            wanted = {adapter for sid, adapter in self.adapters.items() if sid in worker.reserved}
            # no heartbeat here shows any adapter
            assert {a for a in (PIRATE, HAIKU) if worker.holds(a)} == wanted - {None}
            assert (
                worker.id,
                worker.heartbeat.epoch,
            ) not in self.stopped or worker.heartbeat.state is not WorkerState.STOPPED

    def teardown(self) -> None:
        if hasattr(self, "fleet"):
            self.take(self.fleet.expire(self.now + 2 * LEASE_S))
            assert not self.open and len(self.fleet) == 0


TestFleetMachine = FleetMachine.TestCase


# ---- the config's bound --------------------------------------------------------------------------


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_worker_is_given_no_more_than_the_config_allows_whatever_it_says_and_whatever_the_policy(
    policy: str,
) -> None:
    fleet, worker = serving(heartbeat("w0", capacity=100), Fleet(LEASE_S, {"tiny": 2}))
    chooser, rng = make_policy(policy), random.Random(1)
    for sid in (1, 2):
        ask = RoutingRequest("tiny")
        choice = chooser.choose(ask, fleet, 0.0, rng)
        assert isinstance(choice, Choice)
        fleet.reserve(worker, sid, None)
        chooser.sent(ask, choice, 0.0)
    assert worker.heartbeat.capacity == 2 and not worker.has_room
    assert isinstance(chooser.choose(RoutingRequest("tiny"), fleet, 0.0, rng), Defer)
    fleet.heartbeat(heartbeat("w0", seq=2, capacity=100, running=2, yours=2), 0.1)
    assert not worker.has_room, "the next heartbeat tells of its own capacity again"


def test_a_worker_that_takes_less_than_the_config_allows_is_given_what_it_takes() -> None:
    _, worker = serving(heartbeat("w0", capacity=1), Fleet(LEASE_S, {"tiny": 2, "other": 9}))
    assert worker.heartbeat.capacity == 1


# ---- a new life ----------------------------------------------------------------------------------


def test_a_new_life_is_to_load_what_the_one_before_had_most_wanted_first_for_a_while() -> None:
    idle, flying = of(PIRATE, Tier.GPU), of(HAIKU, Tier.GPU)
    flying = msgspec.structs.replace(flying, in_flight=1)
    pinned = AdapterState("pin", "d3", Tier.GPU, pinned=True)
    below = AdapterState("below", "d4", Tier.CPU)
    fleet, _ = serving(heartbeat(adapters=(idle, below, flying, pinned)))
    fleet.ended("w0", 1, "killed")
    for other in ("w0", "w1"):
        fleet.heartbeat(heartbeat(other, epoch=2, state=WorkerState.JOINING), 1.0)
    after, stranger = fleet.get("w0"), fleet.get("w1")
    assert after is not None and stranger is not None
    assert [a.name for a in fleet.predecessor(after, 1.0)] == ["pin", "haiku", "pirate"]
    assert fleet.predecessor(after, SUCCESSOR_S + 1.0) == []
    assert fleet.predecessor(stranger, 1.0) == []


def test_a_life_that_ended_before_it_had_loaded_anything_leaves_the_one_before_it_in_place() -> (
    None
):
    fleet, _ = serving(heartbeat(adapters=(of(PIRATE, Tier.GPU),)))
    for epoch in (2, 3):
        fleet.heartbeat(heartbeat(epoch=epoch, state=WorkerState.JOINING), 1.0)
    worker = fleet.get("w0")
    assert worker is not None and fleet.predecessor(worker, 1.0) == [PIRATE]


def test_a_worker_is_told_once_what_to_load_as_soon_as_it_can() -> None:
    fleet = Fleet(LEASE_S)
    joining = heartbeat(state=WorkerState.JOINING)
    fleet.heartbeat(joining, 0.0)
    worker = fleet.get("w0")
    assert worker is not None and not fleet.to_warm_up(worker)
    fleet.heartbeat(msgspec.structs.replace(joining, seq=2, warming=True), 0.0)
    assert not fleet.to_warm_up(worker), "nothing can be sent to it yet"
    fleet.attach("w0", 1)
    assert fleet.to_warm_up(worker) and not fleet.to_warm_up(worker)
    assert not worker.routable


# ---- workers that cannot start -------------------------------------------------------------------


def failed_start(
    fleet: Fleet,
    worker: str,
    epoch: int,
    now: float,
    reason: str = "no GPU",
    *,
    served: bool = False,
) -> None:
    """One life of a worker, as its heartbeats tell it."""
    joining = heartbeat(worker, epoch, state=WorkerState.JOINING)
    fleet.heartbeat(joining, now)
    if served:
        serving_now = msgspec.structs.replace(joining, seq=2, state=WorkerState.SERVING)
        fleet.heartbeat(serving_now, now)
    last = msgspec.structs.replace(
        joining, seq=3, state=WorkerState.DRAINING, reason=reason, failed=True
    )
    fleet.heartbeat(last, now)
    fleet.ended(worker, epoch, reason)


def test_a_model_cannot_start_once_each_of_its_workers_has_failed_twice_whoever_starts_them() -> (
    None
):
    fleet = Fleet(LEASE_S)
    failed_start(fleet, "w0", 1, 1.0)
    assert fleet.cannot_start("tiny", 1.0) is None, "once may be an accident"
    failed_start(fleet, "w0", 2, 2.0)
    assert fleet.cannot_start("tiny", 2.0) == "no GPU"
    assert fleet.cannot_start("other", 2.0) is None
    failed_start(fleet, "w1", 1, 3.0)
    assert fleet.cannot_start("tiny", 3.0) is None, "this one has failed once only"
    failed_start(fleet, "w1", 2, 4.0, "no disk")
    assert fleet.cannot_start("tiny", 4.0) == "no disk"
    fleet.heartbeat(heartbeat("new", state=WorkerState.JOINING), 5.0)
    assert fleet.cannot_start("tiny", 5.0) is None, "a new one may"
    assert fleet.cannot_start("tiny", 4.0 + SUCCESSOR_S) is None


def test_a_worker_that_serves_or_has_served_or_was_told_to_end_has_not_failed_to_start() -> None:
    fleet = Fleet(LEASE_S)
    failed_start(fleet, "w0", 1, 1.0)
    failed_start(fleet, "w0", 2, 2.0)
    fleet.heartbeat(heartbeat("w0", 3), 3.0)
    fleet.ended("w0", 3, "stopped")
    assert fleet.cannot_start("tiny", 3.0) is None
    for epoch in (4, 5):
        failed_start(fleet, "w0", epoch, 4.0, served=True)
    for epoch in (6, 7):
        joining = heartbeat("w0", epoch, state=WorkerState.JOINING)
        fleet.heartbeat(joining, 5.0)
        told = msgspec.structs.replace(joining, seq=2, state=WorkerState.DRAINING, reason="SIGTERM")
        fleet.heartbeat(told, 5.0)
        fleet.ended("w0", epoch, "SIGTERM")
    for epoch in (8, 9):
        fleet.heartbeat(heartbeat("w0", epoch, state=WorkerState.JOINING), 5.0)
        lost = fleet.ended("w0", epoch, "killed by SIGKILL", killed=True)
        assert lost is not None and lost.killed
    assert fleet.cannot_start("tiny", 5.0) is None


def test_a_worker_that_vanishes_while_it_boots_has_failed_to_start() -> None:
    fleet = Fleet(LEASE_S)
    for epoch in (1, 2, 3):
        fleet.heartbeat(heartbeat("w0", epoch, state=WorkerState.JOINING), float(epoch))
    why = fleet.cannot_start("tiny", 3.0)
    assert why is not None and "lost" in why
