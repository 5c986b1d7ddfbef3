"""Shell. What one video takes in the worker's memory, known before it is decoded. vLLM bounds each
of its frames to 0.5 GiB, and decodes 32 of them, so a file of a megabyte could take 16 GiB.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media.video import VideoMediaIO
from vllm.multimodal.video import VideoLoader
from vllm.multimodal.video_decoders import opencv

from worker.engine.vllm.tenants import sound_memory
from worker.engine.vllm.tenants.picture_files import pixels_of

MAX_FRAMES = 216_000
"""One hour at 60 frames/s. vLLM asks the decoder for as many as the file says that it has."""
RGB_BYTES = 3
WIDTH, HEIGHT = 3, 4
"""OpenCV's numbers of these two properties."""
FRAMES = "video/jpeg"
"""vLLM's type of a `data:` URL with one picture for each frame, and commas between them."""


class _Bounded(VideoLoader):  # type: ignore[misc]
    """Put before one of vLLM's loaders. Some of them list all frames before they choose, and some
    read them in their own way.
    """

    @classmethod
    def _prepare_source(cls, source: Any) -> Any:
        if source.total_frames_num > MAX_FRAMES:
            raise VLLMValidationError(
                f"The video says that it has {source.total_frames_num} frames; {MAX_FRAMES} are "
                "served. Send a shorter one.",
                parameter="video_url",
            )
        return super()._prepare_source(source)

    @classmethod
    def read_frames(cls, cap: Any, frame_idx: list[int], *more: Any, **named: Any) -> Any:
        _check(int(cap.get(WIDTH)) * int(cap.get(HEIGHT)) * len(frame_idx))
        return super().read_frames(cap, frame_idx, *more, **named)


@functools.cache
def _bounded(loader: type) -> type:
    return type(loader.__name__, (_Bounded, loader), {})


def bound_videos() -> None:
    """Called once for each process."""
    decode, load = opencv.decode_opencv, VideoMediaIO.load_base64
    if hasattr(load, "bounded"):
        return

    @functools.wraps(decode)
    def decode_bounded(loader: type, *more: Any, **named: Any) -> Any:
        return decode(_bounded(loader), *more, **named)

    @functools.wraps(load)
    def load_bounded(media: VideoMediaIO, media_type: str, data: str) -> Any:
        if media_type.lower() == FRAMES:
            most = media.num_frames
            frames = data.split(",", most)[:most] if most > 0 else data.split(",")
            pixels = 0
            for frame in frames:
                pixels += pixels_of(frame)
                _check(2 * pixels)  # they are put into one block afterwards
        return load(media, media_type, data)

    load_bounded.bounded = True  # type: ignore[attr-defined]
    opencv.decode_opencv = decode_bounded
    VideoMediaIO.load_base64 = load_bounded


def _check(pixels: int) -> None:
    if pixels * RGB_BYTES > sound_memory.MAX_BYTES:
        raise VLLMValidationError(
            f"The frames of a video may take {sound_memory.MAX_BYTES >> 20} MiB once they are "
            "decoded. Send a smaller or shorter one.",
            parameter="video_url",
        )
