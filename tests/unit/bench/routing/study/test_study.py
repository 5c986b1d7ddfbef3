"""The study's runner: what it skips, what it stops, what it says of half a study."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench.routing import __main__ as study
from bench.routing.process_pool import ProcessPool
from bench.routing.study.item import DoneItem, Item, Results, case_of, perform, still_good
from bench.routing.study.plan import CompareQuestion, Plan, capacities, needed, read_plan, rehearse
from bench.routing.study.search import rate_of
from tests.harness import ROOT

COMPARE = {
    "ask": "compare",
    "policies": ["random", "ray-strict"],
    "seeds": 2,
    "workers": 1,
    "adapters": 16,
    "warm_up_s": 0.5,
    "duration_s": 1.5,
    "scenarios": ["fits"],
    "guesses": {"fits": {"random": 30.0, "ray-strict": 30.0}},
}
EVENT = {
    "ask": "event",
    "what": "loss",
    "policies": ["random"],
    "seeds": 1,
    "workers": 2,
    "warm_up_s": 0.5,
    "duration_s": 4,
    "rate_rps": 20,
}
GROW = {
    "ask": "grow",
    "of": "workers",
    "policies": ["random"],
    "seeds": 1,
    "warm_up_s": 0.5,
    "duration_s": 1,
    "points": [{"at": 1}, {"at": 2}],
}
ENDLESS = {**EVENT, "warm_up_s": 5000.0, "rate_rps": 50}


def _plan(folder: Path, *questions: dict[str, Any]) -> Path:
    path = folder / "plan.json"
    path.write_text(json.dumps(questions))
    return path


def _study(folder: Path, plan: Path, *flags: str) -> int:
    return study.main(["--plan", str(plan), "--out", str(folder), "--jobs", "2", *flags])


def _rows(folder: Path) -> list[DoneItem]:
    return study.read([folder / study.ITEMS])


def _here(plan: Plan) -> Results:
    """All of a plan, in this process."""
    results = Results()
    for question in plan:
        while batch := list(needed(question, results)):
            for item in batch:
                results.add(item, perform(item))
    return results


def test_a_study_runs_to_its_end_and_a_second_call_finds_nothing_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = _plan(tmp_path, COMPARE, EVENT, GROW)
    assert _study(tmp_path, plan) == 0
    rows = _rows(tmp_path)
    assert len({row.item for row in rows}) == len(rows)
    assert {row.item.kind for row in rows} == {"keeps", "figures", "bound", "loss"}
    assert _study(tmp_path, plan) == 0
    assert len(_rows(tmp_path)) == len(rows)
    assert "nothing is left" in capsys.readouterr().out


def test_processes_and_order_do_not_touch_the_results(tmp_path: Path) -> None:
    plan = _plan(tmp_path, COMPARE)
    assert _study(tmp_path, plan) == 0
    spread_out, here = Results(_rows(tmp_path)), _here(read_plan(plan.read_bytes()))
    compare = read_plan(plan.read_bytes())[0]
    for policy in compare.policies:
        searched = compare.item("keeps", policy, "fits", 0)
        assert capacities(searched, 2, spread_out) == capacities(searched, 2, here) != []
    runs = [row for row in _rows(tmp_path) if row.item.kind == "figures"]
    assert runs and all(here.get(row.item) == row.result for row in runs)


def test_what_is_known_from_elsewhere_is_not_run_again(tmp_path: Path) -> None:
    plan = _plan(tmp_path, COMPARE)
    (tmp_path / "there").mkdir()
    assert _study(tmp_path / "there", plan) == 0
    assert _study(tmp_path / "here", plan, "--have", str(tmp_path / "there" / study.ITEMS)) == 0
    assert _rows(tmp_path / "here") == []


def test_the_deadline_kills_what_runs_and_keeps_what_has_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = _plan(tmp_path, GROW, ENDLESS)
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Item, "estimate_s", 0.001)  # so that it is begun
        assert _study(tmp_path, plan, "--seconds", "6") == 1
    assert time.monotonic() - began < 60
    assert {row.item.kind for row in _rows(tmp_path)} == {"figures"}
    said = capsys.readouterr().out
    assert "1 killed" in said
    assert "event loss" in said.split("killed")[1]


def test_a_run_that_cannot_end_before_the_deadline_is_not_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    assert _study(tmp_path, _plan(tmp_path, ENDLESS), "--seconds", "30") == 1
    assert time.monotonic() - began < 25
    assert "0 killed" in capsys.readouterr().out


def test_a_line_that_was_cut_off_is_run_again(tmp_path: Path) -> None:
    plan = _plan(tmp_path, GROW)
    assert _study(tmp_path, plan) == 0
    file = tmp_path / study.ITEMS
    whole = _rows(tmp_path)
    file.write_bytes(file.read_bytes()[:-20])
    assert _study(tmp_path, plan) == 0
    assert {row.item for row in _rows(tmp_path)} == {row.item for row in whole}


def test_a_line_that_is_none_of_ours_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / study.ITEMS).write_text('{"item": 3}\n')
    assert _study(tmp_path, _plan(tmp_path, GROW)) == 2
    assert f"{study.ITEMS}, line 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [{**GROW, "of": "tenants"}, {**GROW, "sedes": 3}, {"ask": "everything"}]
)
def test_a_plan_that_makes_no_sense_is_refused(
    wrong: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _study(tmp_path, _plan(tmp_path, wrong)) == 2
    assert "$[0]" in capsys.readouterr().err


def test_a_run_that_fails_is_told_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = _plan(tmp_path, {**EVENT, "policies": ["oracle"]}, GROW)
    assert _study(tmp_path, plan) == 3
    assert "oracle" in capsys.readouterr().err
    assert len(_rows(tmp_path)) == 2


def test_a_report_of_half_a_study_has_what_there_is_and_says_what_is_missing(
    tmp_path: Path,
) -> None:
    whole = _plan(tmp_path, COMPARE, EVENT, {**GROW, "points": [{"at": 1}, {"at": 2}, {"at": 3}]})
    half = tmp_path / "half"
    half.mkdir()
    assert _study(half, _plan(half, {**COMPARE, "policies": ["random"]}, GROW)) == 0
    assert _study(half, whole, "--report", str(half / "made")) == 0
    document = json.loads((half / "made.json").read_text())
    fits = document["fleets"]["1 workers"]
    assert fits["policies"]["random"]["capacity_rps"]["median"] > 0
    assert fits["policies"]["random"]["ttft_p99_s"] is None, (
        "the common rate needs the capacity of the other policy"
    )
    assert document["growth"]["workers"]["points"] == [1, 2]
    assert document["events"] == {}
    words = (half / "made.md").read_text()
    for question, missing in zip(
        ("compare fits", "event loss", "growth in workers"), document["missing"], strict=True
    ):
        assert missing.startswith(question)
        assert f"- missing: {missing}" in words
    assert "ray-strict" in document["missing"][0]


def test_a_report_of_a_whole_study_has_the_format_of_a_simulation_and_pictures(
    tmp_path: Path,
) -> None:
    plan = _plan(tmp_path, COMPARE, EVENT, GROW)
    assert _study(tmp_path, plan) == 0
    assert _study(tmp_path, plan, "--report", str(tmp_path / "made")) == 0
    document = json.loads((tmp_path / "made.json").read_text())
    assert document["missing"] == []
    fits = document["fleets"]["1 workers"]
    assert fits["rate_rps"] > 0
    assert list(fits["policies"]) == ["random", "ray-strict", "clairvoyant"]
    for figures in fits["policies"].values():
        assert set(figures) == {
            "capacity_rps",
            "ttft_p50_s",
            "ttft_p99_s",
            "loads_per_request",
            "hit_rate",
            "jain",
        }
        assert all(set(of) == {"median", "min", "max"} for of in figures.values())
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "made-fleets.png",
        "made-loss.png",
        "made-growth-workers.png",
    }


def _row(policy: str, code: str, at: float, rate: float = 1.0) -> DoneItem:
    return DoneItem(Item("keeps", policy, "fits", 0, rate), True, 1.0, at, code)


def test_only_policies_that_are_to_be_redone_lose_what_older_code_made() -> None:
    rows = [_row("ray", "old", 1.0), _row("random", "old", 1.0), _row("ray", "new", 2.0, 2.0)]
    assert still_good(rows, []) == rows
    assert still_good(rows, ["ray"], "new") == rows[1:]
    assert still_good(rows, ["ray"], "newest") == [rows[1]]
    assert still_good(rows, ["ray", "random"]) == rows[1:], (
        "a report takes the newest that there is"
    )


def test_the_later_of_two_results_for_one_run_holds() -> None:
    item = Item("keeps", "ray", "fits", 0, rate_of(100))
    results = Results([DoneItem(item, False, 1.0, 2.0, ""), DoneItem(item, True, 1.0, 1.0, "")])
    assert results.get(item) is False
    assert dict(results.tried(Item("keeps", "ray", "fits", 0))) == {100: False}


def test_the_plan_in_the_repository_covers_what_the_documentation_shows() -> None:
    plan = read_plan(study.PLAN.read_bytes())
    scenarios = {
        name
        for q in plan
        if isinstance(q, CompareQuestion) and q.workers == 8 and q.seeds >= 10
        for name in q.scenarios
    }
    assert scenarios == {"default", "fits", "hot", "flat", "flash", "lengths"}
    left = rehearse(plan, Results())
    assert all(left)
    assert max(item.estimate_s for runs in left for item in runs) < 200, (
        "a part of eight minutes must be able to end any run"
    )
    assert (
        min(
            item.rate_rps * item.duration_s
            for runs in left
            for item in runs
            if item.kind == "keeps"
        )
        >= 2_800
    ), "a p99 of fewer says little"


def test_items_survive_json() -> None:
    row = _row("ray", "x", 1.25, rate_of(233))
    assert msgspec.json.decode(msgspec.json.encode(row), type=DoneItem) == row


@pytest.mark.parametrize("ask", [COMPARE, EVENT, GROW])
def test_a_question_about_other_loads_asks_other_runs(ask: dict[str, Any]) -> None:
    usual, own = (read_plan(json.dumps([ask | more]).encode()) for more in ({}, {"loads": "own"}))
    runs = rehearse(own, Results())[0]
    assert runs and all(run.loads == "own" and "own loads" in run.name for run in runs)
    assert not {*runs} & {*rehearse(usual, Results())[0]}
    assert case_of(runs[0]).loads == "own"


def test_one_comparison_needs_no_plan_and_reports_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--out", str(tmp_path), "--jobs", "2", "--seeds", "1", "--workers", "1"]
    flags += ["--compare", "residency-p2c,expected-ttft", "--scenario", "fits"]
    assert study.main([*flags, "--report", str(tmp_path / "made")]) == 0
    document = json.loads((tmp_path / "made.json").read_text())
    made = document["fleets"]["1 workers"]["policies"]
    assert list(made) == ["residency-p2c", "expected-ttft", "clairvoyant"]
    assert all(of["ttft_p99_s"]["median"] > 0 for of in made.values())
    assert "residency-p2c" in capsys.readouterr().out


def test_a_comparison_with_a_policy_that_does_not_exist_names_those_that_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        study.main(["--compare", "ray,oracle"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "oracle: there are" in said and "expected-ttft" in said


# ---- the processes -------------------------------------------------------------------------------


def _die(job: int) -> int:
    if job:
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


def test_a_process_that_dies_is_told_and_replaced() -> None:
    with ProcessPool(_die, 1) as pool:
        pool.start(1)
        (end,) = pool.ended(time.monotonic() + 60)
        assert "-9" in end.error and end.job == 1
        pool.start(0)
        (end,) = pool.ended(time.monotonic() + 60)
        assert not end.error and end.result != os.getpid()


ORPHAN = """
import sys, time
from bench.routing.process_pool import ProcessPool
from tests.unit.bench.routing.study.test_study import _tell_and_stay
if __name__ == "__main__":
    with ProcessPool(_tell_and_stay, 1) as pool:
        pool.start(sys.argv[1])
        next(pool.ended(time.monotonic() + 60))
"""


def _tell_and_stay(told: str) -> None:
    with open(told, "w") as f:
        f.write(str(os.getpid()))
    signal.pause()


def test_a_long_job_does_not_outlive_a_parent_that_is_killed(tmp_path: Path) -> None:
    told = tmp_path / "told"
    os.mkfifo(told)
    (tmp_path / "parent.py").write_text(ORPHAN)
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py", told], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    watch = os.pidfd_open(int(told.read_text()))
    parent.kill()
    parent.wait(10)
    assert select.select([watch], [], [], 10)[0], "the child still runs"
