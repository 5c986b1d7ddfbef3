"""A picture in a chat, over real processes, is answered as PEFT says: with an adapter of the vision
tower, with one of the language model, and without.
"""

from __future__ import annotations

import base64
import copy
import importlib.util
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
from PIL import Image

from shared.runtime.children import Zygote
from tests.engine.oracle.bases import PICTURE_BASES, make_adapter, make_base
from tests.engine.oracle.matrix import oracle
from tests.engine.oracle.pictures import picture_for, with_pictures
from worker.validation.oracle import GreedyAnswer, distance

TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|image_pad|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
BASE = PICTURE_BASES["LLaVA, tower too"]
LAYERS = {
    "tower": (".*vision_tower", ["q_proj", "v_proj", "out_proj", "fc1", "fc2"]),
    "language": (".*language_model", ["o_proj"]),
}


def chat(model: str, image: Image.Image) -> dict[str, Any]:
    data = io.BytesIO()
    image.save(data, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "What is this?"},
    ]
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": True,
        "return_token_ids": True,
    }


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="vLLM needs it here")
async def test_a_picture_in_a_chat_is_answered_with_the_adapter_that_is_asked(
    tmp_path: Path, zygote: Zygote
) -> None:
    at, store = make_base(BASE, tmp_path / "base"), tmp_path / "store"
    (at / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    for seed, (name, (inside, layers)) in enumerate(LAYERS.items()):
        make_adapter(replace(BASE, inside=inside), at, store / name, layers, seed)
    picture = picture_for(BASE, at, 1)
    async with oracle(BASE, at, store, tmp_path, zygote) as o:
        for name in ("", *LAYERS):
            body = chat(f"tiny:{name}".rstrip(":"), picture.image)
            url = f"{o.cluster.url}/v1/chat/completions"
            async with o.cluster.http.post(url, json=body) as answer:
                said = await answer.json()
                assert answer.status == 200, said
            choice = said["choices"][0]
            logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
            row = GreedyAnswer(said["prompt_token_ids"], choice["token_ids"], logprobs)
            plain = with_pictures(o.plain, picture)
            assert distance(plain, [row]).within(BASE.close) is not bool(name), name
            if name:
                adapted = peft.PeftModel.from_pretrained(copy.deepcopy(o.plain), store / name)
                mine = with_pictures(adapted.eval().float(), picture)
                assert distance(mine, [row]).within(BASE.close), name
