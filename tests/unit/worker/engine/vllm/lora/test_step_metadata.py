"""Shell. The tokens of a step, by their slots."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.engine.vllm.lora.step_metadata import TokenGroups, most_tiles, slots_of


@given(st.lists(st.integers(-1, 6), min_size=1, max_size=200), st.sampled_from([1, 16, 64]))
def test_each_token_of_an_adapter_is_in_one_tile_of_its_slot(slots: list[int], rows: int) -> None:
    slot_of, rows_of = TokenGroups.of(np.array(slots, np.int32)).tiles(rows)
    found = {
        int(token): int(slot)
        for slot, row in zip(slot_of, rows_of, strict=True)
        for token in row
        if token >= 0
    }
    assert found == {token: slot for token, slot in enumerate(slots) if slot >= 0}
    assert len(slot_of) <= most_tiles(len(slots), 7, rows)
    assert (rows_of >= 0).any(axis=1).all(), "no tile is empty"


def test_there_are_tiles_for_the_worst_mix_of_adapters() -> None:
    """Each adapter may leave a tile that is not full."""
    assert most_tiles(64, 16, 16) >= sum(-(-n // 16) for n in [4] * 16)
    assert most_tiles(3, 16, 16) == 3
    assert most_tiles(17 * 16, 16, 16) >= 16 * 2


def test_an_adapter_without_a_slot_is_an_error_and_no_base_model() -> None:
    assert slots_of([7, 0, 9, 7], [9, None, 7]).tolist() == [2, -1, 0, 2]
    assert slots_of([], [None]).tolist() == []
    for stranger in (8, 1, 99, -1):
        with pytest.raises(KeyError):
            slots_of([7, stranger], [9, None, 7])
