"""LoRA layers on CPUs, against a plain computation."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from worker.engine.vllm.lora import cpu_lora  # noqa: E402
from worker.engine.vllm.lora.cpu_lora import Rows, add  # noqa: E402

RANK, SCALE = 4, 0.5
SIZES = (6, 3, 5)


def expected(y, x, a, b, slots):  # type: ignore[no-untyped-def]
    """The result, row by row in float64."""
    made = y.double().clone()
    for n, slot in enumerate(slots):
        if slot >= 0:
            own = [
                x[n].double() @ a_[slot, 0].double().t() @ b_[slot, 0].double().t()
                for a_, b_ in zip(a, b, strict=True)
            ]
            made[n] += SCALE * torch.cat(own)
    return made


def layer(slots: int = 4, size_in: int = 8, dtype=None):  # type: ignore[no-untyped-def]
    dtype = dtype or torch.float32
    a = [torch.randn(slots, 1, RANK, size_in).to(dtype) for _ in SIZES]
    b = [torch.randn(slots, 1, size, RANK).to(dtype) for size in SIZES]
    return a, b


@pytest.mark.parametrize("calls_worth", [0, 1 << 40], ids=["by slot", "masked"])
@pytest.mark.parametrize(
    "slots",
    [
        [2],
        [-1],
        [-1, -1],
        [3, 3, 3],
        [0, 1, 2, 3],
        [3, -1, 0, 3, -1, 1],
        [-1] * 5 + [2],
        [1, 0] * 40,
        [n % 5 - 1 for n in range(100)],
    ],
    ids=str,
)
def test_every_row_gets_the_weights_of_its_own_slot_and_base_rows_none(
    slots: list[int], calls_worth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_lora, "CALLS_WORTH", calls_worth)
    torch.manual_seed(len(slots))
    a, b = layer()
    x, y = torch.randn(len(slots), 8), torch.randn(len(slots), sum(SIZES))
    wanted, before = expected(y, x, a, b, slots), y.clone()
    add(y, x, a, b, SCALE, SIZES, Rows(slots))
    assert torch.allclose(y.double(), wanted, atol=1e-4)
    base = [n for n, slot in enumerate(slots) if slot < 0]
    assert torch.equal(y[base], before[base]), "not a bit of a base row may change"


def test_bfloat16_models_get_the_product_with_a_in_float32() -> None:
    torch.manual_seed(1)
    slots = [0, 3, -1, 3]
    a, b = layer(dtype=torch.bfloat16)
    x, y = torch.randn(4, 8).bfloat16(), torch.randn(4, sum(SIZES)).bfloat16()
    wanted = expected(y, x, a, b, slots)
    add(y, x, a, b, SCALE, SIZES, Rows(slots))
    assert y.dtype is torch.bfloat16 and torch.allclose(y.double(), wanted, atol=0.15, rtol=0.05)


def test_a_slot_that_is_written_again_counts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_lora, "CALLS_WORTH", 1 << 40)
    a, b = layer()
    x, rows = torch.randn(2, 8), Rows([1, 2])
    for _ in range(3):
        y = torch.zeros(2, sum(SIZES))
        add(y, x, a, b, SCALE, SIZES, rows)
        assert torch.allclose(y.double(), expected(torch.zeros_like(y), x, a, b, [1, 2]), atol=1e-4)
        with torch.inference_mode():  # as the engine writes them
            for a_, b_ in zip(a, b, strict=True):
                a_[1, 0, :2].copy_(torch.randn(2, 8))
                b_[2] = 0
                b_[2, 0, :, :3].copy_(torch.randn(b_.size(2), 3))
