from __future__ import annotations

import math
import random

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway.fleet.fleet import Changed, Fleet, FleetEvent, Joined, Lost, WorkerView
from gateway.routing.policy import Choice, Defer, RoutingRequest
from gateway.routing.registry import POLICIES, make_policy
from shared.adapters.identity import AdapterRef
from shared.link.messages import AdapterState, Heartbeat, Tier, WorkerState

LEASE_S = 3.0
PIRATE = AdapterRef("tiny", "pirate", "d1")
HAIKU = AdapterRef("tiny", "haiku", "d2")


def beat(
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
    fleet.beat(first, now)
    fleet.attach(first.worker, first.epoch)
    worker = fleet.get(first.worker)
    assert worker is not None
    return fleet, worker


# ---- membership ----------------------------------------------------------------------------------


def test_the_first_beat_joins_and_the_second_says_nothing() -> None:
    fleet = Fleet(LEASE_S)
    assert fleet.beat(beat(seq=1), 0.0) == [Joined("w0")]
    assert fleet.beat(beat(seq=2), 1.0) == []
    assert len(fleet) == 1


@pytest.mark.parametrize("seq", [4, 5])
def test_a_beat_that_is_not_newer_changes_nothing_and_does_not_extend_the_lease(seq: int) -> None:
    fleet, worker = serving(beat(seq=5, running=1))
    assert fleet.beat(beat(seq=seq, running=9, state=WorkerState.DRAINING), 2.0) == []
    assert worker.beat.running == 1 and worker.lease_until == LEASE_S


@pytest.mark.parametrize("epochs", [(1, 2), (2, 1)])
def test_late_beats_of_a_life_that_was_replaced_are_ignored_whichever_number_is_higher(
    epochs: tuple[int, int],
) -> None:
    fleet, _ = serving(beat(epoch=epochs[0], seq=1))
    fleet.beat(beat(epoch=epochs[1], seq=1), 0.5)
    worker = fleet.get("w0")
    assert worker is not None and worker.beat.epoch == epochs[1]
    for state in (WorkerState.SERVING, WorkerState.STOPPED):
        assert fleet.beat(beat(epoch=epochs[0], seq=99, state=state), 1.0) == []
    assert fleet.get("w0") is worker


def test_a_life_that_was_replaced_may_come_back_once_its_successor_is_gone() -> None:
    fleet, _ = serving(beat(epoch=1, seq=1))
    fleet.beat(beat(epoch=2, seq=1), 0.0)
    assert [lost.epoch for lost in fleet.expire(LEASE_S)] == [2]
    assert fleet.beat(beat(epoch=1, seq=2), LEASE_S) == [Joined("w0")]


def test_no_more_ended_lives_are_remembered_than_the_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gateway.fleet.fleet.MOST_ENDED", 3)
    fleet = Fleet(LEASE_S)
    for epoch in range(1, 9):
        fleet.beat(beat(epoch=epoch), 0.0)
        fleet.ended("w0", epoch, "why")
    assert len(fleet._ended) == 3


# ---- what carries --------------------------------------------------------------------------------


def test_a_worker_whose_data_connection_does_not_carry_keeps_its_streams_and_gets_no_new_ones() -> (
    None
):
    fleet, worker = serving(beat())
    fleet.reserve(worker, 7, None)
    assert fleet.link("w0", 1, False) is worker and fleet.link("w0", 1, False) is None
    assert not fleet.routable("tiny") and worker.reserved == {7: None}
    fleet.beat(beat(seq=2), 1.0)
    assert not fleet.routable("tiny"), "beats come by another connection"
    assert fleet.link("w0", 1, True) is worker and [w.id for w in fleet.routable("tiny")] == ["w0"]
    assert fleet.link("w0", 2, False) is None and fleet.link("nobody", 1, False) is None


def test_a_worker_whose_beats_are_overdue_gets_no_new_requests_until_the_next_one() -> None:
    fleet, worker = serving(beat(), Fleet(LEASE_S, silent_s=0.6))
    assert fleet.expire(0.6) == [] and worker.routable
    assert fleet.expire(0.7) == [] and not fleet.routable("tiny")
    fleet.beat(beat(seq=2), 0.8)
    assert [w.id for w in fleet.routable("tiny")] == ["w0"]


def test_a_worker_that_is_heard_by_its_data_connection_keeps_its_lease() -> None:
    fleet, _ = serving(beat())
    fleet.heard("w0", 1, 2.0)
    fleet.heard("w0", 9, 99.0)
    assert fleet.expire(LEASE_S) == [] and len(fleet.expire(2.0 + LEASE_S)) == 1


# ---- lives ---------------------------------------------------------------------------------------


def test_a_new_epoch_returns_the_streams_of_the_old_one_and_starts_from_nothing() -> None:
    fleet, worker = serving(beat(adapters=(of(PIRATE, Tier.GPU),)))
    fleet.reserve(worker, 7, PIRATE)
    events = fleet.beat(beat(epoch=2), 1.0)
    assert events == [Lost("w0", 1, (7,), "restarted"), Joined("w0")]
    reborn = fleet.get("w0")
    assert reborn is not None and reborn is not worker
    assert reborn.load == 0 and not reborn.holds(PIRATE) and not reborn.routable


def test_a_change_of_state_is_told_once_with_its_reason() -> None:
    fleet, _ = serving(beat())
    events = fleet.beat(beat(seq=2, state=WorkerState.DRAINING, reason="told to drain"), 0.0)
    assert events == [Changed("w0", WorkerState.SERVING, WorkerState.DRAINING, "told to drain")]
    assert fleet.beat(beat(seq=3, state=WorkerState.DRAINING), 0.0) == []


def test_a_life_that_leaves_does_not_come_back_with_a_late_beat_but_the_next_life_serves() -> None:
    fleet, worker = serving(beat())
    assert fleet.leaves("w0", 2, "why") is None and worker.routable, "another life's refusal"
    assert fleet.leaves("w0", 1, "why") == Changed(
        "w0", WorkerState.SERVING, WorkerState.DRAINING, "why"
    )
    assert fleet.leaves("w0", 1, "why") is None, "told once"
    assert fleet.beat(beat(seq=2), 0.1) == [] and not fleet.routable(worker.beat.base)
    assert (
        fleet.beat(beat(seq=3, state=WorkerState.STOPPED), 0.2)[0].worker == "w0"
        and len(fleet) == 0
    )
    fleet, worker = serving(beat(epoch=2), fleet)
    assert worker.routable


def test_stopped_ends_the_epoch_for_good() -> None:
    fleet, worker = serving(beat(epoch=3))
    fleet.reserve(worker, 1, None)
    assert fleet.beat(beat(epoch=3, seq=2, state=WorkerState.STOPPED, reason="bye"), 0.0) == [
        Lost("w0", 3, (1,), "bye")
    ]
    for late in (
        beat(epoch=3, seq=3),
        beat(epoch=3, seq=4, state=WorkerState.STOPPED),
    ):
        assert fleet.beat(late, 0.0) == []
    assert len(fleet) == 0
    assert fleet.beat(beat(epoch=2), 0.0) == [Joined("w0")], "no number is too low"


def test_stopped_as_the_first_word_of_another_life_changes_nothing_and_joins_nobody() -> None:
    fleet, worker = serving(beat(epoch=1))
    fleet.reserve(worker, 1, None)
    assert fleet.beat(beat(epoch=2, state=WorkerState.STOPPED), 0.0) == []
    assert fleet.beat(beat(epoch=2, seq=2), 0.0) == [] and fleet.get("w0") is worker


def test_stopped_of_an_unknown_worker_is_no_event() -> None:
    fleet = Fleet(LEASE_S)
    assert fleet.beat(beat(state=WorkerState.STOPPED), 0.0) == []
    assert fleet.beat(beat(seq=2), 0.0) == []


# ---- leases --------------------------------------------------------------------------------------


def test_a_lease_runs_from_the_last_beat_and_ends_exactly_then() -> None:
    fleet, _ = serving(beat(seq=1), now=0.0)
    fleet.beat(beat(seq=2), 2.0)
    assert fleet.expire(math.nextafter(2.0 + LEASE_S, 0)) == []
    lost = fleet.expire(2.0 + LEASE_S)
    assert [(e.worker, e.epoch) for e in lost] == [("w0", 1)]
    assert fleet.expire(100.0) == []


def test_only_silent_workers_expire() -> None:
    fleet, quiet = serving(beat("quiet"))
    fleet, _ = serving(beat("loud"), fleet)
    fleet.reserve(quiet, 5, None)
    fleet.beat(beat("loud", seq=2), 2.0)
    assert [(e.worker, e.streams) for e in fleet.expire(LEASE_S)] == [("quiet", (5,))]
    assert [w.id for w in fleet] == ["loud"]


def test_a_worker_that_was_silent_too_long_comes_back_without_its_old_streams() -> None:
    fleet, worker = serving(beat(seq=1))
    fleet.reserve(worker, 5, PIRATE)
    fleet.expire(LEASE_S)
    assert fleet.beat(beat(seq=2), 4.0) == [Joined("w0")]
    back = fleet.get("w0")
    assert back is not None and not back.routable and not back.reserved and not back.holds(PIRATE)


def test_losing_any_one_heartbeat_changes_nothing_but_time() -> None:
    beats = [
        beat(seq=1, state=WorkerState.JOINING, capacity=0),
        beat(seq=2, running=1, adapters=(of(PIRATE, Tier.DISK, True),)),
        beat(seq=3, running=2, adapters=(of(PIRATE, Tier.GPU),)),
        beat(seq=4, running=3, adapters=(of(PIRATE, Tier.GPU), of(HAIKU, Tier.GPU))),
        beat(seq=5, running=1, adapters=(of(HAIKU, Tier.GPU),)),
    ]

    def after(received: list[Heartbeat]) -> tuple[object, ...]:
        fleet = Fleet(LEASE_S)
        for b in received:
            fleet.beat(b, b.seq * 0.5)
            fleet.attach("w0", 1)
        worker = fleet.get("w0")
        assert worker is not None
        return (
            worker.beat,
            worker.load,
            worker.lease_until,
            worker.routable,
            [(worker.holds(a), worker.tier(a)) for a in (PIRATE, HAIKU)],
        )

    whole = after(beats)
    for lost in range(len(beats) - 1):
        assert after(beats[:lost] + beats[lost + 1 :]) == whole


# ---- attach and reach ----------------------------------------------------------------------------


def test_a_worker_is_routable_only_while_it_serves_and_its_data_socket_is_attached() -> None:
    fleet = Fleet(LEASE_S)
    fleet.beat(beat(state=WorkerState.JOINING), 0.0)
    fleet.attach("w0", 1)
    assert fleet.routable("tiny") == []
    fleet.beat(beat(seq=2), 0.0)
    assert [w.id for w in fleet.routable("tiny")] == ["w0"]
    assert fleet.routable("other") == []
    fleet.beat(beat(seq=3, state=WorkerState.DRAINING), 0.0)
    assert fleet.routable("tiny") == []


@pytest.mark.parametrize("epoch", [0, 2, -1])
def test_an_attach_of_another_epoch_does_not_count(epoch: int) -> None:
    fleet = Fleet(LEASE_S)
    fleet.beat(beat(epoch=1), 0.0)
    fleet.attach("w0", epoch)
    assert fleet.routable("tiny") == []


def test_an_attach_of_a_stranger_is_ignored() -> None:
    fleet = Fleet(LEASE_S)
    fleet.attach("w0", 1)
    fleet.beat(beat(), 0.0)
    assert fleet.routable("tiny") == []


def test_the_attach_of_an_earlier_life_does_not_carry_over_to_the_next() -> None:
    fleet, _ = serving(beat(epoch=1))
    fleet.beat(beat(epoch=2), 0.0)
    assert fleet.routable("tiny") == []
    fleet.attach("w0", 2)
    assert [w.id for w in fleet.routable("tiny")] == ["w0"]


def test_a_late_attach_of_an_earlier_life_does_not_detach_the_present_one() -> None:
    fleet, _ = serving(beat(epoch=2))
    fleet.attach("w0", 1)
    assert [w.id for w in fleet.routable("tiny")] == ["w0"]


def test_unreachable_ends_only_the_life_it_names() -> None:
    fleet, worker = serving(beat(epoch=2))
    fleet.reserve(worker, 3, None)
    assert fleet.unreachable("w0", 1) is None and fleet.unreachable("nobody", 2) is None
    lost = fleet.unreachable("w0", 2)
    assert lost is not None and lost.streams == (3,)
    assert fleet.unreachable("w0", 2) is None
    assert fleet.beat(beat(epoch=2, seq=2), 0.0) == [Joined("w0")]


# ---- load and reservations -----------------------------------------------------------------------


def test_load_is_what_others_have_there_as_of_the_beat_and_our_own_as_of_now() -> None:
    fleet, worker = serving(beat(capacity=8, running=3, waiting=2, yours=1))
    assert worker.load == 4
    fleet.reserve(worker, 1, None)
    fleet.reserve(worker, 2, None)
    assert worker.load == 6
    fleet.beat(beat(seq=2, capacity=8, running=5, waiting=1, yours=2), 0.0)
    assert worker.load == 4 + 2
    fleet.release(1)
    assert worker.load == 5


def test_a_beat_that_counts_more_of_ours_than_there_are_never_makes_load_negative() -> None:
    fleet, worker = serving(beat(running=1, yours=5))
    assert worker.load == 0
    fleet.reserve(worker, 1, None)
    assert worker.load == 1


def test_a_worker_has_room_until_its_capacity_and_a_reservation_beyond_it_is_a_bug() -> None:
    fleet, worker = serving(beat(capacity=2))
    for sid in (1, 2):
        assert worker.has_room
        fleet.reserve(worker, sid, None)
    assert not worker.has_room
    with pytest.raises(AssertionError):
        fleet.reserve(worker, 3, None)
    assert len(worker.reserved) == 2


def test_one_stream_is_never_reserved_twice() -> None:
    fleet, worker = serving(beat())
    fleet.reserve(worker, 1, None)
    with pytest.raises(AssertionError):
        fleet.reserve(worker, 1, None)


def test_release_is_idempotent_and_unknown_streams_are_no_error() -> None:
    fleet, worker = serving(beat())
    fleet.reserve(worker, 1, PIRATE)
    fleet.release(1)
    fleet.release(1)
    fleet.release(99)
    assert worker.load == 0 and not worker.holds(PIRATE) and not worker.reserved


def test_a_stream_released_before_the_loss_is_not_returned_by_it() -> None:
    fleet, worker = serving(beat())
    fleet.reserve(worker, 1, None)
    fleet.reserve(worker, 2, None)
    fleet.release(1)
    assert [e.streams for e in fleet.expire(LEASE_S)] == [(2,)]
    fleet.release(2)


# ---- residency, as far as known ------------------------------------------------------------------


@pytest.mark.parametrize("tier", [Tier.CPU, Tier.DISK, Tier.REMOTE])
def test_a_loading_adapter_is_held_but_not_on_the_gpu(tier: Tier) -> None:
    _, worker = serving(beat(adapters=(of(PIRATE, tier, loading=True),)))
    assert worker.holds(PIRATE)
    assert worker.tier(PIRATE) is tier is not Tier.GPU


def test_an_adapter_on_disk_that_nobody_loads_is_not_held() -> None:
    _, worker = serving(beat(adapters=(of(PIRATE, Tier.DISK),)))
    assert not worker.holds(PIRATE) and worker.tier(PIRATE) is Tier.DISK


def test_another_version_or_base_of_an_adapter_is_not_that_adapter() -> None:
    fleet, worker = serving(beat(adapters=(of(PIRATE, Tier.GPU),)))
    newer = AdapterRef("tiny", "pirate", "d9")
    assert not worker.holds(newer) and worker.tier(newer) is Tier.REMOTE
    fleet.reserve(worker, 1, newer)
    assert worker.holds(newer) and worker.tier(newer) is Tier.REMOTE


def test_an_open_reservation_holds_the_adapter_until_the_last_one_ends_whatever_the_beats_say() -> (
    None
):
    fleet, worker = serving(beat())
    fleet.reserve(worker, 1, PIRATE)
    fleet.reserve(worker, 2, PIRATE)
    fleet.beat(beat(seq=2), 0.0)
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
    """Beats, losses, restarts and requests in any order, against a model that only counts."""

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

    def take(self, events: list[FleetEvent] | list[Lost]) -> None:
        for event in events:
            if isinstance(event, Lost):
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
    def beats(
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
            message = beat(
                worker,
                epoch,
                self.seq[worker],
                capacity=capacity,
                running=others + mine,
                yours=mine,
                state=state,
            )
            self.take(self.fleet.beat(message, self.now))

    @rule(worker=worker_ids, back=st.integers(0, 3))
    def an_old_beat_arrives(self, worker: str, back: int) -> None:
        known = self.fleet.get(worker)
        old = beat(
            worker,
            self.epoch[worker],
            self.seq[worker] - back,
            state=WorkerState.STOPPED if back else WorkerState.SERVING,
        )
        if known is None or known.beat.epoch != old.epoch or known.beat.seq < old.seq:
            return  # it would be news
        before = known.beat
        assert self.fleet.beat(old, self.now) == []
        assert self.fleet.get(worker) is known and known.beat is before

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
            self.open[self.last_sid] = (worker.id, worker.beat.epoch)
            self.adapters[self.last_sid] = adapter
            assert len(worker.reserved) <= worker.beat.capacity
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
            lost = self.fleet.unreachable(worker, known.beat.epoch)
            assert lost is not None
            self.take([lost])

    @invariant()
    def every_stream_is_open_in_one_place_or_came_back_once(self) -> None:
        if not hasattr(self, "fleet"):
            return
        assert len(self.returned) == len(set(self.returned))
        held = {sid: (w.id, w.beat.epoch) for w in self.fleet for sid in w.reserved}
        assert held == self.open
        assert sorted([*self.returned, *self.open]) == list(range(1, self.last_sid + 1))
        for worker in self.fleet:
            wanted = {adapter for sid, adapter in self.adapters.items() if sid in worker.reserved}
            # no beat here shows any adapter
            assert {a for a in (PIRATE, HAIKU) if worker.holds(a)} == wanted - {None}
            assert (
                worker.id,
                worker.beat.epoch,
            ) not in self.stopped or worker.beat.state is not WorkerState.STOPPED

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
    fleet, worker = serving(beat("w0", capacity=100), Fleet(LEASE_S, {"tiny": 2}))
    chooser, rng = make_policy(policy), random.Random(1)
    for sid in (1, 2):
        ask = RoutingRequest("tiny")
        choice = chooser.choose(ask, fleet, 0.0, rng)
        assert isinstance(choice, Choice)
        fleet.reserve(worker, sid, None)
        chooser.sent(ask, choice, 0.0)
    assert worker.beat.capacity == 2 and not worker.has_room
    assert isinstance(chooser.choose(RoutingRequest("tiny"), fleet, 0.0, rng), Defer)
    fleet.beat(beat("w0", seq=2, capacity=100, running=2, yours=2), 0.1)
    assert not worker.has_room, "the next beat tells of its own capacity again"


def test_a_worker_that_takes_less_than_the_config_allows_is_given_what_it_takes() -> None:
    _, worker = serving(beat("w0", capacity=1), Fleet(LEASE_S, {"tiny": 2, "other": 9}))
    assert worker.beat.capacity == 1
