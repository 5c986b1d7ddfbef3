"""Shell. What the sounds and videos of a request take in the worker's memory. vLLM bounds each of
them; a request may have hundreds. vLLM 0.33 bounds all of a request together, too.

Their size is known only once they are decoded. So those of a request are decoded one after the
other, until they are too large together. Before that the request takes what it may have at most out
of what all requests may hold, and gives back the rest afterwards.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import numpy as np
from vllm import envs
from vllm.exceptions import VLLMValidationError
from vllm.renderers.chat_utils import AsyncMultiModalItemTracker

from worker.engine.vllm.tenants import media_files
from worker.engine.vllm.tenants.media_budget import MediaBudget, hold
from worker.engine.vllm.tenants.media_names import content_parsers

MAX_BYTES = 512 << 20
"""Of a request. Each sound may take half as many."""
MAX_BYTES_AT_ONCE = 4 * MAX_BYTES
SOUNDS = "sounds and videos"
Decode = Callable[[Any, str | None, str | None], Awaitable[tuple[Any, str | None]]]


class DecodedBytes:
    """Of one request, so far."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.bytes = 0

    def check(self, kind: str) -> None:
        """Raises VLLMValidationError if there are too many."""
        if self.bytes > MAX_BYTES:
            raise VLLMValidationError(
                f"The sounds and videos of a request may take {MAX_BYTES >> 20} MiB together once "
                "they are decoded, the files of the videos included. Send fewer or shorter ones.",
                parameter=kind,
            )


def bound_sounds() -> None:
    """Called once for each process."""
    parser = content_parsers().AsyncMultiModalContentParser
    if hasattr(parser.parse_audio, "bounded"):
        return
    for method in ("parse_audio", "parse_video"):
        setattr(parser, method, media_files.noting(getattr(parser, method), SOUNDS))
    for name, kind in (
        ("_audio_with_uuid_async", "input_audio"),
        ("_video_with_uuid_async", "video_url"),
    ):
        setattr(parser, name, _bounded(getattr(parser, name), kind))
    resolve, budget = AsyncMultiModalItemTracker.resolve_items, MediaBudget(MAX_BYTES_AT_ONCE)

    @functools.wraps(resolve)
    async def resolve_bounded(tracker: Any) -> Any:
        sounds = media_files.noted(tracker, SOUNDS)
        if not sounds:
            return await resolve(tracker)
        timeout_s = max(envs.VLLM_AUDIO_FETCH_TIMEOUT, envs.VLLM_VIDEO_FETCH_TIMEOUT)
        tracker.fetched_sounds = await media_files.fetch_elsewhere(sounds, SOUNDS, timeout_s)
        return await hold(
            budget,
            MAX_BYTES,
            lambda: resolve(tracker),
            lambda media: ([*_arrays_in(media)], tracker.decoded.bytes),
        )

    AsyncMultiModalItemTracker.resolve_items = resolve_bounded


def _arrays_in(media: Any) -> Iterator[np.ndarray[Any, Any]]:
    """A sound is an array with its rate, a video an array with facts about it."""
    media = getattr(media, "media", media)
    if isinstance(media, np.ndarray):
        yield media
    elif isinstance(media, dict | list | tuple):
        for part in media.values() if isinstance(media, dict) else media:
            yield from _arrays_in(part)


def _bounded(decode: Decode, kind: str) -> Decode:
    @functools.wraps(decode)
    async def decode_in_turn(
        parser: Any, url: str | None, uuid: str | None
    ) -> tuple[Any, str | None]:
        tracker = parser._tracker
        if not hasattr(tracker, "decoded"):
            tracker.decoded = DecodedBytes()
        fetched = getattr(tracker, "fetched_sounds", {})
        async with tracker.decoded.turn:
            tracker.decoded.check(kind)
            found = await decode(parser, fetched.get(url, url), uuid)
            tracker.decoded.bytes += size_of(found[0])
            tracker.decoded.check(kind)
            return found

    return decode_in_turn


def size_of(decoded: Any) -> int:
    """In bytes. vLLM keeps the file of a video beside its frames."""
    file = getattr(decoded, "original_bytes", b"")
    return len(file) + sum(array.nbytes for array in _arrays_in(decoded))
