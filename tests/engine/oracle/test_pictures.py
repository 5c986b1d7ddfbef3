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


def chat(model: str, image: Image.Image | None, **named: str) -> dict[str, Any]:
    """`named`: the name that the client gives the picture."""
    url = None
    if image is not None:
        data = io.BytesIO()
        image.save(data, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": url}, **named},
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


SEES = importlib.util.find_spec("torchvision") is not None
needs_eyes = pytest.mark.skipif(not SEES, reason="vLLM needs torchvision here")


def base_that_sees(folder: Path) -> tuple[Path, Path]:
    """(base model, store): the folders, of which the second is still to be made."""
    at = make_base(BASE, folder / "base")
    (at / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return at, folder / "store"


@pytest.mark.long
@needs_eyes
async def test_a_picture_in_a_chat_is_answered_with_the_adapter_that_is_asked(
    tmp_path: Path, zygote: Zygote
) -> None:
    at, store = base_that_sees(tmp_path)
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


@pytest.mark.long
@needs_eyes
async def test_a_picture_is_what_was_sent_whatever_others_have_sent_by_its_name(
    tmp_path: Path, zygote: Zygote
) -> None:
    at, store = base_that_sees(tmp_path)
    store.mkdir()
    one, another = (picture_for(BASE, at, seed).image for seed in (1, 2))
    async with oracle(BASE, at, store, tmp_path, zygote) as o:

        async def said(image: Image.Image | None, **named: str) -> tuple[int, Any]:
            url = f"{o.cluster.url}/v1/chat/completions"
            async with o.cluster.http.post(url, json=chat("tiny", image, **named)) as answer:
                found = await answer.json()
                if answer.status == 200:
                    tokens = found["choices"][0]["logprobs"]["content"]
                    found = [round(token["logprob"], 4) for token in tokens]
                return answer.status, found

        status, unnamed = await said(another)
        assert status == 200 and await said(one) != (200, unnamed), "the test could not fail"
        await said(one, uuid="logo")
        assert await said(another, uuid="logo") == (200, unnamed)
        status, error = await said(None, uuid="logo")
        assert status == 400 and "`uuid`" in error["error"]["message"], error
        status, error = await said(Image.new("RGB", (13_500, 13_500)))
        assert status == 400 and "pixels together" in error["error"]["message"], error
        assert await said(another) == (200, unnamed)
