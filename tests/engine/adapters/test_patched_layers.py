"""What is corrected in vLLM's LoRA layers, with vLLM's own classes. The whole engine is compared
with PEFT in tests/engine/oracle.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from vllm.lora.layers import MergedColumnParallelLinearWithLoRA
from vllm.lora.model_manager import LoRAModelManager

from worker.engine.vllm import patches

FOUR_PARTS = SimpleNamespace(n_slices=4, output_sizes=[2, 2, 3, 3])  # q, k, v and z of Qwen3.5


@pytest.fixture
def mended(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in (
        (MergedColumnParallelLinearWithLoRA, "expand_packed_lora"),
        (LoRAModelManager, "_maybe_init_mm"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    patches._fused_layers_may_lack_their_first_part()
    patches._towers_count_all_their_tokens()


@pytest.mark.usefixtures("mended")
@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ((None, 3), [None, None, None, 3]),
        ((7, None), [2, 2, 3, None]),
        ((7, 3), [2, 2, 3, 3]),
    ],
)
def test_a_fused_layer_takes_what_an_adapter_has_and_leaves_the_other_parts_alone(
    rows: tuple[int | None, int | None], parts: list[int | None]
) -> None:
    given = [None if n is None else torch.ones(n, 8) for n in rows]
    expand = MergedColumnParallelLinearWithLoRA.expand_packed_lora
    a, b = expand(FOUR_PARTS, given, given)
    assert [None if part is None else len(part) for part in b] == parts
    assert [part is None for part in a] == [part is None for part in parts]


@pytest.mark.usefixtures("mended")
def test_the_tower_of_llava_has_as_many_rows_for_adapters_as_it_computes() -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "patch_size": 14}
    vision = transformers.CLIPVisionConfig(**sizes, intermediate_size=32, image_size=56)
    config = transformers.LlavaConfig(vision_config=vision, vision_feature_layer=-1)

    class LlavaForConditionalGeneration(torch.nn.Module):
        """Has vLLM's name and no layers: only the counting is asked."""

    model = LlavaForConditionalGeneration()
    model.config = config
    lora = SimpleNamespace(enable_tower_connector_lora=False)
    with pytest.raises(AttributeError):  # it goes on to vLLM's own, which needs a real model
        LoRAModelManager._maybe_init_mm(SimpleNamespace(model=model, lora_config=lora), None, 8)
    pictures = torch.zeros(3, 3, 56, 56)
    tower = transformers.CLIPVisionModel(vision)
    seen = tower(pictures).last_hidden_state
    places = 3 * (seen.shape[1] - 1)
    counted = model.get_mm_lora_token_counts(modality="image", mm_kwargs=None, num_mm_embeds=places)
    assert counted == (seen.shape[0] * seen.shape[1], places)
