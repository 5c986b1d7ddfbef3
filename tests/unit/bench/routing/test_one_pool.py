"""The capacity with all slots as one pool."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.routing import one_pool
from bench.routing.one_pool import Loads, capacity, stay_s
from bench.routing.sim.scenarios import SCENARIOS
from bench.routing.sim.timing import Timing, timing_of

FEW, MANY = Loads(0.03, 0.2), Loads(0.15, 0.2)


def test_a_stay_grows_with_the_batch_and_with_the_loads_and_has_an_end() -> None:
    timing = Timing()
    alone = stay_s(0.001, 8, Loads(0.0, 0.0), timing)
    assert alone == pytest.approx(128 * timing.step_s(1), rel=0.01)
    some, more = stay_s(100.0, 8, FEW, timing), stay_s(100.0, 8, MANY, timing)
    assert alone is not None and some is not None and more is not None and alone < some < more
    assert stay_s(8 * 100.0, 8, FEW, timing) is None


def test_fewer_loads_and_more_popular_adapters_let_one_pool_reach_more() -> None:
    default = SCENARIOS["default"]
    few, many = (capacity(default, 8, loads, Timing(), 120.0, seeds=1) for loads in (FEW, MANY))
    assert 100.0 < many < few < capacity(SCENARIOS["hot"], 8, FEW, Timing(), 300.0, seeds=1)
    assert many < capacity(default, 8, MANY, timing_of("own"), 120.0, seeds=1)


def test_what_is_no_report_is_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.json").write_text("{}")
    assert one_pool.main([str(tmp_path / "r.json")]) == 2
    assert "bench.routing --report" in capsys.readouterr().err
