"""Shell. A client may give a picture, a sound or a video a name (`uuid`). vLLM keeps what it has
made of it under that name for everybody. So one tenant could have another one's picture described,
or have others answered about its own.

Here names are dropped, and media are kept by their contents. A name in place of the contents is an
error: the next request may reach a worker that has never seen them.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from vllm.exceptions import VLLMValidationError

NAMED = (
    "parse_image",
    "parse_image_embeds",
    "parse_image_pil",
    "parse_audio",
    "parse_audio_embeds",
    "parse_input_audio",
    "parse_video",
    "parse_video_embeds",
)
"""The methods of vLLM's parsers that take contents and a name."""


def drop_media_names() -> None:
    """Called once for each process. Raises AttributeError if vLLM's parsers have changed."""
    found = content_parsers()
    for parser in (found.MultiModalContentParser, found.AsyncMultiModalContentParser):
        for name in NAMED:
            parse = getattr(parser, name)
            if not hasattr(parse, "nameless"):
                setattr(parser, name, _without_name(parse))


def content_parsers() -> Any:
    """vLLM's module with the parsers of messages' parts. vLLM 0.33 has moved it."""
    try:
        return importlib.import_module("vllm.renderers.chat_utils.content_parser")
    except ModuleNotFoundError:
        return importlib.import_module("vllm.renderers.chat_utils")


def _without_name(parse: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(parse)
    def parse_contents(parser: Any, contents: Any, uuid: str | None = None) -> None:
        missing = contents is None or (isinstance(contents, str | dict) and not contents)
        if missing and uuid is not None:
            raise VLLMValidationError(
                "`uuid` stands for no picture, sound or video here. Send the contents as well.",
                parameter="uuid",
            )
        parse(parser, contents)

    parse_contents.nameless = True  # type: ignore[attr-defined]
    return parse_contents
