"""Shell. The engine reads the expressions of an adapter's config as they were checked.

Another reading gives a layer an alpha that no check has seen. Its answers become infinite, and what
they leave in the KV cache spoils those of other tenants.
"""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from vllm.lora.peft_helper import PEFTHelper

from shared.adapters.peft_config import MAX_PATTERNS, check_config
from worker.engine.vllm.lora import files

files.install()

MODULE = "model.layers.0.self_attn.q_proj"
PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj"],
    "bias": "none",
}


@pytest.mark.parametrize(
    "pattern",
    [
        "(?:q_proj){e}",
        "q_proj{e}",
        "(?:another){s<=9,i,d}",
        "(?:q_proj){e<=3:[a-z]}",
        "[qk]_proj",
        "self_attn.q_proj",
        r"^model\.layers\.\d+\..*",
    ],
)
def test_rank_and_scaling_are_those_that_were_checked(pattern: str) -> None:
    config = PLAIN | {"alpha_pattern": {pattern: 1e300}, "rank_pattern": {pattern: 4}}
    checked = check_config(json.dumps(config).encode(), 16)
    found = PEFTHelper.from_dict(config).get_rank_and_scaling(MODULE)
    assert found == (checked.rank_of(MODULE), checked.scaling_of(MODULE))


def test_no_expression_lets_the_engine_search_for_long() -> None:
    """The thread that prepares adapters serves everybody."""
    patterns = {f"(?:{'x' * 120}{i}){{e<=60}}": 4 for i in range(MAX_PATTERNS)}
    config = PLAIN | {"rank_pattern": patterns}
    check_config(json.dumps(config).encode(), 16)
    helper = PEFTHelper.from_dict(config)
    helper.get_rank_and_scaling(MODULE)  # compiles them
    began = time.thread_time()
    for i in range(100):
        helper.get_rank_and_scaling(f"model.layers.{i}.self_attn.q_proj")
    assert time.thread_time() - began < 5.0
