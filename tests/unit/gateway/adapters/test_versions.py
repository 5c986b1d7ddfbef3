"""Which version of an adapter answers while a new one is being prepared."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.adapters import versions as module
from gateway.adapters.version_placement import (
    CacheVersion,
    LoadVersion,
    NothingToPrepare,
    NoWorkerServes,
    Prepare,
    in_engines,
    in_flight,
    on_workers,
    plan,
)
from gateway.adapters.versions import (
    ENGINE_TRIES,
    EXPLICIT_S,
    FIRST_PAUSE_S,
    FORGET_S,
    LINGER_S,
    MAX_OLDER,
    MAX_PAUSE_S,
    MAX_PREPARING,
    QUIET_S,
    RECENT_S,
    Versions,
    VersionStage,
)
from gateway.fleet.fleet import Fleet
from gateway.fleet.rendezvous import Rendezvous
from shared.adapters.identity import StoredAdapter, StoredFile
from shared.errors import AdapterNotFound, EngineFailure, InvalidAdapter, StoreUnavailable
from shared.link.messages import AdapterState, Heartbeat, Tier, WorkerState


def version(digest: str, name: str = "a") -> StoredAdapter:
    return StoredAdapter(name, digest, (StoredFile("adapter_config.json", 2, digest),))


A, B, C = version("aaaa"), version("bbbb"), version("cccc")
BAD = InvalidAdapter("it holds NaN", "not_finite")
DOWN = StoreUnavailable("the store is down")


def served(adapter: StoredAdapter = A) -> Versions:
    versions = Versions()
    versions.use(adapter, 0.0)
    return versions


def changing(now: float = 1.0) -> Versions:
    """A was served, the store shows B, and B is being prepared."""
    versions = served()
    versions.found(B, now)
    assert versions.due(now) == [Prepare(A, B, True)]
    return versions


# ---- the switch ----------------------------------------------------------------------------------


def test_a_name_that_was_never_served_is_answered_as_the_store_shows_it() -> None:
    versions = Versions()
    versions.listed({"a": A}, 0.0, complete=True)
    versions.listed({"a": B}, 1.0, complete=True)
    assert versions.current(B) is B and versions.due(1.0) == []


def test_the_old_version_answers_until_the_new_one_is_ready_and_the_new_one_from_then_on() -> None:
    versions = served()
    versions.listed({"a": B}, 1.0, complete=True)
    assert versions.current(B) is A
    versions.due(1.0)
    assert versions.current(B) is A
    assert versions.ready(B, 2.0)
    assert versions.current(B) is B


def test_an_invalid_new_version_never_answers_and_is_tried_again_when_its_content_changes() -> None:
    versions = changing()
    assert versions.failed(B, BAD, 2.0) is VersionStage.REFUSED
    for now in (3.0, 1e4, 1e6):
        versions.listed({"a": B}, now, complete=True)
        assert versions.due(now) == [] and versions.current(B) is A
    change = versions.change("a")
    assert change is not None and (change.code, change.reason) == (
        "invalid_adapter_not_finite",
        "it holds NaN",
    )
    versions.listed({"a": C}, 2e6, complete=True)
    assert [p.new for p in versions.due(2e6)] == [C]


def test_any_other_failure_is_tried_again_after_growing_pauses() -> None:
    versions, now, pauses = changing(), 1.0, []
    for _ in range(10):
        assert versions.failed(B, DOWN, now) is VersionStage.WAITING
        change = versions.change("a")
        assert change is not None and versions.due(change.until - 0.001) == []
        pauses.append(change.until - now)
        now = change.until
        assert [p.new for p in versions.due(now)] == [B]
        assert versions.current(B) is A
    assert (
        pauses[:3] == pytest.approx([FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S])
        and max(pauses) == MAX_PAUSE_S
    )


def test_a_version_that_kills_engines_is_refused_after_a_few() -> None:
    versions, now = changing(), 1.0
    for _ in range(ENGINE_TRIES - 1):
        assert versions.failed(B, EngineFailure("died"), now) is VersionStage.WAITING
        now += MAX_PAUSE_S
        versions.due(now)
    assert versions.failed(B, EngineFailure("died"), now) is VersionStage.REFUSED


def test_an_old_version_that_is_nowhere_any_more_gives_way_at_once_even_to_a_refused_one() -> None:
    for failure in (None, DOWN, BAD):
        versions = changing()
        if failure is not None:
            versions.failed(B, failure, 2.0)
        versions.lost(A, 3.0)
        assert versions.current(B) is B and not versions.ready(B, 4.0)


def test_losing_a_version_that_does_not_answer_any_more_changes_nothing() -> None:
    versions = changing()
    versions.ready(B, 2.0)
    versions.lost(A, 3.0)
    assert versions.current(B) is B


def test_content_that_comes_back_ends_the_change() -> None:
    versions = changing()
    versions.listed({"a": A}, 2.0, complete=True)
    assert not versions.ready(B, 3.0) and versions.current(A) is A and versions.change("a") is None


def test_a_newer_version_overtakes_the_one_that_is_being_prepared() -> None:
    versions = changing()
    versions.found(C, 2.0)
    assert not versions.ready(B, 3.0), "B is history"
    assert versions.current(C) is A
    assert [p.new for p in versions.due(3.0)] == [C]
    versions.failed(B, BAD, 3.5)
    assert versions.ready(C, 4.0) and versions.current(C) is C


def test_a_version_that_turned_out_invalid_is_nothing_to_keep() -> None:
    versions = served()
    versions.unusable(A)
    versions.found(B, 1.0)
    assert versions.current(B) is B and versions.due(1.0) == []


def test_a_deleted_adapter_is_forgotten_and_leaves_the_engines() -> None:
    versions = served()
    versions.listed({}, 1.0, complete=True)
    assert versions.leaving(lambda key: 0, 1.0 + QUIET_S) == [("a", "aaaa")]
    assert versions.current(B) is B


def test_a_listing_that_was_cut_deletes_nothing() -> None:
    versions = served()
    versions.listed({}, 1.0, complete=False)
    assert versions.leaving(lambda key: 0, 100.0) == []


def test_an_adapter_that_was_not_asked_for_lately_is_not_worth_keeping() -> None:
    versions = served()
    versions.found(B, RECENT_S + 1)
    assert versions.due(RECENT_S + 1) == [Prepare(A, B, False)]


# ---- the old version leaves ----------------------------------------------------------------------


def switched() -> Versions:
    versions = changing()
    versions.ready(B, 10.0)
    return versions


def test_the_old_version_leaves_once_nobody_has_used_it_for_a_while() -> None:
    versions = switched()
    assert versions.leaving(lambda key: 0, 10.0) == []
    assert versions.leaving(lambda key: 3, 11.0) == []
    assert versions.leaving(lambda key: 0, 11.0 + QUIET_S - 0.1) == []
    assert versions.leaving(lambda key: 0, 11.0 + QUIET_S) == [("a", "aaaa")]


def test_an_old_version_that_comes_back_for_a_queued_request_leaves_again() -> None:
    versions = switched()
    assert versions.leaving(lambda key: None, 20.0) == []
    assert versions.leaving(lambda key: 1, 30.0) == []
    assert versions.leaving(lambda key: 0, 30.0 + QUIET_S) == [("a", "aaaa")]


def test_what_no_engine_holds_is_forgotten_after_a_while_and_everything_after_long() -> None:
    versions = switched()
    versions.leaving(lambda key: None, 10.0 + LINGER_S + 1)
    assert versions.leaving(lambda key: 0, 1e9) == []
    versions = switched()
    assert (
        versions.leaving(lambda key: 1, 10.0 + FORGET_S + 1) == []
        and versions.leaving(lambda key: 0, 1e9) == []
    )


def test_a_version_that_is_asked_for_by_its_digest_stays_while_it_is() -> None:
    versions = switched()
    versions.use_explicitly(("a", "aaaa"), 12.0)
    assert versions.leaving(lambda key: 0, 20.0) == []
    assert versions.leaving(lambda key: 0, 12.0 + EXPLICIT_S) == [("a", "aaaa")]


def test_a_version_that_answers_again_does_not_leave() -> None:
    versions = switched()
    versions.found(A, 11.0)
    versions.due(11.0)
    versions.ready(A, 12.0)
    assert versions.leaving(lambda key: 0, 20.0) == [("a", "bbbb")]


# ---- what is known -------------------------------------------------------------------------------


def test_versions_are_told_by_what_they_are_for() -> None:
    versions = served()
    assert [(v.digest, v.state) for v in versions.of(A)] == [("aaaa", "current")]
    versions.found(B, 1.0)
    assert [(v.digest, v.state) for v in versions.of(B)] == [
        ("aaaa", "current"),
        ("bbbb", "preparing"),
    ]
    versions.due(1.0)
    versions.failed(B, BAD, 1.0)
    assert [(v.digest, v.state) for v in versions.of(B)] == [
        ("aaaa", "current"),
        ("bbbb", "refused"),
    ]
    versions.found(C, 2.0)
    versions.due(2.0)
    versions.ready(C, 2.0)
    assert [(v.digest, v.state) for v in versions.of(C)] == [("cccc", "current"), ("aaaa", "older")]


def test_everything_that_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("MAX_SERVED", "MAX_CHANGES", "MAX_RETIRED", "MAX_EXPLICIT"):
        monkeypatch.setattr(module, limit, 5)
    versions = Versions()
    for i in range(30):
        versions.use(version("d0", f"n{i}"), float(i))
        versions.use_explicitly((f"n{i}", "d0"), float(i))
    for generation in range(1, 9):
        for i in range(30):
            versions.found(version(f"d{generation}", f"n{i}"), 100.0)
        for prepare in versions.due(100.0):
            versions.ready(prepare.new, 100.0)
    assert (
        len(versions._served) <= 5 and len(versions._changes) <= 5 and len(versions._retired) <= 5
    )
    assert len(versions._explicit) <= 5 and len(versions._older) <= 5
    assert all(len(older) <= MAX_OLDER for older in versions._older.values())


def test_at_the_bound_a_refusal_gives_way_and_a_change_waits_for_the_next_listing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_CHANGES", 1)
    versions = Versions()
    for name in "ab":
        versions.use(version("d0", name), 0.0)
    versions.found(version("d1", "a"), 1.0)
    versions.found(version("d1", "b"), 1.0)
    [prepare] = versions.due(1.0)
    assert prepare.new.name == "a" and versions.change("b") is None
    versions.failed(prepare.new, BAD, 1.0)
    versions.found(version("d1", "b"), 2.0)
    assert [p.new.name for p in versions.due(2.0)] == ["b"]


def test_only_a_few_changes_are_worked_on_at_once() -> None:
    versions = Versions()
    for i in range(3 * MAX_PREPARING):
        versions.use(version("d0", f"n{i}"), 0.0)
        versions.found(version("d1", f"n{i}"), 1.0)
    assert len(versions.due(1.0)) == MAX_PREPARING and versions.due(1.0) == []


def test_a_listing_of_very_many_names_looks_only_at_those_that_were_served() -> None:
    class Watched(dict[str, StoredAdapter]):
        asked = 0

        def get(self, key: str, default: Any = None) -> Any:
            self.asked += 1
            return super().get(key, default)

        def __iter__(self) -> Any:
            raise AssertionError("the whole listing was walked through")

    listing = Watched({f"n{i}": version("d1", f"n{i}") for i in range(10_000)})
    versions = Versions()
    versions.use(version("d0", "n7"), 0.0)
    versions.listed(listing, 1.0, complete=True)
    assert listing.asked == 1 and [p.new.name for p in versions.due(1.0)] == ["n7"]


# ---- where ---------------------------------------------------------------------------------------


def fleet(**workers: tuple[AdapterState, ...]) -> Fleet:
    found = Fleet(3.0)
    for name, adapters in workers.items():
        found.heartbeat(
            Heartbeat(name, 1, 1, "tiny", WorkerState.SERVING, 8, 4, adapters=adapters), 0.0
        )
        found.attach(name, 1)
    return found


def state(tier: Tier, digest: str = "aaaa", in_flight: int = 0) -> AdapterState:
    return AdapterState("a", digest, tier, in_flight=in_flight)


PREPARE = Prepare(A, B, True)


def where(found: Fleet, prepare: Prepare = PREPARE) -> object:
    match plan(prepare, found.pool("tiny"), Rendezvous()):
        case LoadVersion(workers):
            return sorted(w.id for w in workers)
        case CacheVersion(worker):
            return worker.id
        case other:
            return type(other)


def test_the_new_version_is_loaded_where_the_old_one_is_in_a_slot() -> None:
    assert where(
        fleet(w0=(state(Tier.GPU),), w1=(state(Tier.CPU),), w2=(), w3=(state(Tier.GPU),))
    ) == ["w0", "w3"]


def test_without_a_slot_one_worker_that_has_the_old_one_in_host_memory_loads_it() -> None:
    assert where(fleet(w0=(), w1=(state(Tier.CPU),))) == ["w1"]


def test_where_no_engine_has_the_old_one_its_home_caches_it_if_it_was_served_lately() -> None:
    found = fleet(w0=(), w1=(state(Tier.GPU, "other"),))
    home = Rendezvous().order(("a", "bbbb"), found.pool("tiny"))[0].id
    assert where(found) == home
    assert where(found, Prepare(A, B, False)) is NothingToPrepare
    assert where(fleet()) is NoWorkerServes


def test_requests_in_flight_are_counted_over_all_engines_that_have_it() -> None:
    pool = fleet(
        w0=(state(Tier.GPU),), w1=(state(Tier.CPU),), w2=(AdapterState("a", "aaaa", Tier.REMOTE),)
    ).pool("tiny")
    assert sorted(w.id for w in in_engines(("a", "aaaa"), pool)) == ["w0", "w1"]
    assert in_flight(("a", "aaaa"), pool) == 0 and in_flight(("a", "bbbb"), pool) is None
    assert {v.digest for v in on_workers("a", pool)} == {"aaaa"}


# ---- anything may happen -------------------------------------------------------------------------

NAMES = st.sampled_from("ab")
DIGESTS = st.sampled_from(["d1", "d2", "d3", "bad"])


class VersionMachine(RuleBasedStateMachine):
    """The store changes at any time, and preparations end at any time. The version that answers is
    compared with the rules.
    """

    def __init__(self) -> None:
        super().__init__()
        self.versions = Versions()
        self.store: dict[str, StoredAdapter] = {}
        self.answering: dict[str, StoredAdapter] = {}
        self.preparing: list[Prepare] = []
        self.now = 0.0

    def check(self, name: str, before: StoredAdapter) -> None:
        after = self.versions.current(self.store[name])
        assert after.digest in (before.digest, self.store[name].digest)
        self.answering[name] = after

    @rule(name=NAMES, digest=DIGESTS)
    def the_store_changes(self, name: str, digest: str) -> None:
        self.store[name] = version(digest, name)
        self.versions.listed(self.store, self.now, complete=True)

    @rule(name=NAMES)
    def a_file_goes(self, name: str) -> None:
        self.store.pop(name, None)
        self.answering.pop(name, None)
        self.versions.listed(self.store, self.now, complete=True)

    @rule(name=NAMES)
    def a_request_comes(self, name: str) -> None:
        if name in self.store:
            current = self.versions.current(self.store[name])
            if name in self.answering:
                assert current.digest == self.answering[name].digest, "it changed by itself"
            if current.digest != "bad":
                self.versions.use(current, self.now)
                self.answering[name] = current

    @rule(s=st.floats(0.1, 100))
    def time_goes_on(self, s: float) -> None:
        self.now += s
        self.preparing += self.versions.due(self.now)

    @precondition(lambda self: self.preparing)
    @rule(data=st.data(), ok=st.booleans())
    def a_preparation_ends(self, data: st.DataObject, ok: bool) -> None:
        prepare = self.preparing.pop(data.draw(st.integers(0, len(self.preparing) - 1)))
        name = prepare.new.name
        if prepare.new.digest == "bad":
            self.versions.failed(prepare.new, BAD, self.now)
        elif ok:
            if self.versions.ready(prepare.new, self.now):
                assert prepare.new.digest == self.store[name].digest, (
                    "switched to what the store does not show"
                )
                self.answering[name] = prepare.new
        else:
            self.versions.failed(prepare.new, AdapterNotFound("gone"), self.now)

    @invariant()
    def a_good_version_is_never_replaced_by_a_bad_one(self) -> None:
        for name, answering in self.answering.items():
            assert answering.digest != "bad"
            assert self.versions.current(self.store[name]).digest == answering.digest

    @invariant()
    def what_answers_never_leaves(self) -> None:
        leaving = self.versions.leaving(lambda key: 0, self.now)
        assert not {(a.name, a.digest) for a in self.answering.values()} & set(leaving)


TestVersionMachine = VersionMachine.TestCase
TestVersionMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
