"""Which layers no adapter may change, although vLLM registers them."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from worker.engine.vllm.lora.layers import (
    MAMBA_LOADER,
    MLA_COPY,
    MLA_PROVEN,
    MLA_UNPROVEN,
    ROWS_MOVED,
    ROWS_MOVED_BY,
    refused_by_mla,
    refused_by_order,
)

ATTENTION = "model.layers.0.self_attn"
OTHERS = ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj", "lm_head")


def test_of_mla_attention_only_what_is_proven_is_served() -> None:
    inside = ("kv_b_proj", "indexer.wq_b", "g_proj", *MLA_PROVEN)
    names = [*(f"{ATTENTION}.{name}" for name in inside), *OTHERS]
    refused = dict(refused_by_mla(f"{ATTENTION}.kv_b_proj", names))
    assert refused == {
        f"{ATTENTION}.kv_b_proj": MLA_COPY,
        f"{ATTENTION}.indexer.wq_b": MLA_UNPROVEN,
        f"{ATTENTION}.g_proj": MLA_UNPROVEN,
    }


@pytest.mark.parametrize("class_name", ROWS_MOVED_BY)
def test_layers_whose_rows_a_class_moves_are_refused_in_that_class_alone(class_name: str) -> None:
    names = [f"{ATTENTION}.q_proj", f"{ATTENTION}.v_proj", "tower.q_proj"]
    assert dict(refused_by_order("model", class_name, names)) == {names[0]: ROWS_MOVED}
    assert dict(refused_by_order("", "LlamaForCausalLM", names)) == {}


def models_of_vllm() -> Path:
    found = importlib.util.find_spec("vllm")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent / "model_executor"


REORDERS = re.compile(
    r"loaded_weight\.(?:view|reshape)\([^)]*\)\s*(?:\[|\.(?:transpose|permute)\()"
    r"|loaded_weight\.(?:transpose|permute)\(|loaded_weight = loaded_weight\.view"
    r"|def permute\w*\((?!\s*self,\s*x)"
)
KNOWN = {
    "bert_with_rope.py": "takes no adapters",
    "bloom.py": "takes no adapters",
    "falcon.py": "takes no adapters",
    "gpt_oss.py": "experts of quantised checkpoints, unpacked without another order",
    "k2_horizon.py": "refused: ROWS_MOVED_BY",
    "llama4.py": "fused experts; of query and key RowOrder gives adapters the same order",
    "llama4_eagle.py": "a drafter; adapters leave those alone",
    "mistral.py": "from Mistral's own file format to the one that adapters have",
}


def test_every_model_of_vllm_that_moves_rows_as_it_loads_is_accounted_for() -> None:
    """A new vLLM may bring another: look whether its adapters need RowOrder or ROWS_MOVED_BY."""
    models = (models_of_vllm() / "models").glob("**/*.py")
    assert {path.name for path in models if REORDERS.search(path.read_text())} == set(KNOWN)
    for name in ("bert_with_rope.py", "bloom.py", "falcon.py"):
        assert "SupportsLoRA" not in (models_of_vllm() / "models" / name).read_text()


def test_the_loader_of_mamba_s_projection_has_the_name_by_which_it_is_known() -> None:
    source = models_of_vllm() / "layers" / "mamba" / "mamba_mixer2.py"
    assert f"def {MAMBA_LOADER}(" in source.read_text()
