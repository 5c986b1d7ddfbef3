"""Shell. The files of pictures, before they are decoded.

The size of a picture has to be known before it is decoded. Of the usual formats it stands in the
file's head. Others lie: an IPTC file of one pixel, or a TIFF with large tiles, decodes to whatever
it holds. An icon is decoded already where its size is read. So only FORMATS are served.

Reading a head can take 0.1 s, so that is done in threads beside the event loop.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import pybase64
from PIL import Image
from vllm.multimodal import image as vllm_image

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
TOO_MANY = 1 << 62
"""Pixels of a picture that no library decodes."""
_threads = ThreadPoolExecutor(2, thread_name_prefix="picture-heads")


def serve_usual_formats() -> None:
    """Called once for each process. vLLM looks there whenever it opens a picture."""
    known = vllm_image.ALLOWED_IMAGE_FORMATS
    vllm_image.ALLOWED_IMAGE_FORMATS = tuple(form for form in known if form in FORMATS)


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
