"""Shell. `per_unit`: pytest-benchmark's fixture, with what one call handles beside the time of the
call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import pytest

PerUnit: TypeAlias = Callable[[Callable[[], object], int, str], None]


@pytest.fixture
def per_unit(benchmark: Any) -> PerUnit:
    """Times a call that handles `units` of `unit`; the saved JSON has the least microseconds per
    unit in `extra_info`.
    """

    def run(call: Callable[[], object], units: int, unit: str) -> None:
        benchmark(call)
        # None where benchmarks are off, as in the test run: then each call is made once
        if benchmark.stats is not None:
            benchmark.extra_info[f"us_per_{unit}"] = round(
                benchmark.stats.stats.min * 1e6 / units, 3
            )

    return run
