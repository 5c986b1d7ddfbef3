"""Sounds and videos are bounded by what those of a request take once they are decoded."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import wave
from types import SimpleNamespace
from typing import Any

import pytest

from tests.engine.tenants.test_media_names import parser_of

SECOND = 16_000


def sound_of(seconds: int) -> str:
    data = io.BytesIO()
    with wave.open(data, "wb") as file:
        file.setparams((1, 2, SECOND, 0, "NONE", ""))
        file.writeframes(bytes(2 * seconds * SECOND))
    return "data:audio/wav;base64," + base64.b64encode(data.getvalue()).decode()


def real_parser(monkeypatch: pytest.MonkeyPatch, most_bytes: int) -> tuple[Any, Any]:
    from vllm.multimodal.media import MediaConnector

    from worker.engine.vllm.tenants import sound_memory

    sound_memory.bound_sounds()
    sound_memory.bound_sounds()
    monkeypatch.setattr(sound_memory, "MAX_BYTES", most_bytes)
    parser, tracker = parser_of("AsyncMultiModalContentParser")
    parser._connector = MediaConnector()
    return parser, tracker


async def decoded(tracker: Any) -> list[Any]:
    """As vLLM's tracker does it: all at once, each to its end."""
    return await asyncio.gather(*(item() for item in tracker.items), return_exceptions=True)


async def test_sounds_that_are_small_enough_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    parser, tracker = real_parser(monkeypatch, most_bytes=3 * 10 * SECOND * 4)
    for _ in range(3):
        parser.parse_audio(sound_of(10))
    found = await decoded(tracker)
    assert [len(sound[0]) for sound, _ in found] == [10 * SECOND] * 3


async def test_no_more_are_decoded_once_they_take_too_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.exceptions import VLLMValidationError

    parser, tracker = real_parser(monkeypatch, most_bytes=2 * 10 * SECOND * 4)
    fetched = 0
    fetch = parser._connector.fetch_audio_async

    async def counted(url: str) -> Any:
        nonlocal fetched
        fetched += 1
        return await fetch(url)

    parser._connector.fetch_audio_async = counted
    for _ in range(20):
        parser.parse_audio(sound_of(10))
    found = await decoded(tracker)
    refused = [one for one in found if isinstance(one, VLLMValidationError)]
    assert len(refused) == 18 and fetched == 3
    assert "MiB together" in str(refused[0])


async def test_one_that_is_broken_does_not_hold_up_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parser, tracker = real_parser(monkeypatch, most_bytes=1 << 20)
    parser.parse_audio("data:audio/wav;base64,AAAA")
    parser.parse_audio(sound_of(1))
    async with asyncio.timeout(60):
        broken, whole = await decoded(tracker)
    assert isinstance(broken, Exception) and len(whole[0][0]) == SECOND


def tracker_with(monkeypatch: pytest.MonkeyPatch, connector: Any) -> tuple[Any, Any]:
    """A parser, and vLLM's tracker with what it is given."""
    from vllm.renderers.chat_utils import AsyncMultiModalItemTracker

    parser, found = real_parser(monkeypatch, most_bytes=512 << 20)
    tracker: Any = object.__new__(AsyncMultiModalItemTracker)
    tracker._items_by_modality = {"audio": found.items}
    tracker.add = found.add
    tracker._model_config = SimpleNamespace(is_multimodal_model=True)
    tracker.mm_processor = object()
    tracker._modality_order = {"audio": []}
    parser._tracker, parser._connector = tracker, connector
    return parser, tracker


class Web:
    """A connector that gives files by their addresses, and a sound of these bytes for each. Nobody
    gets one before `go_on`.
    """

    def __init__(self, size_bytes: int = 0) -> None:
        self.size_bytes, self.decoding, self.most, self.given = size_bytes, 0, 0, list[str]()
        self.go_on = asyncio.Event()

    async def load_from_url_async(self, url: str, media_io: Any, fetch_timeout: int) -> Any:
        return media_io.load_bytes(url.encode())

    async def fetch_audio_async(self, url: str) -> Any:
        import numpy as np

        self.given.append(url)
        self.decoding += 1
        self.most = max(self.most, self.decoding)
        try:
            await self.go_on.wait()
        finally:
            self.decoding -= 1
        return np.empty(self.size_bytes, np.uint8), SECOND


async def test_sounds_of_all_requests_hold_no_more_than_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each may be as large as its request allows until it is decoded. What is decoded and not
    forgotten counts as well, with what it takes.
    """
    web, held = Web(384 << 20), list[Any]()

    async def request() -> None:
        parser, tracker = tracker_with(monkeypatch, web)
        parser.parse_audio("data:audio/wav;base64,")
        held.append(await tracker.resolve_items())

    requests = [asyncio.create_task(request()) for _ in range(12)]
    for _ in range(20):
        await asyncio.sleep(0)
    assert web.decoding == 4
    web.go_on.set()
    async with asyncio.timeout(60):
        while len(held) < 4:
            await asyncio.sleep(0)
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(held) == 5, "four that hold 384 MiB leave room for one that may take 512"
    async with asyncio.timeout(60):
        while not all(task.done() for task in requests):
            held.clear()
            gc.collect()
            await asyncio.sleep(0)
    assert web.most == 4
    held.clear()


async def test_a_sound_that_is_named_is_fetched_before_it_takes_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    web = Web()
    parser, tracker = tracker_with(monkeypatch, web)
    web.go_on.set()
    parser.parse_audio("https://elsewhere/a.wav")
    await asyncio.wait_for(tracker.resolve_items(), 60)
    (given,) = web.given
    assert base64.b64decode(given.partition(",")[2]) == b"https://elsewhere/a.wav"


async def test_what_a_request_names_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.exceptions import VLLMValidationError

    from worker.engine.vllm.tenants import media_files

    monkeypatch.setattr(media_files, "MAX_FETCHED_BYTES", 100)
    web = Web()
    parser, tracker = tracker_with(monkeypatch, web)
    for n in range(20):
        parser.parse_video(f"https://elsewhere/{n}.mp4")
    with pytest.raises(VLLMValidationError, match="sounds and videos that a request names"):
        await asyncio.wait_for(tracker.resolve_items(), 60)
    assert not web.given


async def test_room_of_a_request_that_fails_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Web):
        async def fetch_audio_async(self, url: str) -> Any:
            raise ValueError("broken")

    for _ in range(20):
        parser, tracker = tracker_with(monkeypatch, Broken())
        parser.parse_audio("data:audio/wav;base64,")
        with pytest.raises(ValueError, match="broken"):
            await asyncio.wait_for(tracker.resolve_items(), 60)
