"""Shell. What the media of a request to embed or to score take in the worker's memory. vLLM reads
those with other parsers than those of chats, which decode each picture, sound or video at once. So
they are counted one after the other, with the bounds of a chat.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterable
from contextvars import ContextVar, copy_context
from typing import Any

from worker.engine.vllm.tenants import picture_memory, sound_memory
from worker.engine.vllm.tenants.media_names import content_parsers
from worker.engine.vllm.tenants.picture_files import pixels_of

Parse = Callable[[Any, str | None, str | None], None]


class Taken:
    """By one request, so far."""

    def __init__(self) -> None:
        self.pixels = 0
        self.decoded = sound_memory.DecodedBytes()


TOGETHER: ContextVar[Taken | None] = ContextVar("media_of_all_inputs", default=None)
"""Of a request whose inputs are kept until the last one is read. Else each input counts alone."""


def bound_pooled_media() -> None:
    """Called once for each process."""
    parser = content_parsers().MultiModalContentParser
    if hasattr(parser.parse_image, "bounded"):
        return
    parser.parse_image = _counted_before(parser.parse_image)
    parser.parse_audio = _counted_after(parser.parse_audio, "audio")
    parser.parse_video = _counted_after(parser.parse_video, "video")


async def read_inputs(processor: Any, context: Any) -> Any:
    """vLLM's `get_request_factory_online`. Where inputs have parts, it decodes media: in the thread
    that all other inputs are read in, and not on the event loop.
    """
    if not _have_parts(getattr(context, "request", None)):
        return processor.get_request_factory_online(context)

    def read() -> Any:
        TOGETHER.set(Taken())
        return processor.get_request_factory_online(context)

    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(processor._executor, copy_context().run, read)


def _have_parts(request: Any) -> bool:
    for name in ("query", "documents", "data_1", "data_2"):
        given = getattr(request, name, None)
        inputs: Iterable[object] = given if isinstance(given, list) else [given]
        if any(one is not None and not isinstance(one, str) for one in inputs):
            return True
    return False


def _taken(parser: Any) -> Taken:
    taken = TOGETHER.get() or getattr(parser._tracker, "taken", None)
    if taken is None:
        taken = parser._tracker.taken = Taken()
    return taken


def _counted_before(parse: Parse) -> Parse:
    @functools.wraps(parse)
    def parse_picture(parser: Any, url: str | None, uuid: str | None = None) -> None:
        if url:
            taken = _taken(parser)
            taken.pixels += pixels_of(url)
            picture_memory.check(taken.pixels)
        parse(parser, url, uuid)

    parse_picture.bounded = True  # type: ignore[attr-defined]
    return parse_picture


def _counted_after(parse: Parse, kind: str) -> Parse:
    @functools.wraps(parse)
    def parse_sound(parser: Any, url: str | None, uuid: str | None = None) -> None:
        decoded = _taken(parser).decoded
        decoded.check(kind)
        parse(parser, url, uuid)
        found, _ = parser._tracker._items_by_modality[kind][-1]
        decoded.bytes += sound_memory.size_of(found)
        decoded.check(kind)

    return parse_sound
