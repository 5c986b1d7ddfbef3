"""What the figures of `bench.steps` mean."""

from __future__ import annotations

import pytest

from bench.steps import FleetLook, StepRun, clairvoyant_s, passes, report

STEPS = (1, 4, 0)
BEGINS_S = [100.0, 110.0, 120.0, 130.0]


def run(*, up_after_s: float = 3.0, down_after_s: float = 1.0) -> StepRun:
    """A look each half second: four workers start with the step and serve after `up_after_s`; all
    are gone after `down_after_s`.
    """
    found = StepRun(begins_s=list(BEGINS_S), ttfts_s=[0.1])
    for n in range(61):
        at_s = 100 + n / 2
        if at_s < 110:
            look = FleetLook(at_s, 1, 1, 1)
        elif at_s < 120:
            look = FleetLook(at_s, 4, 4 if at_s >= 110 + up_after_s else 1, 4)
        else:
            look = FleetLook(at_s, 0, 0, 4 if at_s < 120 + down_after_s else 0)
        found.looks.append(look)
    return found


def test_the_schedule_that_knows_the_load_pays_for_its_steps_and_for_starts_alone() -> None:
    assert clairvoyant_s(STEPS, BEGINS_S, 0.0) == 10 * 1 + 10 * 4
    assert clairvoyant_s(STEPS, BEGINS_S, 2.0) == 10 * 1 + 10 * 4 + 3 * 2.0


def test_every_process_counts_while_it_is_there() -> None:
    assert run().worker_s() == pytest.approx(10 * 1 + 10 * 4 + 4 * 1)
    assert run().first_s(1, 4, "wanted") == 0.0 and run().first_s(1, 4, "serving") == 3.0
    assert run(up_after_s=99).first_s(1, 4, "serving") is None


def test_a_run_passes_only_with_its_capacity_without_failures_and_at_its_price() -> None:
    assert passes(run(), STEPS)
    assert not passes(run(up_after_s=99), STEPS)
    assert not passes(run(down_after_s=3.0), STEPS)
    failed = run()
    failed.failures.append("503")
    assert not passes(failed, STEPS)
    assert any("1 whole streams, 1 failed" in line for line in report(failed, STEPS))
