"""The ablation of the default policy: what it changes, and what its table says."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.routing import ablate
from bench.routing.ablate import AS_IT_IS, CHANGES, Change, Kept, Run, made, ratio_of, ratios, work


@pytest.mark.parametrize("change", CHANGES, ids=[change.name for change in CHANGES])
def test_a_change_changes_something_and_is_undone(change: Change) -> None:
    before = getattr(change.owner, change.attribute)
    with made(change):
        assert getattr(change.owner, change.attribute) is change.value
        assert change.value != before
    assert getattr(change.owner, change.attribute) is before


@pytest.mark.parametrize("change", CHANGES, ids=[change.name for change in CHANGES])
def test_a_changed_policy_still_serves(change: Change) -> None:
    mean_s, _, _ = ablate.figures(Run("default", "own", 1.0, 1, change.name), 4.0)
    assert mean_s < 1.0


def test_an_interval_that_holds_one_is_not_sure() -> None:
    assert not ratio_of([(1.3, 1.0), (0.8, 1.0), (1.1, 1.0)]).sure
    assert ratio_of([(1.3, 1.0), (1.31, 1.0), (1.29, 1.0)]).sure


def test_a_second_call_goes_on_where_the_first_one_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Run] = []

    def figures(run: Run, rate_rps: float) -> tuple[float, float, float]:
        asked.append(run)
        return (0.1 * run.seed, 0.1, 0.2)

    monkeypatch.setattr(ablate, "figures", figures)
    monkeypatch.setattr(ablate, "capacity_rps", lambda run: 10.0)
    path = tmp_path / "runs.jsonl"
    runs = [Run("default", "own", 1.4, seed, AS_IT_IS) for seed in (1, 2, 3)]
    assert work(Kept(path), runs[:2], 1e18) == 0
    with path.open("a") as file:
        file.write('{"run": {"scen')  # a call that was killed
    again = Kept(path)
    assert work(again, runs, 1e18) == 0 and asked == runs
    assert set(Kept(path).found) == {*runs, Run("default", "own", 0.0, 0, AS_IT_IS)}
    assert ratios(again, "default", "own", 1.4, AS_IT_IS)[0].mean == pytest.approx(1.0)
