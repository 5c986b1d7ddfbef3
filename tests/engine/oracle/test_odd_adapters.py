"""Adapters of kinds that people have are served as PEFT says, or refused with a code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shared.adapters.base_layers import shapes_from_config
from shared.adapters.checks import AdapterFacts
from shared.adapters.identity import CONFIG_FILE
from shared.errors import InvalidAdapter
from shared.runtime.children import Zygote
from tests.engine.oracle.bases import BASES, make_base
from tests.engine.oracle.matrix import MAX_RANK, oracle
from tests.engine.oracle.odd import PLAIN, RIGHT, VERDICTS, make_odd_adapters
from worker.validation.validator import Validator

LLAMA = BASES["Llama"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    make_odd_adapters(LLAMA, make_base(LLAMA, folder / "base"), folder / "store")
    return folder


def test_each_kind_is_accepted_or_refused_with_its_code(made: Path) -> None:
    config = json.loads((made / "base" / "config.json").read_text())
    validator = Validator(shapes_from_config(config), MAX_RANK, base=made / "base")
    found: dict[str, str] = {}
    for name in VERDICTS:
        try:
            assert isinstance(validator.check(made / "store" / name), AdapterFacts)
            found[name] = RIGHT
        except InvalidAdapter as exc:
            found[name] = f"refused: {exc.code}"
            assert len(exc.message) > 20 and str(made) not in exc.message, exc.message
    assert found == VERDICTS


@pytest.mark.long
async def test_each_accepted_kind_is_served_as_peft_says(
    made: Path, tmp_path: Path, zygote: Zygote
) -> None:
    async with oracle(LLAMA, made / "base", made / "store", tmp_path, zygote) as found:
        for name in (name for name, verdict in VERDICTS.items() if verdict == RIGHT):
            # PEFT reads no shards; these have the tensors of the plain adapter
            reference = made / "store" / (PLAIN if name == "shards" else name)
            assert (reference / CONFIG_FILE).exists()
            assert await found.verdict(name, reference, prompts_asked=1) == RIGHT, name
