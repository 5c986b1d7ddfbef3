"""Names that clients give to media reach no cache of vLLM's. With real pictures it is shown by
tests/engine/oracle/test_pictures.py.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
from PIL import Image

PARSERS = ("MultiModalContentParser", "AsyncMultiModalContentParser")
METHODS = (
    ("parse_image", "data:image/png;base64,AAAA"),
    ("parse_image_pil", Image.new("RGB", (1, 1))),
    ("parse_audio", "data:audio/wav;base64,AAAA"),
    ("parse_input_audio", {"data": "AAAA", "format": "wav"}),
    ("parse_video", "data:video/mp4;base64,AAAA"),
)
NAME = "another tenant's"


class Tracker:
    """Keeps what the parser hands to vLLM's renderer."""

    video_processor_name = None
    decoded_budget = Mock()  # of vLLM 0.33

    def __init__(self) -> None:
        self.items: list[Any] = []
        self._items_by_modality: dict[str, list[Any]] = defaultdict(list)

    def add(self, modality: str, item: Any) -> None:
        self.items.append(item)
        self._items_by_modality[modality].append(item)


class Connector:
    """Fetches nothing: what it is asked for is the contents."""

    def __getattr__(self, name: str) -> Callable[..., object]:
        return lambda *args, **kwargs: args


def parser_of(kind: str) -> tuple[Any, Tracker]:
    from worker.engine.vllm.tenants.media_names import content_parsers, drop_media_names

    drop_media_names()
    drop_media_names()
    parser: Any = object.__new__(getattr(content_parsers(), kind))
    tracker = Tracker()
    parser._tracker, parser._connector = tracker, Connector()
    parser._mm_processor_kwargs = None
    parser._placeholder_storage = defaultdict(list)
    return parser, tracker


def words_of(item: Any) -> str:
    """All that vLLM keeps of an item. In its asynchronous parser that is a call with arguments."""
    return repr((item.args, item.keywords)) if isinstance(item, partial) else repr(item)


@pytest.mark.parametrize("kind", PARSERS)
@pytest.mark.parametrize(("method", "contents"), METHODS)
def test_a_name_beside_the_contents_is_dropped(kind: str, method: str, contents: object) -> None:
    parser, tracker = parser_of(kind)
    getattr(parser, method)(contents, NAME)
    (item,) = tracker.items
    assert NAME not in words_of(item)


@pytest.mark.parametrize("kind", PARSERS)
@pytest.mark.parametrize(("method", "contents"), METHODS)
@pytest.mark.parametrize("missing", [None, "", {}])
def test_a_name_in_place_of_the_contents_is_an_error(
    kind: str, method: str, contents: object, missing: object
) -> None:
    from vllm.exceptions import VLLMValidationError

    parser, tracker = parser_of(kind)
    with pytest.raises(VLLMValidationError, match="`uuid` stands for no picture"):
        getattr(parser, method)(missing, NAME)
    assert not tracker.items


@pytest.mark.parametrize("kind", PARSERS)
def test_no_method_of_vllm_s_parsers_that_takes_a_name_is_left_out(kind: str) -> None:
    from worker.engine.vllm.tenants.media_names import NAMED, content_parsers

    taking = {
        name
        for name, method in inspect.getmembers(getattr(content_parsers(), kind), inspect.isfunction)
        if name.startswith("parse_") and "uuid" in inspect.signature(method).parameters
    }
    assert taking == set(NAMED)
