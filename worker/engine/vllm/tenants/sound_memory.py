"""Shell. What the sounds and videos of a request take in the worker's memory. vLLM bounds each of
them; a request may have hundreds. vLLM 0.33 bounds all of a request together, too.

Their size is known only once they are decoded. So those of a request are decoded one after the
other, until they are too large together.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import Any

from vllm.exceptions import VLLMValidationError

from worker.engine.vllm.tenants.media_names import content_parsers

MAX_BYTES = 512 << 20
"""Of a request. Each sound may take half as many."""
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
    for name, kind in (
        ("_audio_with_uuid_async", "input_audio"),
        ("_video_with_uuid_async", "video_url"),
    ):
        decode = getattr(parser, name)
        if not hasattr(decode, "bounded"):
            setattr(parser, name, _bounded(decode, kind))


def _bounded(decode: Decode, kind: str) -> Decode:
    @functools.wraps(decode)
    async def decode_in_turn(
        parser: Any, url: str | None, uuid: str | None
    ) -> tuple[Any, str | None]:
        tracker = parser._tracker
        if not hasattr(tracker, "decoded"):
            tracker.decoded = DecodedBytes()
        async with tracker.decoded.turn:
            tracker.decoded.check(kind)
            found = await decode(parser, url, uuid)
            tracker.decoded.bytes += size_of(found[0])
            tracker.decoded.check(kind)
            return found

    decode_in_turn.bounded = True  # type: ignore[attr-defined]
    return decode_in_turn


def size_of(decoded: Any) -> int:
    """In bytes. A sound is an array with its rate, a video an array with facts about it. vLLM keeps
    the file of a video with it. One that is fetched may have 256 MiB, and few frames.
    """
    file = getattr(decoded, "original_bytes", b"")
    decoded = getattr(decoded, "media", decoded)
    if isinstance(decoded, tuple | list):
        return len(file) + sum(size_of(part) for part in decoded)
    return len(file) + int(getattr(decoded, "nbytes", 0))
