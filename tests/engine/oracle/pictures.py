"""Shell. Pictures for the bases that see, and what transformers' models want beside the tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tests.engine.oracle.bases import PICTURE_TOKENS, Base

SIDE = 56
TYPES = {
    "qwen2_vl": "mm_token_type_ids",
    "qwen2_5_vl": "mm_token_type_ids",
    "qwen3_vl": "mm_token_type_ids",
    "qwen3_5": "mm_token_type_ids",
}
"""What a model calls the kind of each token (1: of a picture). Gemma 3 would let the tokens of a
picture see each other; vLLM's attention on CPUs does not, so it is not told here.
"""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture, and its tensors as the model's own processor makes them."""

    image: Image.Image
    tensors: dict[str, torch.Tensor]


def picture_for(base: Base, at: Path, seed: int) -> Picture:
    """Noise, another for each seed."""
    from transformers import AutoImageProcessor

    noise = torch.randint(0, 256, (SIDE, SIDE, 3), generator=torch.Generator().manual_seed(seed))
    image = Image.fromarray(noise.to(torch.uint8).numpy())
    made = AutoImageProcessor.from_pretrained(at)(images=[image], return_tensors="pt")
    return Picture(image, {k: made[k] for k in ("pixel_values", "image_grid_thw") if k in made})


def with_pictures(model: Any, picture: Picture | None) -> Callable[..., Any]:
    """The model as a function of tokens that hold the picture's places."""
    if picture is None:
        return model  # type: ignore[no-any-return]
    at = PICTURE_TOKENS["image_token_id"]

    def call(input_ids: torch.Tensor, **more: Any) -> Any:
        types = (input_ids == at).to(torch.int32)
        name = TYPES.get(model.config.model_type)
        extra = {name: types} if name else {}
        return model(input_ids=input_ids, **extra, **picture.tensors, **more)

    return call
