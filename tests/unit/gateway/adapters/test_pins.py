"""Pins: which adapters are wanted, what workers are told, and how both are shown."""

from __future__ import annotations

import pytest

from gateway.adapters.pins import Pins, PinState, missing_commands
from gateway.adapters.usage import MAX_RECORDS, AdapterUsage
from gateway.admin.adapter_views import STATES, row, state_of
from shared.adapters.identity import AdapterRef, StoredAdapter
from shared.errors import InvalidAdapter, InvalidRequest, Overloaded, TooManyPins
from shared.link.messages import AdapterAction, AdapterState, Tier

EMPTY = PinState()
PINS = Pins("tiny", configured=("a",), preload=("p",), slots=3)


def test_the_config_is_wanted_until_an_operator_says_otherwise_and_only_differences_are_kept() -> (
    None
):
    assert PINS.wanted(EMPTY) == {"a"}
    off = PINS.unpin(EMPTY, "a", None)
    assert off == PinState({}, {"tiny": ("a",)}) and PINS.wanted(off) == set()
    assert PINS.pin(off, "a", None) == EMPTY
    on = PINS.pin(EMPTY, "b", None)
    assert on == PinState({"tiny": {"b": ()}}) and PINS.wanted(on) == {"a", "b"}
    assert PINS.unpin(on, "b", None) == EMPTY
    assert PINS.unpin(EMPTY, "nobody", None) == EMPTY


def test_a_pin_of_one_worker_is_none_of_another() -> None:
    on = PINS.pin(EMPTY, "b", "w0")
    assert PINS.wanted(on, "w0") == {"a", "b"} and PINS.wanted(on, "w1") == PINS.wanted(on) == {"a"}
    both = PINS.pin(on, "b", "w1")
    assert PINS.unpin(both, "b", "w0") == PINS.pin(EMPTY, "b", "w1")
    assert PINS.unpin(both, "b", None) == EMPTY
    assert PINS.pin(EMPTY, "a", "w0") == EMPTY, "it is pinned there already"
    with pytest.raises(InvalidRequest):
        PINS.unpin(EMPTY, "a", "w0")


def test_one_slot_of_every_worker_must_stay() -> None:
    on = PINS.pin(EMPTY, "b", "w0")
    with pytest.raises(TooManyPins, match="2 of a worker's 3 slots"):
        PINS.pin(on, "c", None)
    with pytest.raises(TooManyPins):
        PINS.pin(on, "c", "w0")
    assert PINS.wanted(PINS.pin(on, "c", "w1"), "w1") == {"a", "c"}
    assert PINS.pin(on, "b", None).pinned == {"tiny": {"b": ()}}, (
        "one that is pinned already needs no further slot"
    )


def test_bases_do_not_know_of_one_another() -> None:
    other = Pins("other", slots=2)
    state = other.pin(PINS.pin(EMPTY, "b", None), "b", None)
    assert PINS.unpin(state, "b", None) == PinState({"other": {"b": ()}})


def on(
    name: str, digest: str = "d", tier: Tier = Tier.GPU, pinned: bool = False, loading: bool = False
) -> AdapterState:
    return AdapterState(name, digest, tier, loading, pinned=pinned, rank=8)


def held(*states: AdapterState) -> dict[tuple[str, str], AdapterState]:
    return {(s.name, s.digest): s for s in states}


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([], [(AdapterAction.PIN, ("a", "d")), (AdapterAction.LOAD, ("p", "d"))]),
        ([on("a"), on("p")], [(AdapterAction.PIN, ("a", "d"))]),
        ([on("a", pinned=True), on("p")], []),
        ([on("a", pinned=True), on("p", tier=Tier.CPU)], [(AdapterAction.LOAD, ("p", "d"))]),
        ([on("a", "old", pinned=True), on("p")], [(AdapterAction.PIN, ("a", "d"))]),
        (
            [on("a", pinned=True), on("p"), on("x", pinned=True)],
            [(AdapterAction.UNPIN, ("x", "d"))],
        ),
    ],
)
def test_a_worker_is_told_what_it_lacks_and_an_old_version_stays_pinned_until_the_new_one_is(
    states: list[AdapterState], expected: list[tuple[AdapterAction, tuple[str, str]]]
) -> None:
    assert list(missing_commands({"a": "d"}, {"p": "d"}, held(*states), ())) == expected


def test_what_was_preloaded_once_may_leave_and_what_nobody_knows_is_left_alone() -> None:
    assert list(missing_commands({}, {"p": "d"}, {}, {("p", "d")})) == []
    assert list(missing_commands({"a": None}, {}, held(on("a", pinned=True)), ())) == []


# ---- the table -----------------------------------------------------------------------------------

A = AdapterRef("tiny", "a", "d")
STORED = StoredAdapter("a", "d", ())


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([], "listed"),
        ([on("a", tier=Tier.DISK)], "cached"),
        ([on("a", tier=Tier.CPU)], "warm"),
        ([on("a", tier=Tier.CPU, loading=True)], "loading"),
        ([on("a", tier=Tier.REMOTE, loading=True), on("a")], "loaded"),
        ([on("a"), on("a", pinned=True)], "pinned"),
    ],
)
def test_an_adapter_is_where_it_is_nearest(states: list[AdapterState], expected: str) -> None:
    assert expected in STATES and state_of(STORED, [("w", s) for s in states], None) == expected


def test_what_was_refused_stays_invalid_until_its_content_changes_or_it_works() -> None:
    usage = AdapterUsage()
    usage.used(A, 1000.0)
    usage.failed(A, Overloaded("full"))
    assert usage.get("tiny", "a").reason == ""  # type: ignore[union-attr]
    usage.failed(A, InvalidAdapter("rank 999", "rank"))
    record = usage.get("tiny", "a")
    found = row("tiny", "a", STORED, [], record)
    assert (found["state"], found["code"], found["reason"], found["hits"]) == (
        "invalid",
        "invalid_adapter_rank",
        "rank 999",
        1,
    )
    assert found["last_used"] == "1970-01-01T00:16:40.000+00:00"
    assert state_of(StoredAdapter("a", "d2", ()), [], record) == "listed"
    usage.worked(A)
    assert (
        state_of(STORED, [], record) == "cached"
        and row("tiny", "a", STORED, [], record)["code"] is None
    )


def test_the_memory_of_use_is_bounded_and_forgets_the_longest_unused() -> None:
    usage = AdapterUsage()
    for n in range(MAX_RECORDS + 1):
        usage.used(AdapterRef("tiny", f"a{n}", "d"), float(n))
        usage.used(AdapterRef("tiny", "a0", "d"), float(n))
    assert usage.get("tiny", "a1") is None and usage.get("tiny", "a0") is not None
