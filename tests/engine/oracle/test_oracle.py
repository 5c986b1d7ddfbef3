"""What is served is what PEFT says, module by module; `make oracle` does it for all bases."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.runtime.children import Zygote
from tests.engine.oracle.matrix import EVERY, judge

SHORT = ("Llama", "Llama 4")
LONG = ("Qwen3", "Qwen3 MoE")


@pytest.mark.parametrize("name", [*SHORT, *(pytest.param(n, marks=pytest.mark.long) for n in LONG)])
async def test_every_module_is_served_as_peft_says_or_refused_for_a_known_reason(
    name: str, tmp_path: Path, zygote: Zygote
) -> None:
    for module, verdict in (await judge(name, tmp_path, zygote)).items():
        wanted = "refused: invalid_adapter_module" if module in EVERY[name].refused else "right"
        assert verdict == wanted, module
