"""Shell. The media that a request names by their addresses. They are fetched before they take their
turn to be decoded: others do not wait for a slow server, and nobody knows before what they take.
"""

from __future__ import annotations

import asyncio
import base64
import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pybase64
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


def noting(parse: Callable[..., None], kind: str) -> Callable[..., None]:
    """A parser's method for one kind of media, which notes its URLs at the request's tracker."""

    @functools.wraps(parse)
    def parse_noting(parser: Any, url: str | None, uuid: str | None = None) -> None:
        parse(parser, url, uuid)
        if url:
            of_kind = vars(parser._tracker).setdefault("noted", defaultdict(list))[kind]
            of_kind.append((parser, url))

    parse_noting.bounded = True  # type: ignore[attr-defined]
    return parse_noting


def noted(tracker: Any, kind: str) -> Sequence[tuple[Any, str]]:
    """Each URL of this kind, with the parser that noted it."""
    found: Sequence[tuple[Any, str]] = vars(tracker).get("noted", {}).get(kind, ())
    return found


async def fetch_elsewhere(
    media: Sequence[tuple[Any, str]], what: str, timeout_s: int
) -> dict[str, str]:
    """The `data:` URLs of those media that are no such URLs. `what` they are, for a refusal. Raises
    what vLLM raises if one cannot be fetched, and VLLMValidationError if they are too large
    together.
    """
    parsers = {url: parser for parser, url in media if url[:5].lower() != "data:"}
    places, fetched = asyncio.Semaphore(FETCHED_AT_ONCE), 0

    def check() -> None:
        if fetched > MAX_FETCHED_BYTES:
            raise VLLMValidationError(
                f"The {what} that a request names may have {MAX_FETCHED_BYTES >> 20} MiB "
                "together. Send fewer or smaller ones.",
                parameter="url",
            )

    async def one(url: str, connector: Any) -> str:
        nonlocal fetched
        async with places:
            check()
            data = await connector.load_from_url_async(url, _MediaFile(), fetch_timeout=timeout_s)
            fetched += len(data)
            check()
            return "data:media/any;base64," + base64.b64encode(data).decode()

    tasks = [asyncio.create_task(one(url, p._connector)) for url, p in parsers.items()]
    try:
        return dict(zip(parsers, await asyncio.gather(*tasks), strict=True))
    finally:
        for task in tasks:
            task.cancel()
