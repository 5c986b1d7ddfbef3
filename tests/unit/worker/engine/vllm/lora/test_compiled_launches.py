"""Shell. A launch finds its compiled program again. Triton, which compiles for a GPU alone, is
played here: it notes its launches, and what each compiled program is launched with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from worker.engine.vllm.lora import tile_kernel
from worker.engine.vllm.lora.step_metadata import SMALL_ROWS, most_tiles

HIDDEN, RANK, SLOTS, COLUMNS = 64, 16, 2, (32, 16)


class Played:
    """`launches` are Triton's own, `again` those of a program that it has compiled."""

    arg_names = tile_kernel._lora_linear.arg_names

    def __init__(self) -> None:
        self.launches: list[tuple[Any, dict[str, Any]]] = []
        self.again: list[tuple[Any, tuple[Any, ...], int]] = []

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*tensors: Any, **named: Any) -> Any:
            names = self.arg_names[: len(tensors)]
            self.launches.append((grid, dict(zip(names, tensors, strict=True)) | named))
            return _Program(self.again, len(self.launches) - 1)

        return launch


class _Program:
    def __init__(self, again: list[Any], number: int) -> None:
        self._again, self._number = again, number

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *values: self._again.append((grid, values, self._number))


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[Played]:
    played = Played()
    monkeypatch.setattr(tile_kernel, "_lora_linear", played)
    monkeypatch.setattr(tile_kernel, "_compiled", {})
    yield played


def launch(
    tokens: int = 40, shift: int = 0, stride: int = 48, dtype: Any = torch.bfloat16, **how: Any
) -> None:
    """x begins `shift` values behind an aligned address."""
    most = most_tiles(tokens, SLOTS, SMALL_ROWS)
    x = torch.zeros(tokens * HIDDEN + shift, dtype=dtype)[shift:].view(tokens, HIDDEN)
    tile_kernel.add_lora(
        torch.zeros(tokens, stride, dtype=dtype)[:, : sum(COLUMNS)],
        x,
        tuple(torch.zeros(SLOTS, 1, RANK, HIDDEN, dtype=dtype) for _ in COLUMNS),
        tuple(torch.zeros(SLOTS, 1, n, RANK, dtype=dtype) for n in COLUMNS),
        [torch.zeros(most).int(), torch.zeros(most, SMALL_ROWS).int()],
        torch.ones(SLOTS).int(),
        tile_kernel.TileScratch.make(tokens, SLOTS, len(COLUMNS), RANK, "cpu"),
        **how,
    )


def test_a_second_launch_has_the_values_of_the_first_in_the_order_of_the_kernel(
    triton: Played,
) -> None:
    launch()
    launch()
    ((grid, named),) = triton.launches
    ((again, values, _),) = triton.again
    assert again == grid and len(values) == len(triton.arg_names)
    for name, value in zip(triton.arg_names, values, strict=True):
        first = named[name]
        tensors = isinstance(first, torch.Tensor) or name in ("a", "b")
        assert tensors or value == first, name


@pytest.mark.parametrize(
    "other",
    [{"shift": 1}, {"stride": 49}, {"dtype": torch.float16}, {"tokens": 400}, {"num_stages": 2}],
    ids=str,
)
def test_what_triton_compiles_another_program_for_is_another_launch(
    triton: Played, other: dict[str, Any]
) -> None:
    launch()
    launch(**other)
    assert len(triton.launches) == 2 and not triton.again
    launch()
    assert triton.again[0][2] == 0, "and does not take the place of the first"


def test_a_launch_with_options_of_its_own_is_not_kept(triton: Played) -> None:
    launch(num_stages=2)
    launch(splits=2)
    launch()
    assert len(triton.launches) == 3 and not triton.again
