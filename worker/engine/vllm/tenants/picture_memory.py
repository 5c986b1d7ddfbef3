"""Shell. What the pictures of requests take in the worker's memory. A file of half a megabyte may
be a picture of half a gigabyte, and a request may have hundreds of them. Without a bound one
request could have the kernel kill the worker.

A request with too many pixels is refused before any is decoded. Others wait for their turn until
earlier pictures have left the memory.
"""

from __future__ import annotations

import functools
from typing import Any

from PIL import Image
from vllm import envs
from vllm.exceptions import VLLMValidationError
from vllm.renderers.chat_utils import AsyncMultiModalItemTracker

from worker.engine.vllm.tenants import media_files, picture_files
from worker.engine.vllm.tenants.media_budget import MediaBudget, hold
from worker.engine.vllm.tenants.media_names import content_parsers

MAX_PIXELS = 178_956_970
"""Of all pictures of a request. vLLM and Pillow allow as many for one. They take 0.5 GiB as RGB."""
MAX_PIXELS_AT_ONCE = 4 * MAX_PIXELS
PICTURES = "pictures"


def bound_pictures() -> None:
    """Called once for each process."""
    kind = content_parsers().AsyncMultiModalContentParser
    parse, decode = kind.parse_image, kind._image_with_uuid_async
    resolve = AsyncMultiModalItemTracker.resolve_items
    if hasattr(parse, "bounded"):
        return
    picture_files.serve_usual_formats()
    budget = MediaBudget(MAX_PIXELS_AT_ONCE)

    @functools.wraps(decode)
    async def decode_fetched(parser: Any, url: str | None, uuid: str | None) -> Any:
        return await decode(parser, getattr(parser._tracker, "fetched", {}).get(url, url), uuid)

    @functools.wraps(resolve)
    async def resolve_bounded(tracker: Any) -> Any:
        pixels = await _pixels(tracker)
        if not pixels:
            return await resolve(tracker)
        return await hold(
            budget, pixels, lambda: resolve(tracker), lambda media: (_pictures_in(media), pixels)
        )

    kind.parse_image = media_files.noting(parse, PICTURES)
    kind._image_with_uuid_async = decode_fetched
    AsyncMultiModalItemTracker.resolve_items = resolve_bounded


async def _pixels(tracker: Any) -> int:
    """Of all pictures of a request. Those that are elsewhere are fetched first: until then nobody
    knows how large they are. Raises VLLMValidationError if they are too large together.
    """
    pictures = media_files.noted(tracker, PICTURES)
    tracker.fetched = await media_files.fetch_elsewhere(
        pictures, PICTURES, envs.VLLM_IMAGE_FETCH_TIMEOUT
    )
    pixels = 0
    for _, url in pictures:
        pixels += await picture_files.pixels_beside_the_loop(tracker.fetched.get(url, url))
        check(pixels)
    return pixels


def check(pixels: int) -> None:
    """Raises VLLMValidationError if a request has too many."""
    if pixels > MAX_PIXELS:
        raise VLLMValidationError(
            f"The pictures of a request may have at most {MAX_PIXELS} pixels together. Send fewer "
            "or smaller ones.",
            parameter="image_url",
        )


def _pictures_in(media: Any) -> list[object]:
    """vLLM wraps each picture together with the bytes that it came from."""
    found: list[object] = []
    for items in (media or {}).values():
        for item in items if isinstance(items, list) else ():
            picture = item.get("image", item) if isinstance(item, dict) else item
            picture = getattr(picture, "media", picture)
            if isinstance(picture, Image.Image):
                found.append(picture)
    return found
