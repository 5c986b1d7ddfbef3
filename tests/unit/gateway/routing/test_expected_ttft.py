from __future__ import annotations

import random

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway.fleet.fleet import Fleet
from gateway.fleet.worker_view import LINE_PER_SLOT
from gateway.routing.demand import BOUND, FLOOR
from gateway.routing.expected_ttft import MISS, MISS_WINDOW_S, ExpectedTTFT
from gateway.routing.policy import Blocked, Choice, ChoiceReason, Decision, Defer, RoutingRequest
from gateway.routing.slot_claims import AGE_BOUND_S, HELD_AGE_S
from gateway.routing.slot_wait import LONGEST_WAIT_S, SOON_S
from shared.adapters.identity import AdapterRef
from shared.link.messages import AdapterState, Heartbeat, Tier, WorkerState

MIB = 1 << 20


def adapter(name: str) -> AdapterRef:
    return AdapterRef("tiny", name, "d")


PIRATE, HAIKU = adapter("pirate"), adapter("haiku")


def on(name: str, tier: Tier = Tier.GPU, **more: object) -> AdapterState:
    return AdapterState(name, "d", tier, **more)  # type: ignore[arg-type]


class Room:
    """A fleet, the policy, and what a gateway does with its choices."""

    def __init__(self) -> None:
        self.fleet, self.policy, self.rng, self.now, self.sid = (
            Fleet(1e9),
            ExpectedTTFT(),
            random.Random(1),
            0.0,
            0,
        )
        self.seq: dict[str, int] = {}

    def worker(
        self,
        name: str,
        *adapters: AdapterState,
        running: int = 0,
        slots: int = 4,
        capacity: int = 256,
        **more: object,
    ) -> None:
        seq = self.seq[name] = self.seq.get(name, 0) + 1
        beat = Heartbeat(
            name,
            1,
            seq,
            "tiny",
            WorkerState.SERVING,
            capacity,
            slots,
            running,
            adapters=adapters,
            **more,
        )  # type: ignore[arg-type]
        self.fleet.beat(beat, self.now)
        self.fleet.attach(name, 1)

    def request(self, ref: AdapterRef | None, **more: object) -> RoutingRequest:
        return RoutingRequest(
            "tiny", ref, 26 * MIB, **({"prompt_tokens": 128, "arrived": self.now} | more)
        )  # type: ignore[arg-type]

    def choose(self, request: RoutingRequest) -> Decision:
        return self.policy.choose(request, self.fleet, self.now, self.rng)

    def send(self, ref: AdapterRef | None, **more: object) -> Choice | Defer:
        request = self.request(ref, **more)
        self.policy.arrived(request, self.now)
        decision = self.choose(request)
        if isinstance(decision, Choice):
            self.sid += 1
            self.fleet.reserve(decision.worker, self.sid, ref, request.prompt_tokens)
            self.policy.sent(request, decision, self.now)
        return decision

    def misses(self, slots: float) -> None:
        """Adapters were not in a slot so often of late that the number of slots that such requests
        keep spreads by so many.
        """
        base = self.policy._base("tiny")
        for _ in range(round(slots**2 / base.services.service_s * MISS_WINDOW_S)):
            base.misses.note(MISS, self.now)

    def taken(self) -> None:
        """One more worker, with no slot to give: the others are not alone."""
        self.worker("taken", on("somebody", in_flight=1), running=1, yours=0, slots=1)

    def to(self, ref: AdapterRef | None, **more: object) -> tuple[str, ChoiceReason]:
        decision = self.send(ref, **more)
        assert isinstance(decision, Choice), decision
        return decision.worker.id, decision.reason


@pytest.fixture
def room() -> Room:
    return Room()


# ---- costs ---------------------------------------------------------------------------------------


def test_nobody_to_choose_from_is_a_wait_for_room(room: Room) -> None:
    assert room.send(None) == room.send(PIRATE) == Defer(Blocked.ROOM)


def test_a_holder_wins_over_an_idle_stranger(room: Room) -> None:
    room.worker("idle")
    room.worker("holder", on("pirate"), running=10)
    assert room.to(PIRATE) == ("holder", ChoiceReason.RESIDENT)


def test_a_cold_adapter_belongs_on_the_idle_worker_even_when_queues_tie(room: Room) -> None:
    room.worker("busy", running=12)
    room.worker("idle")
    assert room.to(PIRATE) == ("idle", ChoiceReason.COLD)


def test_weights_in_the_cpu_tier_win_over_an_idle_worker_without_them(room: Room) -> None:
    room.worker("idle")
    room.worker("cached", on("pirate", Tier.CPU), running=14)
    decision = room.send(PIRATE)
    assert (
        isinstance(decision, Choice)
        and decision.worker.id == "cached"
        and decision.tier is Tier.CPU
    )


def test_a_few_streams_less_on_a_worker_do_not_draw_a_queue_of_prompts_there(room: Room) -> None:
    room.worker("light", on("pirate"), running=30, yours=0)
    room.worker("heavy", on("pirate"), running=40, yours=0)
    assert [room.to(PIRATE)[0] for _ in range(4)] == ["light", "heavy", "light", "heavy"]


def test_an_idle_worker_is_not_priced_by_the_step_that_it_measured_when_it_was_busy(
    room: Room,
) -> None:
    room.worker("busy", running=5, yours=0, step_s=0.01)
    room.worker("idle", step_s=0.03)
    assert room.to(None)[0] == "idle"


def test_measured_times_replace_the_constants(room: Room) -> None:
    """A CPU tier that is slower than the disk is not worth its name."""
    room.worker("idle", stall_s=0.001, fetch_s=0.001, prefill_tokens_per_s=1e6, step_s=0.001)
    room.worker(
        "cached", on("pirate", Tier.CPU), stall_s=0.5, prefill_tokens_per_s=1e6, step_s=0.001
    )
    assert room.to(PIRATE)[0] == "idle"


def test_a_backlog_of_prompts_is_charged_in_seconds_and_works_itself_off(room: Room) -> None:
    room.worker("behind", waiting_tokens=20_000, prefill_tokens_per_s=10_000.0)
    room.worker("ahead", waiting_tokens=5_000, prefill_tokens_per_s=10_000.0)
    costs = {
        c.worker.id: c.cost.queue_s
        for c in room.policy.explain(room.request(None), room.fleet, 0.0)
    }
    assert costs["behind"] - costs["ahead"] == pytest.approx(1.5)
    later = {
        c.worker.id: c.cost.queue_s
        for c in room.policy.explain(room.request(None), room.fleet, 1.0)
    }
    assert later["behind"] - later["ahead"] == pytest.approx(1.0)


def test_base_requests_go_to_the_least_cost_and_touch_no_slot(room: Room) -> None:
    room.worker("full", *[on(f"a{n}", in_flight=1) for n in range(4)], running=4)
    room.worker("other", running=9)
    assert room.to(None) == ("full", ChoiceReason.BASE)


def test_the_only_copy_of_a_warm_adapter_is_not_thrown_out_where_somebody_elses_slot_is_free(
    room: Room,
) -> None:
    room.worker("a", on("warm"), slots=1)
    room.worker("b", on("stale"), slots=1)
    for _ in range(20):
        room.to(adapter("warm"))
    for sid in range(1, 21):
        room.fleet.release(sid)
    assert {room.to(adapter(f"new{n}"))[0] for n in range(1)} == {"b"}


def test_of_the_first_to_have_become_idle_the_coldest_is_the_victim_that_a_load_is_charged_for(
    room: Room,
) -> None:
    room.worker("a", on("warm"), on("cold"), slots=2)
    for _ in range(20):
        room.to(adapter("warm"))
    for sid in range(1, 21):
        room.fleet.release(sid)
    room.to(adapter("cold"))
    room.fleet.release(21)
    (worker,) = room.fleet.pool("tiny").workers
    assert next(iter(worker.idle)) == ("warm", "d"), (
        "by the time of its last use alone it would be this one"
    )
    (candidate,) = room.policy.explain(room.request(adapter("new")), room.fleet, room.now)
    assert candidate.cost.evict_s == pytest.approx(0.5 * 0.06), (
        "once in 20 s, so wanted within 10 s in one case of two"
    )


def test_a_cold_adapter_settles_where_slots_are_left_though_fewer_requests_run_elsewhere(
    room: Room,
) -> None:
    """It will be asked for again there: a worker with little to do but every slot in use makes each
    of its adapters wait.
    """
    room.worker("crowded", *[on(f"a{n}", in_flight=1) for n in range(3)], running=3)
    room.worker("roomy", on("b0", in_flight=9), running=9)
    assert room.to(PIRATE) == ("roomy", ChoiceReason.COLD)


def test_an_adapter_gets_as_many_copies_as_its_demand_is_worth_and_no_more(room: Room) -> None:
    for n in range(4):
        room.worker(f"w{n}", slots=8, capacity=1000)
    workers = {room.to(PIRATE)[0] for _ in range(int(FLOOR))}
    assert len(workers) == 1
    workers |= {room.to(PIRATE)[0] for _ in range(int(FLOOR))}
    assert len(workers) == 2, "twice the load of one copy"


def test_a_copy_beyond_the_demand_takes_nobodys_only_slot_however_cheap_it_is(room: Room) -> None:
    room.worker("b", on("warm"), slots=1)
    for _ in range(3):
        room.to(adapter("warm"))
    for sid in range(1, 4):
        room.fleet.release(sid)
    room.worker("a", on("pirate"), running=14)
    room.worker("b", on("warm"), on("pirate", Tier.CPU), slots=1)
    assert room.to(PIRATE) == ("a", ChoiceReason.RESIDENT)


def test_prefix_and_session_break_ties_and_nothing_else(room: Room) -> None:
    room.worker("a", on("pirate"))
    room.worker("b", on("pirate"))
    first = room.to(PIRATE, session="s1", prefix=7)[0]
    room.fleet.release(1)
    for _ in range(5):
        assert room.to(PIRATE, session="s1")[0] == first
        room.fleet.release(room.sid)
    other = "b" if first == "a" else "a"
    room.worker(first, on("pirate"), running=40)
    assert room.to(PIRATE, session="s1")[0] == other


# ---- homes, copies, coalescing -------------------------------------------------------------------


def test_gateways_that_share_nothing_choose_the_same_home(room: Room) -> None:
    other = Room()
    for r in (room, other):
        for n in range(8):
            r.worker(f"w{n}")
    names = [f"a{n}" for n in range(24)]
    assert [room.to(adapter(n))[0] for n in names] == [other.to(adapter(n))[0] for n in names]


def test_no_home_beyond_the_bounded_load(room: Room) -> None:
    for n in range(4):
        room.worker(f"w{n}", running=40, slots=32)
    room.worker("hot", running=90, slots=32)
    assert BOUND * (4 * 40 + 90) / 5 < 90
    assert "hot" not in {room.to(adapter(f"a{n}"))[0] for n in range(40)}


def test_a_cold_burst_is_loaded_once(room: Room) -> None:
    for n in range(4):
        room.worker(f"w{n}")
    sent = [room.to(PIRATE) for _ in range(FLOOR)]
    assert len({w for w, _ in sent}) == 1 and [r for _, r in sent].count(ChoiceReason.COLD) == 1


def test_a_larger_burst_is_loaded_by_as_many_workers_as_it_needs(room: Room) -> None:
    for n in range(16):
        room.worker(f"w{n}")
    sent = [room.to(PIRATE) for _ in range(4 * FLOOR)]
    assert (
        len({w for w, _ in sent}) == 4 and sum(r is not ChoiceReason.RESIDENT for _, r in sent) == 4
    )


def test_two_adapters_of_equal_demand_share_the_load_of_their_copies(room: Room) -> None:
    for n in range(2):
        room.worker(f"w{n}", on("pirate"))
    sent = [room.to(PIRATE)[0] for _ in range(20)]
    assert sent.count("w0") == sent.count("w1") == 10


def test_a_full_holder_is_passed_by(room: Room) -> None:
    room.worker("holder", on("pirate"), running=2, capacity=2)
    room.worker("other")
    assert room.to(PIRATE) == ("other", ChoiceReason.SPILL)


# ---- slots ---------------------------------------------------------------------------------------


def test_an_adapter_beyond_the_slots_waits_and_those_in_flight_pass_it(room: Room) -> None:
    room.worker("w0", slots=2)
    room.taken()
    room.to(PIRATE)
    room.to(HAIKU)
    waiting = room.send(adapter("third"))
    assert isinstance(waiting, Defer) and waiting.blocked is Blocked.SLOT
    assert room.to(PIRATE) == ("w0", ChoiceReason.RESIDENT)
    room.fleet.release(2)
    assert room.to(adapter("third")) == ("w0", ChoiceReason.COLD)


def test_a_worker_that_is_alone_keeps_a_line_of_its_own_until_it_gets_company(room: Room) -> None:
    room.worker("w0", slots=1)
    for number in range(1 + LINE_PER_SLOT):
        assert room.to(adapter(f"a{number}")) == ("w0", ChoiceReason.COLD)
    assert isinstance(room.send(PIRATE), Defer), "the line is full"
    room.fleet.release(1)
    assert room.to(PIRATE) == ("w0", ChoiceReason.COLD)
    room.fleet.release(2)
    room.worker("w1", slots=1)
    assert room.to(HAIKU)[0] == "w1"
    assert isinstance(room.send(adapter("late")), Defer)
    lost = next(w for w in room.fleet.routable("tiny") if w.id == "w1")
    room.fleet.unreachable(lost.id, lost.beat.epoch)
    assert room.to(adapter("late"))[0] == "w0"


def test_adapters_in_flight_for_other_gateways_hold_their_slots(room: Room) -> None:
    room.worker("w0", on("a", in_flight=1), on("b", in_flight=2), running=3, yours=0, slots=2)
    room.taken()
    assert isinstance(room.send(PIRATE), Defer)
    assert room.to(adapter("a"))[1] is ChoiceReason.RESIDENT


def test_a_request_waits_a_moment_for_a_slot_where_its_weights_are_cached_then_goes_anywhere(
    room: Room,
) -> None:
    room.worker("cached", on("pirate", Tier.CPU), on("x", in_flight=1), slots=1, running=1)
    room.worker("other", slots=2, running=20, yours=0)
    room.misses(slots=2.0)
    request = room.request(PIRATE)
    assert room.choose(request) == Defer(Blocked.TURN, SOON_S)
    room.now = SOON_S
    again = room.choose(request)
    assert isinstance(again, Defer) and again.until == pytest.approx(LONGEST_WAIT_S, rel=0.01)
    room.now = LONGEST_WAIT_S
    decision = room.choose(request)
    assert isinstance(decision, Choice) and decision.worker.id == "other"


def test_the_more_slots_are_open_elsewhere_the_less_a_request_waits_where_it_is_cached(
    room: Room,
) -> None:
    room.worker("cached", on("pirate", Tier.CPU), on("x", in_flight=1), slots=1, running=1)
    room.worker("other", slots=7, running=20, yours=0)
    room.misses(slots=4.0)
    decision = room.choose(room.request(PIRATE))
    assert isinstance(decision, Defer) and decision.until == pytest.approx(
        LONGEST_WAIT_S / 2, rel=0.05
    )
    room.worker("other", slots=11, running=20, yours=0)
    decision = room.choose(room.request(PIRATE))
    assert isinstance(decision, Choice) and decision.worker.id == "other"


@pytest.mark.parametrize(
    ("stalls_s", "waits_s"), [(0.040, SOON_S), (0.0005, 0.040 + 0.0005 * 10.5)]
)
def test_it_waits_no_longer_than_what_a_load_elsewhere_costs_it_and_those_who_run_there(
    room: Room, stalls_s: float, waits_s: float
) -> None:
    room.worker(
        "cached",
        on("pirate", Tier.CPU),
        on("x", in_flight=1),
        slots=1,
        running=1,
        stall_s=stalls_s,
        load_s=0.040,
    )
    room.worker("other", slots=2, running=20, yours=0)
    room.misses(slots=2.0)
    decision = room.choose(room.request(PIRATE))
    assert isinstance(decision, Defer) and decision.until == pytest.approx(waits_s)


def test_a_load_beside_the_engine_is_the_requests_own_time_and_nobody_elses(room: Room) -> None:
    for name, stalls_s in (("inside", 0.040), ("beside", 0.001)):
        room.worker(
            name, on("pirate", Tier.DISK), running=10, yours=0, stall_s=stalls_s, load_s=0.040
        )
    cost = {c.worker.id: c.cost for c in room.policy.explain(room.request(PIRATE), room.fleet, 0.0)}
    assert cost["inside"].load_s == cost["beside"].load_s == pytest.approx(0.040)
    assert cost["inside"].stall_s - cost["beside"].stall_s == pytest.approx(10 * 0.039)


def test_a_cold_adapter_passes_by_a_worker_that_loads_already_while_another_home_loads_nothing(
    room: Room,
) -> None:
    for n in range(4):
        room.worker(f"w{n}", slots=8)
    order = [
        w.id
        for w in room.policy._base("tiny").rendezvous.order(
            ("pirate", "d"), room.fleet.pool("tiny")
        )
    ]
    for home in order[:2]:
        room.worker(home, on("other", Tier.DISK, loading=True, eta_s=0.06), slots=8)
    assert room.to(PIRATE)[0] in order[2:]
    for home in order[2:]:
        room.worker(home, on("other", Tier.DISK, loading=True, eta_s=0.06), slots=8)
    assert room.to(HAIKU)[1] is ChoiceReason.COLD


@pytest.mark.parametrize("scarce", [False, True])
def test_an_adapter_with_half_of_all_requests_is_on_every_worker_while_slots_abound_and_only_then(
    scarce: bool,
) -> None:
    room = Room()
    others = {f"w{n}": [on(f"a{n}"), on(f"a{n + 4}")] for n in range(4)}
    for w, mine in others.items():
        room.worker(w, *mine, slots=16)
    if scarce:
        room.misses(slots=100.0)
    for n in range(200):
        room.to(PIRATE)
        room.to(adapter(f"a{n % 8}"))
        for w in room.fleet.routable("tiny"):
            room.worker(
                w.id,
                *others[w.id],
                *([on("pirate")] if w.in_flight(("pirate", "d")) else []),
                slots=16,
            )
    assert (
        sum(w.in_flight(("pirate", "d")) > 0 for w in room.fleet.routable("tiny")) == 4
    ) is not scarce


def test_a_request_older_than_the_age_bound_gets_the_slot_longest_without_a_request(
    room: Room,
) -> None:
    room.worker("w0", slots=2)
    room.taken()
    for _ in range(3):
        room.to(PIRATE)
    room.to(HAIKU)  # sid 4
    room.now = 1.0
    room.to(PIRATE)
    old = room.request(adapter("old"), arrived=0.0)
    assert room.choose(old) == Defer(Blocked.SLOT, AGE_BOUND_S)
    room.now = AGE_BOUND_S
    assert isinstance(room.choose(old), Defer)
    assert isinstance(room.send(HAIKU), Defer)  # its slot closes
    assert room.to(PIRATE)[1] is ChoiceReason.RESIDENT
    room.fleet.release(4)
    assert isinstance(room.send(adapter("young")), Defer)  # the slot is kept for whom it was closed
    assert isinstance(room.send(HAIKU), Defer)
    decision = room.choose(old)
    assert isinstance(decision, Choice)
    room.fleet.reserve(decision.worker, 99, adapter("old"))
    room.policy.sent(old, decision, room.now)
    room.fleet.release(99)
    assert room.to(HAIKU)[1] is not None


def test_a_claim_ends_with_the_request_that_made_it(room: Room) -> None:
    room.worker("w0", slots=1)
    room.taken()
    room.to(PIRATE)
    old = room.request(HAIKU)
    room.now = AGE_BOUND_S
    room.choose(old)
    assert isinstance(room.send(PIRATE), Defer)
    room.policy.left(old, room.now)
    assert room.to(PIRATE)[1] is ChoiceReason.RESIDENT


def test_an_adapter_whose_holders_are_all_full_soon_gets_a_slot_on_a_worker_with_room(
    room: Room,
) -> None:
    room.worker("full", on("pirate"), slots=1, capacity=1)
    room.worker("idle", slots=1, capacity=9)
    room.to(PIRATE)
    assert room.to(HAIKU)[0] == "idle"
    request = room.request(PIRATE)
    room.now = HELD_AGE_S
    assert isinstance(room.choose(request), Defer)
    assert isinstance(room.send(HAIKU), Defer)
    room.fleet.release(2)
    decision = room.choose(request)
    assert isinstance(decision, Choice) and decision.worker.id == "idle"


def test_a_new_worker_is_told_its_share_of_the_hot_adapters_and_no_cold_ones(room: Room) -> None:
    for n in range(3):
        room.worker(f"w{n}", slots=16)
    for _ in range(60):
        for n in range(12):
            room.to(adapter(f"hot{n}"))
    room.to(adapter("cold"))
    room.worker("new", slots=16)
    new = room.fleet.get("new")
    assert new is not None
    warm_set = [a.name for a in room.policy.warm_set(new, room.fleet, room.now)]
    assert 1 <= len(warm_set) <= 8 and all(name.startswith("hot") for name in warm_set)
    room.now += 1000.0
    assert room.policy.warm_set(new, room.fleet, room.now) == []


def test_explain_shows_every_worker_best_first_with_its_terms(room: Room) -> None:
    room.worker("cold", running=3)
    room.worker("warm", on("pirate"))
    room.worker("full", on("x", in_flight=1), slots=1, running=1)
    found = room.policy.explain(room.request(PIRATE), room.fleet, 0.0)
    assert [(c.worker.id, c.eligible, c.note) for c in found] == [
        ("warm", True, ""),
        ("cold", True, ""),
        ("full", False, "no slot"),
    ]
    warm, cold = found[0].cost, found[1].cost
    assert (
        warm.load_s == 0.0
        and cold.load_s == pytest.approx(0.060 + 0.250)
        and cold.stall_s >= 3 * 0.060
    )
    assert cold.total_s == pytest.approx(cold.queue_s + cold.load_s + cold.stall_s)


# ---- anything, in any order ----------------------------------------------------------------------

WORKERS, SLOTS, CAPACITY = 3, 2, 5
SERVICE_S = 1.0


class SlotMachine(RuleBasedStateMachine):
    """Requests for more adapters than there are slots, each served for SERVICE_S; the waiting ones
    are asked again every 50 ms, oldest first.
    """

    @initialize()
    def start(self) -> None:
        self.room = Room()
        for n in range(WORKERS):
            self.room.worker(f"w{n}", slots=SLOTS, capacity=CAPACITY)
        self.waiting: list[tuple[RoutingRequest, AdapterRef]] = []
        self.running: dict[int, tuple[float, RoutingRequest, AdapterRef]] = {}

    @rule(names=st.lists(st.integers(0, 11), min_size=1, max_size=4))
    def arrive(self, names: list[int]) -> None:
        for n in names:
            ref = adapter(f"a{n}")
            request = self.room.request(ref)
            self.room.policy.arrived(request, self.room.now)
            self.waiting.append((request, ref))
        self.dispatch()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request, _ = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
        self.room.policy.left(request, self.room.now)

    @rule(steps=st.integers(1, 30))
    def pass_time(self, steps: int) -> None:
        for _ in range(steps):
            self.room.now += 0.05
            for sid, (ends, request, _) in list(self.running.items()):
                if ends <= self.room.now:
                    worker = self.room.fleet._by_stream[sid]
                    del self.running[sid]
                    self.room.fleet.release(sid)
                    self.room.policy.finished(request, worker, SERVICE_S, 10, self.room.now)
            self.dispatch()

    def dispatch(self) -> None:
        room = self.room
        for request, ref in list(self.waiting):
            decision = room.choose(request)
            if isinstance(decision, Choice):
                room.sid += 1
                room.fleet.reserve(decision.worker, room.sid, ref, 128)
                room.policy.sent(request, decision, room.now)
                self.waiting.remove((request, ref))
                self.running[room.sid] = (room.now + SERVICE_S, request, ref)

    @invariant()
    def slots_and_room_are_kept(self) -> None:
        if hasattr(self, "room"):
            for worker in self.room.fleet:
                assert worker.load <= CAPACITY and len(worker.busy) <= SLOTS

    @invariant()
    def nothing_is_kept_of_what_is_over(self) -> None:
        if hasattr(self, "room"):
            base = self.room.policy._base("tiny")
            assert len(base.occupancy) == len(self.running) and len(base.slot_wait) <= len(
                self.waiting
            )

    @invariant()
    def nobody_waits_past_the_age_bound_and_its_turn(self) -> None:
        """At most 12 adapters at once want six slots, each of which serves five requests a second:
        after the bound a handful of rounds do.
        """
        if hasattr(self, "room") and self.waiting:
            oldest = max(self.room.now - request.arrived for request, _ in self.waiting)
            ahead = len(self.waiting) + len(self.running)
            assert oldest <= AGE_BOUND_S + SERVICE_S * (4 + ahead)


TestSlotMachine = SlotMachine.TestCase
