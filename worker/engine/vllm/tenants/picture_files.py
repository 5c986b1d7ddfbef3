"""Shell. The files of pictures that clients send or name, before they are decoded.

The size of a picture has to be known before it is decoded. Of the usual formats it stands in the
file's head. Others lie: an IPTC file of one pixel, or a TIFF with large tiles, decodes to whatever
it holds. An icon is decoded already where its size is read. So only FORMATS are served.

Reading a head can take 0.1 s, so that is done in threads beside the event loop.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import pybase64
from PIL import Image
from vllm import envs
from vllm.exceptions import VLLMValidationError
from vllm.multimodal import image as vllm_image

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
MAX_FETCHED_BYTES = 64 << 20
"""Of the pictures that a request names by their addresses, all together."""
FETCHED_AT_ONCE = 4
"""Of one request."""
TOO_MANY = 1 << 62
"""Pixels of a picture that no library decodes."""
_threads = ThreadPoolExecutor(2, thread_name_prefix="picture-heads")


class _PictureFile:
    """Takes the place of vLLM's MediaIO where a picture is fetched: it is left as it is."""

    def get_max_bytes(self) -> int:
        return MAX_FETCHED_BYTES

    def load_bytes(self, data: bytes) -> bytes:
        return data

    def load_base64(self, media_type: str, data: str) -> bytes:
        return pybase64.b64decode(data, validate=True)

    def load_file(self, filepath: Path) -> bytes:
        return filepath.read_bytes()


def serve_usual_formats() -> None:
    """Called once for each process. vLLM looks there whenever it opens a picture."""
    known = vllm_image.ALLOWED_IMAGE_FORMATS
    vllm_image.ALLOWED_IMAGE_FORMATS = tuple(form for form in known if form in FORMATS)


def is_elsewhere(url: str) -> bool:
    return url[:5].lower() != "data:"


async def fetch(connector: Any, urls: Collection[str]) -> dict[str, str]:
    """The `data:` URLs of these pictures. Raises what vLLM raises if one cannot be fetched, and
    VLLMValidationError if they are too large together.
    """
    places, fetched = asyncio.Semaphore(FETCHED_AT_ONCE), 0

    def check() -> None:
        if fetched > MAX_FETCHED_BYTES:
            raise VLLMValidationError(
                f"The pictures that a request names may have {MAX_FETCHED_BYTES >> 20} MiB "
                "together. Send fewer or smaller ones.",
                parameter="image_url",
            )

    async def one(url: str) -> str:
        nonlocal fetched
        async with places:
            check()
            data = await connector.load_from_url_async(
                url, _PictureFile(), fetch_timeout=envs.VLLM_IMAGE_FETCH_TIMEOUT
            )
            fetched += len(data)
            check()
            return "data:image/any;base64," + base64.b64encode(data).decode()

    tasks = [asyncio.create_task(one(url)) for url in urls]
    try:
        return dict(zip(urls, await asyncio.gather(*tasks), strict=True))
    finally:
        for task in tasks:
            task.cancel()


async def pixels_beside_the_loop(url: str) -> int:
    return await asyncio.get_running_loop().run_in_executor(_threads, pixels_of, url)


def pixels_of(url: str) -> int:
    """Of a picture in a `data:` URL. 0: vLLM will say what is wrong with it, since it reads the
    same bytes in the same way.
    """
    try:
        data = pybase64.b64decode(url[url.find(",") + 1 :], validate=True)
        with Image.open(BytesIO(data), formats=FORMATS) as picture:
            return picture.width * picture.height
    except Image.DecompressionBombError:
        return TOO_MANY
    except Exception:  # Pillow's readers raise errors of many kinds for a broken file
        return 0
