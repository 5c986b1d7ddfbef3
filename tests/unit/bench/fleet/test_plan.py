"""Which rows a fleet run measures, and which it has already."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bench.fleet.plan import (
    OURS,
    PARTS,
    POLICIES,
    FleetRow,
    FleetTimes,
    fit,
    gateways,
    rows,
    seconds,
    with_capacity,
)

TIMES = FleetTimes(
    warm_s=6, measure_s=12, tail_s=4, flush_s=4, serve_again_s=200, least_measure_s=8
)


def test_policies_take_turns_at_each_load_and_each_goes_first_as_often() -> None:
    made = rows(["policies"], [2, 8, 4], ["a", "b"], 2)
    assert {row.workers for row in made} == {8}
    turns = [("a", 0.70), ("b", 0.70), ("b", 0.95), ("a", 0.95)]
    others = [("b", 0.70), ("a", 0.70), ("a", 0.95), ("b", 0.95)]
    assert [(r.policy, r.share) for r in made] == turns + others
    assert [first for _, first in gateways(made)] == 2 * [True, True, False, True]
    assert len({row.key for row in made}) == len(made)


def test_other_shares_of_the_capacity_can_be_asked_for() -> None:
    made = rows(["policies"], [2], ["a"], 1, shares=[0.7, 2.0])
    assert [row.key for row in made] == ["policies/2/a/70%/0", "policies/2/a/200%/0"]


def test_scaling_goes_from_the_smallest_fleet_to_the_largest() -> None:
    assert [row.workers for row in rows(["scale"], [8, 2, 4], POLICIES, 1)] == [2, 4, 8]
    assert [row.key for row in rows(["base"], [4, 2], POLICIES, 1)] == [
        "base/2/expected-ttft/saturated/0",
        "base/4/expected-ttft/saturated/0",
    ]


def test_a_share_of_an_unknown_capacity_has_its_measurement_before_it() -> None:
    wanted = rows(["kill"], [2, 4], POLICIES, 1)
    assert with_capacity(wanted, set()) == [FleetRow("scale", 4), *wanted]
    assert with_capacity(wanted, {FleetRow("scale", 4).key}) == wanted


def test_what_is_done_is_not_done_again() -> None:
    wanted = rows(PARTS, [2, 4], POLICIES, 1)
    assert with_capacity(wanted, {row.key for row in wanted}) == []


def test_two_shares_of_one_policy_share_their_gateway_and_a_repetition_starts_anew() -> None:
    made = rows(["scale", "policies", "kill"], [2, 4], [OURS], 2)
    assert [first for _, first in gateways(made)] == [True, True, True, False, True, False, True]


def test_given_rates_take_the_place_of_shares_and_need_no_capacity() -> None:
    made = rows(["policies", "kill"], [2, 4], ["a", "b"], 1, [8.0, 10.5])
    assert [(r.policy, r.share, r.rps) for r in made[:4]] == [
        ("a", None, 8.0),
        ("b", None, 8.0),
        ("b", None, 10.5),
        ("a", None, 10.5),
    ]
    assert [first for _, first in gateways(made)] == [True, True, False, True, True]
    assert made[3].key == "policies/4/a/10.5rps/0" and made[4].rps == 8.0
    assert with_capacity(made, set()) == made


def test_without_a_budget_everything_is_run() -> None:
    wanted = rows(PARTS, [2, 4, 8], POLICIES, 3)
    assert fit(wanted, TIMES, None).rows == tuple(wanted)


def test_throughput_and_policies_of_eight_gpus_fit_into_what_560_s_leave_after_boot() -> None:
    plan = fit(rows(["scale", "policies"], [2, 4, 8], POLICIES, 1), TIMES, 560 - 190 - 30 - 10)
    assert not plan.left_out and plan.times.measure_s == TIMES.measure_s


def test_the_base_model_and_a_killed_worker_fit_into_another_call() -> None:
    plan = fit(rows(["base", "kill"], [2, 4, 8], POLICIES, 1), TIMES, 560 - 190 - 30 - 10)
    assert not plan.left_out and plan.times.measure_s == TIMES.measure_s


def test_a_part_that_cannot_fit_does_not_shorten_those_that_do() -> None:
    plan = fit(rows(["scale", "policies", "kill"], [2, 4, 8], POLICIES, 1), TIMES, 330)
    assert [row.part for row in plan.left_out] == [
        "kill"
    ] and plan.times.measure_s == TIMES.measure_s


def test_repetitions_go_before_measured_time() -> None:
    once = rows(["policies"], [2], POLICIES, 1)
    plan = fit(rows(["policies"], [2], POLICIES, 3), TIMES, seconds(once, TIMES) + 1)
    assert (
        plan.rows == tuple(once)
        and plan.times.measure_s == TIMES.measure_s
        and len(plan.left_out) == 2 * len(once)
    )


@given(st.floats(0, 3000), st.integers(1, 4))
def test_a_plan_never_takes_longer_than_there_is_and_forgets_no_row(
    left_s: float, repetitions: int
) -> None:
    wanted = rows(PARTS, [2, 4, 8], POLICIES, repetitions)
    plan = fit(wanted, TIMES, left_s)
    assert seconds(plan.rows, plan.times) <= left_s + 1e-6
    assert sorted(row.key for row in (*plan.rows, *plan.left_out)) == sorted(
        row.key for row in wanted
    )
    assert TIMES.least_measure_s <= plan.times.measure_s <= TIMES.measure_s
