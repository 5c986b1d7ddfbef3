"""The media of requests to embed or to score are bounded, too."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from tests.engine.tenants.test_media_names import parser_of
from tests.engine.tenants.test_picture_memory import picture, png_that_says, url_of
from tests.engine.tenants.test_sound_memory import SECOND, sound_of


def parser_with() -> tuple[Any, dict[str, list[Any]]]:
    from vllm.multimodal.media import MediaConnector

    from worker.engine.vllm.tenants.picture_memory import bound_pictures
    from worker.engine.vllm.tenants.pooled_media import bound_pooled_media

    bound_pictures()
    bound_pooled_media()
    bound_pooled_media()
    parser, tracker = parser_of("MultiModalContentParser")
    parser._connector = MediaConnector()
    return parser, tracker._items_by_modality


def test_pictures_with_too_many_pixels_are_refused_before_they_are_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.exceptions import VLLMValidationError

    from worker.engine.vllm.tenants import picture_memory

    parser, items = parser_with()
    with pytest.raises(VLLMValidationError, match="pixels together"):
        parser.parse_image(url_of(png_that_says(14_000, 14_000)))
    monkeypatch.setattr(picture_memory, "MAX_PIXELS", 2500)
    for _ in range(2):
        parser, items = parser_with()
        for _ in range(2):
            parser.parse_image(url_of(picture("PNG", 40, 30)))
        with pytest.raises(VLLMValidationError, match="pixels together"):
            parser.parse_image(url_of(picture("PNG", 40, 30)))
        assert len(items["image"]) == 2


def test_sounds_that_take_too_much_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.exceptions import VLLMValidationError

    from worker.engine.vllm.tenants import sound_memory

    monkeypatch.setattr(sound_memory, "MAX_BYTES", 2 * 10 * SECOND * 4)
    parser, items = parser_with()
    for _ in range(2):
        parser.parse_audio(sound_of(10))
    with pytest.raises(VLLMValidationError, match="once they are decoded"):
        parser.parse_audio(sound_of(10))
    with pytest.raises(VLLMValidationError, match="once they are decoded"):
        parser.parse_audio(sound_of(10))
    assert len(items["audio"]) == 3


class Scores:
    """As vLLM reads documents to score: each with parsers of its own, all in one call."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1)
        self.thread: threading.Thread | None = None

    def get_request_factory_online(self, context: Any) -> list[Any]:
        self.thread = threading.current_thread()
        read = []
        for url in context.urls:
            parser, items = parser_with()
            parser.parse_image(url)
            read.append(items)
        return read


async def test_all_documents_count_together_and_not_on_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.exceptions import VLLMValidationError

    from worker.engine.vllm.tenants import picture_memory
    from worker.engine.vllm.tenants.pooled_media import read_inputs

    parser_with()
    monkeypatch.setattr(picture_memory, "MAX_PIXELS", 2500)
    scores, url = Scores(), url_of(picture("PNG", 40, 30))
    request = SimpleNamespace(query="a", documents=["b", {"content": []}])
    for _ in range(2):
        found = await read_inputs(scores, SimpleNamespace(request=request, urls=[url] * 2))
        assert len(found) == 2 and scores.thread is not threading.current_thread()
        with pytest.raises(VLLMValidationError, match="pixels together"):
            await asyncio.wait_for(
                read_inputs(scores, SimpleNamespace(request=request, urls=[url] * 3)), 60
            )
    texts = SimpleNamespace(query="a", documents=["b"])
    assert await read_inputs(scores, SimpleNamespace(request=texts, urls=[])) == []
    assert scores.thread is threading.current_thread()
