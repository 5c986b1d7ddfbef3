"""Moving averages."""

from __future__ import annotations

import pytest

from shared.averages import blend


def test_the_first_measurement_counts_in_full_and_later_ones_by_their_weight() -> None:
    first = blend(0.0, 8.0, 0.25)
    assert first == 8.0
    assert blend(first, 4.0, 0.25) == pytest.approx(7.0)
