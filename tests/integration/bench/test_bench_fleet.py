"""Shell. `python -m bench.fleet` as a person runs it, small: real gateways and workers with the
simulated engine, one of which is killed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness import ROOT

SMALL = [
    "--engine=sim",
    "--slow=0.2",
    "--adapters=8",
    "--slots=2",
    "--streams=4",
    "--output-tokens=8",
    "--warm=0.5",
    "--seconds=1",
]


def fleet(
    folder: Path, *more: str
) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    argv = [
        sys.executable,
        "-m",
        "bench.fleet",
        *SMALL,
        f"--out={folder}",
        "--name=run",
        f"--work={folder / 'work'}",
        *more,
    ]
    ended = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    file = folder / "run.jsonl"
    return ended, [
        json.loads(line) for line in file.read_text().splitlines()
    ] if file.exists() else []


def test_every_part_yields_its_row_and_a_second_call_only_what_is_missing(tmp_path: Path) -> None:
    ended, made = fleet(tmp_path, "--workers=1,2", "--parts=scale,kill,mixed")
    assert ended.returncode == 0, ended.stderr
    rows = {row["key"]: row for row in made}
    assert set(rows) == {f"scale/{n}/expected-ttft/saturated/0" for n in (1, 2)} | {
        "kill/2/expected-ttft/70%/0",
        "mixed/2/expected-ttft/saturated/0",
    }
    for row in made:
        assert (
            row["figures"]["output_tokens_per_s"] > 0
            and row["gateway"]["us_per_token"] > 0
            and row["commit"]
            and row["versions"]["loraplex"]
        )
        assert row["figures"]["requests"]["failed_before_first_byte"] == 0, row["figures"][
            "requests"
        ]
    assert set(rows["scale/1/expected-ttft/saturated/0"]["figures"]["workers"]) == {"w0"}
    assert set(rows["scale/2/expected-ttft/saturated/0"]["figures"]["workers"]) == {"w0", "w1"}
    # 8 adapters over 4 slots
    assert rows["scale/2/expected-ttft/saturated/0"]["loads"]["count"] > 0
    kill = rows["kill/2/expected-ttft/70%/0"]["kill"]
    assert kill["worker"] == "w1" and kill["failed_before_first_byte"] == 0, kill
    assert kill["worker_serves_again_s"] is not None and kill["noticed_s"] is not None
    mixed = rows["mixed/2/expected-ttft/saturated/0"]["models"]
    assert set(mixed["m"]["workers"]) <= {"w0", "w1"} and set(mixed["pair"]["workers"]) == {"w2"}
    assert (tmp_path / "run.png").stat().st_size > 0 and "| 2 |" in (
        tmp_path / "run.md"
    ).read_text()

    ended, again = fleet(
        tmp_path, "--workers=2", "--parts=scale,policies", "--policies=ray,residency-p2c"
    )
    assert ended.returncode == 0, ended.stderr
    assert again[: len(made)] == made
    assert [row["key"] for row in again[len(made) :]] == [
        f"policies/2/{turn}/0"
        for turn in ("ray/70%", "residency-p2c/70%", "residency-p2c/95%", "ray/95%")
    ]
    assert {row["policy"] for row in again[len(made) :]} == {"ray", "residency-p2c"}


def test_beyond_the_capacity_policies_take_turns_and_predictions_are_told(tmp_path: Path) -> None:
    more = ["--policies=expected-ttft,ray", "--shares=0.5,2", "--timeout=5", "--share-gpu"]
    ended, made = fleet(tmp_path, "--workers=2", "--parts=policies", *more)
    assert ended.returncode == 0, ended.stderr
    assert [row["key"] for row in made] == [
        "scale/2/expected-ttft/saturated/0",
        "policies/2/expected-ttft/50%/0",
        "policies/2/ray/50%/0",
        "policies/2/ray/200%/0",
        "policies/2/expected-ttft/200%/0",
    ]
    assert made[3]["rate_rps"] == made[4]["rate_rps"] == pytest.approx(4 * made[1]["rate_rps"])
    for row in made[1:]:
        assert row["figures"]["ttft"]["max"] <= 5.1
        assert ("expected_over_actual" in row) == (row["policy"] == "expected-ttft"), row["key"]
    assert made[4]["expected_over_actual"]["count"] > 0
    assert "expected/actual" in ended.stdout


def test_rows_for_which_there_is_no_time_are_named_and_left_for_another_call(
    tmp_path: Path,
) -> None:
    ended, made = fleet(tmp_path, "--workers=1", "--parts=scale", "--budget=5")
    assert ended.returncode == 1, ended.stderr
    assert made == [] and "scale/1/expected-ttft/saturated/0" in ended.stdout


def test_a_part_that_does_not_exist_is_refused_with_those_that_do(tmp_path: Path) -> None:
    ended, _ = fleet(tmp_path, "--parts=throughput")
    assert ended.returncode == 2 and "throughput" in ended.stderr and "policies" in ended.stderr
