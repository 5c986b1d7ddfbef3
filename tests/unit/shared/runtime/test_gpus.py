"""Which GPUs are ours, by the names that CUDA_VISIBLE_DEVICES gives them."""

from __future__ import annotations

import pytest

from shared.runtime.process import count_gpus, visible_gpus


@pytest.mark.parametrize(
    ("variable", "names"),
    [
        ("", []),
        ("-1", []),
        ("0", ["0"]),
        ("2, 5", ["2", "5"]),
        ("GPU-3f,MIG-9", ["GPU-3f", "MIG-9"]),
        ("1,-1,2", ["1"]),
        ("1,1,2", ["1", "2"]),
        ("NoDevFiles", []),
        (" 0 ,, 1", ["0"]),
        ("MIG-GPU-3f2b-aa/1/0, MIG-9c-1", ["MIG-GPU-3f2b-aa/1/0", "MIG-9c-1"]),
    ],
)
def test_the_devices_that_cuda_would_show_keep_their_names(
    variable: str, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert visible_gpus() == names and count_gpus() == len(names)
