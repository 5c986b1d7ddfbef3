"""Pictures are bounded by what they take once they are decoded, for a request and for all."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import random
import struct
import time
import zlib
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from tests.engine.tenants.test_media_names import parser_of

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP")


def url_of(data: bytes) -> str:
    return "data:image/any;base64," + base64.b64encode(data).decode()


def picture(form: str, width: int, height: int, **more: Any) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (width, height)).save(data, form, **more)
    return data.getvalue()


def png_that_says(width: int, height: int) -> bytes:
    """The head of a PNG of this size. Nobody has to make the picture."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checked = b"\0\0\0\x0d" + head + struct.pack(">I", zlib.crc32(head))
    return b"\x89PNG\r\n\x1a\n" + checked + b"\0\0\0\x40IDAT" + bytes(68)


@pytest.mark.parametrize("form", FORMATS)
def test_the_size_is_read_from_a_picture_of_each_kind(form: str) -> None:
    from worker.engine.vllm.tenants.picture_files import pixels_of

    assert pixels_of(url_of(picture(form, 40, 30))) == 1200


def test_the_size_may_stand_behind_what_a_camera_writes() -> None:
    from worker.engine.vllm.tenants.picture_files import pixels_of

    data = picture("JPEG", 40, 30)
    segment = b"\xff\xe5" + struct.pack(">H", 65_000) + bytes(64_998)
    assert pixels_of(url_of(data[:2] + segment * 4 + data[2:])) == 1200


@pytest.mark.parametrize("url", ["", "data:image/png;base64,!", "data:"])
def test_what_is_no_picture_has_no_pixels(url: str) -> None:
    from worker.engine.vllm.tenants.picture_files import pixels_of

    assert pixels_of(url) == 0


def iptc(inside: bytes) -> bytes:
    """It says that it has one pixel."""

    def field(record: int, number: int, value: bytes) -> bytes:
        return struct.pack(">BBBH", 0x1C, record, number, len(value)) + value

    head = ((20, b"\1"), (30, b"\1"), (60, b"\1\0"), (65, b"\1"), (120, b"\5"))
    return b"".join(field(3, *it) for it in head) + field(8, 10, inside)


def icon(inside: bytes) -> bytes:
    """Pillow decodes it where its size is read."""
    entry = struct.pack("<BBBBHHII", 1, 1, 0, 0, 1, 32, len(inside), 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + inside


def tiff_of_one_pixel(side: int) -> bytes:
    """It has one tile, which is this large."""
    data = zlib.compress(bytes(side * side))
    tags = {256: 1, 257: 1, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 325: len(data)}
    tags[324] = 14 + 12 * (len(tags) + 1)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + data


@pytest.mark.parametrize(
    "data",
    [iptc(picture("PNG", 600, 600)), icon(picture("PNG", 600, 600)), tiff_of_one_pixel(512)],
    ids=["iptc", "icon", "tiff"],
)
def test_a_picture_whose_head_does_not_tell_its_size_is_not_decoded(data: bytes) -> None:
    from vllm.multimodal.media.image import ImageMediaIO

    from worker.engine.vllm.tenants.picture_memory import bound_pictures

    bound_pictures()
    ImageMediaIO().load_bytes(picture("PNG", 600, 600))
    with Image.open(io.BytesIO(data)) as opened:
        opened.load()  # Pillow itself decodes it
    with pytest.raises(ValueError, match="cannot identify"):
        ImageMediaIO().load_bytes(data)


def tracker_with(connector: Any) -> tuple[Any, Any]:
    """A parser, and vLLM's tracker with the pictures that it is given."""
    from vllm.renderers.chat_utils import AsyncMultiModalItemTracker

    from worker.engine.vllm.tenants.picture_memory import bound_pictures

    bound_pictures()
    bound_pictures()
    parser, found = parser_of("AsyncMultiModalContentParser")
    tracker: Any = object.__new__(AsyncMultiModalItemTracker)
    tracker._items_by_modality = {"image": found.items}
    tracker.add = found.add
    tracker._model_config = SimpleNamespace(is_multimodal_model=False)
    tracker._modality_order = {"image": []}
    parser._tracker, parser._connector = tracker, connector
    return parser, tracker


class Web:
    """A connector that fetches pictures by their addresses, and says what it was asked for."""

    def __init__(self, data: bytes) -> None:
        self.data, self.fetched, self.decoded = data, 0, 0

    async def load_from_url_async(self, url: str, media_io: Any, fetch_timeout: int) -> Any:
        self.fetched += 1
        return media_io.load_bytes(self.data)

    async def fetch_image_async(self, url: str) -> Any:
        self.decoded += 1
        raise ValueError(url[:30])


@pytest.mark.parametrize("count", [1, 20])
@pytest.mark.parametrize("elsewhere", [False, True])
async def test_a_request_with_too_many_pixels_is_refused_before_any_is_decoded(
    count: int, elsewhere: bool
) -> None:
    from vllm.exceptions import VLLMValidationError

    from worker.engine.vllm.tenants.picture_memory import MAX_PIXELS

    side = int((MAX_PIXELS / count) ** 0.5)
    web = Web(png_that_says(side, side))
    parser, tracker = tracker_with(web)
    for n in range(count + 1):
        parser.parse_image(f"https://elsewhere/{n}.png" if elsewhere else url_of(web.data))
    with pytest.raises(VLLMValidationError, match="pixels together"):
        await asyncio.wait_for(tracker.resolve_items(), 60)
    assert not web.decoded


async def test_what_was_fetched_is_decoded_and_fetched_no_second_time() -> None:
    web = Web(picture("PNG", 40, 30))
    parser, tracker = tracker_with(web)
    for n in (1, 2, 1):
        parser.parse_image(f"https://elsewhere/{n}.png")
    with pytest.raises(ValueError, match="data:media/any;base64"):
        await asyncio.wait_for(tracker.resolve_items(), 60)
    assert (web.fetched, web.decoded) == (2, 3)


async def test_what_a_request_has_fetched_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.exceptions import VLLMValidationError

    from worker.engine.vllm.tenants import media_files

    monkeypatch.setattr(media_files, "MAX_FETCHED_BYTES", 10_000)
    web = Web(bytes(1000))
    parser, tracker = tracker_with(web)
    for n in range(100):
        parser.parse_image(f"https://elsewhere/{n}.png")
    with pytest.raises(VLLMValidationError, match="together"):
        await asyncio.wait_for(tracker.resolve_items(), 60)
    assert web.fetched < 20 and not web.decoded


async def test_heads_that_take_long_to_read_do_not_hold_the_loop() -> None:
    """A PNG may have 64 MB of compressed texts before its pixels."""
    text = b"zTXta\0\0" + zlib.compress(bytes((1 << 20) - 10))
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    data = picture("PNG", 1, 1)
    parser, tracker = tracker_with(Web(b""))
    for _ in range(20):
        parser.parse_image(url_of(data[:33] + chunk * 60 + data[33:]))
    before = time.thread_time()
    with pytest.raises(ValueError, match="data:image"):
        await asyncio.wait_for(tracker.resolve_items(), 60)
    assert time.thread_time() - before < 0.1


def test_one_that_no_library_would_decode_is_refused_like_that() -> None:
    from worker.engine.vllm.tenants.picture_files import pixels_of
    from worker.engine.vllm.tenants.picture_memory import MAX_PIXELS

    assert pixels_of(url_of(png_that_says(60_000, 60_000))) > MAX_PIXELS


async def test_no_more_pixels_are_held_than_there_are_and_nobody_is_passed() -> None:
    from worker.engine.vllm.tenants.media_budget import MediaBudget

    for seed in range(50):
        dice, budget, held = random.Random(seed), MediaBudget(100), 0
        begun: list[int] = []

        async def hold(
            n: int, budget: MediaBudget = budget, dice: random.Random = dice, begun: Any = begun
        ) -> None:
            nonlocal held
            pixels = dice.randint(1, 100)
            await budget.take(pixels)
            begun.append(n)
            held += pixels
            try:
                assert held <= 100
                for _ in range(dice.randint(0, 5)):
                    await asyncio.sleep(0)
            finally:
                held -= pixels
                budget.give_back(pixels)

        tasks = [asyncio.create_task(hold(n)) for n in range(40)]
        for _ in range(20):
            await asyncio.sleep(0)
            dice.choice(tasks).cancel()
        async with asyncio.timeout(60):
            done = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(r is None or isinstance(r, asyncio.CancelledError) for r in done), done
        assert begun == sorted(begun)
        await asyncio.wait_for(budget.take(100), 60)


async def test_pixels_are_given_back_once_the_last_picture_is_forgotten_in_any_thread() -> None:
    from worker.engine.vllm.tenants.media_budget import HeldMedia, MediaBudget

    budget = MediaBudget(10)
    await budget.take(10)
    pictures: list[object] = [Image.new("RGB", (1, 1)) for _ in range(3)]
    HeldMedia(budget, 10).until_forgotten(pictures, 10)
    waiting = asyncio.create_task(budget.take(10))
    pictures.pop()
    gc.collect()
    await asyncio.sleep(0.01)
    assert not waiting.done()
    await asyncio.to_thread(pictures.clear)
    gc.collect()
    await asyncio.wait_for(waiting, 60)


async def test_pixels_of_a_request_that_fails_are_given_back() -> None:
    from worker.engine.vllm.tenants.picture_memory import MAX_PIXELS

    side = int(MAX_PIXELS**0.5)
    for _ in range(20):
        parser, tracker = tracker_with(Web(b""))
        parser.parse_image(url_of(png_that_says(side, side)))
        with pytest.raises(ValueError, match="data:image"):
            await asyncio.wait_for(tracker.resolve_items(), 60)
