"""Shell. The media that a request names by their addresses. They are fetched before they take their
turn to be decoded: others do not wait for a slow server, and nobody knows before what they take.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pybase64
from vllm import envs
from vllm.exceptions import VLLMValidationError

MAX_FETCHED_BYTES = 64 << 20
"""Of one request."""
FETCHED_AT_ONCE = 4
"""Of one request."""


class _MediaFile:
    """Takes the place of vLLM's MediaIO where a file is fetched: it is left as it is."""

    def get_max_bytes(self) -> int:
        return MAX_FETCHED_BYTES

    def load_bytes(self, data: bytes) -> bytes:
        return data

    def load_base64(self, media_type: str, data: str) -> bytes:
        return pybase64.b64decode(data, validate=True)

    def load_file(self, filepath: Path) -> bytes:
        return filepath.read_bytes()


def is_elsewhere(url: str) -> bool:
    return url[:5].lower() != "data:"


async def fetch(connector: Any, urls: Collection[str], what: str) -> dict[str, str]:
    """The `data:` URLs of these media. `what` they are, for a refusal. Raises what vLLM raises if
    one cannot be fetched, and VLLMValidationError if they are too large together.
    """
    places, fetched = asyncio.Semaphore(FETCHED_AT_ONCE), 0

    def check() -> None:
        if fetched > MAX_FETCHED_BYTES:
            raise VLLMValidationError(
                f"The {what} that a request names may have {MAX_FETCHED_BYTES >> 20} MiB "
                "together. Send fewer or smaller ones.",
                parameter="url",
            )

    async def one(url: str) -> str:
        nonlocal fetched
        async with places:
            check()
            data = await connector.load_from_url_async(
                url, _MediaFile(), fetch_timeout=TIMEOUTS_S[what]()
            )
            fetched += len(data)
            check()
            return "data:media/any;base64," + base64.b64encode(data).decode()

    tasks = [asyncio.create_task(one(url)) for url in urls]
    try:
        return dict(zip(urls, await asyncio.gather(*tasks), strict=True))
    finally:
        for task in tasks:
            task.cancel()


TIMEOUTS_S = {
    "pictures": lambda: envs.VLLM_IMAGE_FETCH_TIMEOUT,
    "sounds and videos": lambda: max(envs.VLLM_AUDIO_FETCH_TIMEOUT, envs.VLLM_VIDEO_FETCH_TIMEOUT),
}
