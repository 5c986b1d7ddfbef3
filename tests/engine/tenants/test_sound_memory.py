"""Sounds and videos are bounded by what those of a request take once they are decoded."""

from __future__ import annotations

import asyncio
import base64
import io
import wave
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
