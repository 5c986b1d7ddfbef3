"""From runs to figures, capacities, documents: what `python -m bench.routing.simulate` says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.routing import simulate
from bench.routing.sim import study
from bench.routing.sim.figures import RANKS, fair_shares, jain, spread
from bench.routing.sim.report import MAIN
from bench.routing.sim.scenarios import SCENARIOS, Window
from bench.routing.sim.search import highest, keeps
from bench.routing.sim.study import Case
from bench.routing.sim.world import World

SHORT = Window(1.0, 3.0)


def _here(job: Callable[..., Any], arguments: Any) -> list[Any]:
    return [job(*each) for each in arguments]


@given(st.floats(1.0, 2000.0), st.floats(1.0, 500.0), st.sampled_from([1.08, 1.3, 2.0]))
def test_bisection_finds_the_highest_rate_that_passes_wherever_it_starts(
    limit: float, guess: float, stride: float
) -> None:
    found = highest(lambda rate: rate <= limit * 1.0001, guess, stride=stride)
    assert limit / 1.0201 <= found <= limit * 1.0001, "rates have five digits"


def test_a_promise_that_no_rate_keeps_has_capacity_zero() -> None:
    assert highest(lambda rate: False, 50.0, stride=1.3) == 0.0


def test_a_rate_keeps_its_promise_below_the_capacity_and_breaks_it_far_above() -> None:
    world = World("round-robin", 2, 100, 0)
    assert keeps(world, SCENARIOS["fits"], 5.0, SHORT, 0.5)
    assert not keeps(world, SCENARIOS["fits"], 400.0, SHORT, 0.5)


@given(st.lists(st.floats(0.1, 100.0), min_size=1, max_size=20))
def test_jain_is_one_for_equals_and_never_below_one_over_n(values: list[float]) -> None:
    assert jain([3.0] * len(values)) == pytest.approx(1.0)
    assert 1 / len(values) - 1e-9 <= jain(values) <= 1 + 1e-9


def test_jain_of_one_who_gets_everything_is_one_over_n() -> None:
    assert jain([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert jain([]) == 1.0


def test_fair_shares_give_the_modest_what_they_want_and_the_rest_alike() -> None:
    assert fair_shares({1: 10.0, 2: 2.0, 3: 10.0}, 12.0) == {2: 2.0, 1: 5.0, 3: 5.0}
    assert fair_shares({1: 1.0, 2: 2.0}, 12.0) == {1: 1.0, 2: 2.0}


def test_a_spread_is_the_median_and_the_extremes() -> None:
    made = spread([3.0, 1.0, 2.0, 9.0])
    assert (made.median, made.min, made.max) == (2.5, 1.0, 9.0)


def test_capacities_come_one_per_seed_in_the_order_of_the_policies() -> None:
    cases = [Case(policy, SCENARIOS["fits"], 0, 2, SHORT) for policy in ("random", "residency-p2c")]
    found = study.capacities(cases, 2, 0.5, _here)
    assert list(found) == ["random", "residency-p2c"]
    assert [len(values) for values in found.values()] == [2, 2]
    assert found["residency-p2c"][0] == pytest.approx(
        study.capacity(cases[1], 60.0, 1.3, 0.5), rel=0.05
    )


def test_growth_keeps_the_load_per_worker_and_stops_adding_adapters_at_the_most() -> None:
    def only(job: Callable[..., Any], arguments: Any) -> list[Any]:
        seen.extend(arguments)
        return [(None, None)] * len(arguments)

    seen: list[tuple[Case, float]] = []
    made = study.grow([Case("random", SCENARIOS["default"], 0)], "workers", 1, 80.0, only)
    assert made.rates_rps == tuple(10.0 * workers for workers in made.points)
    assert made.adapters == tuple(min(10_000, 125 * workers) for workers in made.points)
    assert all(rate * case.window.end_s <= study.MOST_REQUESTS * 1.001 for case, rate in seen)


def test_the_command_writes_the_document_and_the_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, picture = tmp_path / "made.json", tmp_path / "made.png"
    flags = [
        "--scenario",
        "fits",
        "--adapters",
        "20",
        "--workers",
        "2",
        "--seeds",
        "2",
        "--duration",
        "2",
        "--jobs",
        "1",
    ]
    status = simulate.main(
        [
            *flags,
            "--policies",
            "random,residency-p2c,clairvoyant",
            "--json",
            str(made),
            "--plot",
            str(picture),
        ]
    )
    assert status == 0
    document = json.loads(made.read_text())
    assert document["rate_rps"] == pytest.approx(
        0.75 * document["policies"]["residency-p2c"]["capacity_rps"]["median"]
    )
    assert list(document["policies"]) == ["random", "residency-p2c", "clairvoyant"]
    for figures in document["policies"].values():
        assert tuple(figures) == MAIN
        assert all(set(of) == {"median", "min", "max"} for of in figures.values())
    assert document["scenario"]["workers"] == 2
    assert document["command"][:3] == ["python", "-m", "bench.routing.simulate"]
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "residency-p2c" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more", [["--events", "loss"], ["--events", "scale"], ["--overload", "2", "--no-capacity"]]
)
def test_events_and_overload_are_reported(
    more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "made.json"
    flags = [
        "--scenario",
        "fits",
        "--workers",
        "4",
        "--seeds",
        "1",
        "--duration",
        "6",
        "--rate",
        "40",
        "--jobs",
        "1",
    ]
    assert (
        simulate.main(
            [
                *flags,
                "--policies",
                "residency-p2c",
                *more,
                "--json",
                str(made),
                "--plot",
                str(tmp_path / "made.png"),
            ]
        )
        == 0
    )
    document = json.loads(made.read_text())
    if "--events" in more:
        assert document["event"]["what"] == more[1]
        assert len(document["event"]["policies"]["residency-p2c"]) == 3
    else:
        assert (
            0.5
            < document["overload"]["residency-p2c"]["offered"]["2"]["completed_over_capacity"][
                "median"
            ]
            < 3.0
        )


def test_who_waits_is_shown_by_popularity(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "made.json"
    flags = [
        "--workers",
        "1",
        "--seeds",
        "2",
        "--duration",
        "20",
        "--rate",
        "40",
        "--jobs",
        "1",
        "--policies",
        "expected-ttft",
        "--by-rank",
    ]
    assert simulate.main([*flags, "--json", str(made)]) == 0
    waits = json.loads(made.read_text())["waits"]["policies"]["expected-ttft"]
    assert len(waits["by_rank"]) == len(RANKS) + 1
    assert waits["by_rank"][0] < waits["mean_s"] < waits["by_rank"][-1], (
        "one worker of 16 slots is too few for 1,000 adapters"
    )
    assert waits["p50_s"] < waits["p90_s"] < waits["p99_s"]
    assert "513-" in capsys.readouterr().out
    assert simulate.main([*flags[:6], "--by-rank"]) == 2
    assert "--rate" in capsys.readouterr().err


def test_a_policy_that_does_not_exist_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate.main(["--policies", "ray,oracle"]) == 2
    assert "oracle" in capsys.readouterr().err
