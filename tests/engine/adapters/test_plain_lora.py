"""Shell. LoHa, LoKr, AdaLoRA, PiSSA and OLoRA as PEFT saves them become plain LoRAs, and PEFT says
that both change the base alike.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from shared.errors import ConfigError
from tests.harness import ROOT
from worker.validation.plain_lora import to_plain_lora

MODULES = ["q_proj", "k_proj", "down_proj"]
KINDS: dict[str, Any] = {
    "loha": peft.LoHaConfig(r=3, alpha=8, target_modules=MODULES),
    "loha patterns": peft.LoHaConfig(
        r=3,
        alpha=8,
        target_modules=MODULES,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"k_proj": 3},
    ),
    "lokr": peft.LoKrConfig(r=4, alpha=8, target_modules=MODULES),
    "lokr of factors": peft.LoKrConfig(
        r=2, alpha=8, target_modules=MODULES, decompose_both=True, decompose_factor=8
    ),
    "adalora": peft.AdaLoraConfig(
        init_r=6, target_r=4, total_step=10, lora_alpha=8, target_modules=MODULES
    ),
    "pissa": peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights="pissa", target_modules=MODULES),
    "pissa rslora": peft.LoraConfig(
        r=4, lora_alpha=8, init_lora_weights="pissa", target_modules=MODULES, use_rslora=True
    ),
    "olora": peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights="olora", target_modules=MODULES),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("base")
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def load(base: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def trained(base: Path, config: Any, folder: Path) -> torch.Tensor:
    """Saves an adapter after some changes to its weights; returns what its model answers."""
    model = peft.get_peft_model(load(base), config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(mark in name for mark in ("lora_", "hada_", "lokr_")):
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    return logits(model)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(1, 20)[None]).logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_lora_changes_the_base_as_the_adapter_did(
    kind: str, base: Path, tmp_path: Path
) -> None:
    wanted = trained(base, KINDS[kind], tmp_path / "a")
    made = to_plain_lora(tmp_path / "a", tmp_path / "out", 48, base)
    assert made.error < 1e-5 and made.modules == 6
    plain = peft.PeftModel.from_pretrained(load(base), tmp_path / "out")
    plain_logits, base_logits = logits(plain), logits(load(base))
    assert torch.allclose(plain_logits, wanted, atol=2e-3)
    assert not torch.allclose(base_logits, wanted, atol=0.05), "the adapter changes nothing"


def test_what_a_bound_on_the_rank_costs_is_said(base: Path, tmp_path: Path) -> None:
    trained(base, KINDS["loha"], tmp_path / "a")
    made = to_plain_lora(tmp_path / "a", tmp_path / "out", 4)
    assert made.rank == 4 and 0.01 < made.error < 1


def test_a_start_at_random_needs_the_adapter_as_it_began(base: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=8, init_lora_weights="pissa_niter_4", target_modules=MODULES
    )
    model = peft.get_peft_model(load(base), config)
    model.save_pretrained(tmp_path / "began")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.mul_(1.3)
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(ConfigError, match="--initial"):
        to_plain_lora(tmp_path / "a", tmp_path / "out", 48, base)
    to_plain_lora(tmp_path / "a", tmp_path / "out", 48, None, tmp_path / "began")
    plain = peft.PeftModel.from_pretrained(load(base), tmp_path / "out")
    assert torch.allclose(logits(plain), logits(model), atol=2e-3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"peft_type": "IA3"}, "no conversion"),
        ({"init_lora_weights": "pissa"}, "--base"),
        ({"peft_type": "LOHA", "alpha": 8}, "no such"),
    ],
)
def test_what_cannot_be_converted_says_why(
    base: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=MODULES)
    trained(base, config, tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConfigError, match=said):
        to_plain_lora(tmp_path / "a", tmp_path / "out", 48)


def test_what_a_plain_lora_cannot_hold_is_never_left_out(base: Path, tmp_path: Path) -> None:
    """DoRA's magnitudes, and modules that were trained as a whole."""
    began = {"r": 4, "lora_alpha": 8, "target_modules": MODULES, "init_lora_weights": "pissa"}
    for more in ({"use_dora": True}, {"modules_to_save": ["lm_head"]}):
        folder = tmp_path / next(iter(more))
        trained(base, peft.LoraConfig(**began, **more), folder)
        with pytest.raises(ConfigError, match=r"lora_magnitude_vector|lm_head"):
            to_plain_lora(folder, tmp_path / "out", 48, base)


def test_weights_that_cannot_be_read_are_named(base: Path, tmp_path: Path) -> None:
    trained(base, KINDS["loha"], tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(ConfigError, match=r"cannot read .*adapter_model\.safetensors"):
        to_plain_lora(tmp_path / "a", tmp_path / "out", 48)


def test_the_command_prints_the_error_and_never_writes_over_a_folder(
    base: Path, tmp_path: Path
) -> None:
    trained(base, KINDS["adalora"], tmp_path / "a")
    argv = [sys.executable, "-m", "loraplex", "adapters", "convert", str(tmp_path / "a")]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0 and "AdaLoRA as a plain LoRA of rank 6" in done.stdout, done.stderr
    assert "error of the conversion" in done.stdout
    again = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, check=False)
    assert again.returncode == 1 and "cannot write" in again.stderr
