"""Shell. What one video takes in the worker's memory, known before it is decoded. vLLM bounds each
of its frames to 0.5 GiB, and decodes 32 of them, so a file of a megabyte could take 16 GiB.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media.video import VideoMediaIO
from vllm.multimodal.video_decoders.opencv import OpenCVVideoBackendMixin

from worker.engine.vllm.tenants import sound_memory
from worker.engine.vllm.tenants.picture_files import pixels_of

MAX_FRAMES = 216_000
"""One hour at 60 frames/s. vLLM asks the decoder for as many as the file says that it has."""
RGB_BYTES = 3
WIDTH, HEIGHT = 3, 4
"""OpenCV's numbers of these two properties."""
FRAMES = "video/jpeg"
"""vLLM's type of a `data:` URL with one picture for each frame, and commas between them."""


def bound_videos() -> None:
    """Called once for each process."""
    read, load = OpenCVVideoBackendMixin.read_frames, VideoMediaIO.load_base64
    if hasattr(load, "bounded"):
        return

    def read_bounded(
        _: type[Any], /, cap: Any, frame_idx: list[int], total_frames_num: int, **more: Any
    ) -> Any:
        if total_frames_num > MAX_FRAMES:
            raise VLLMValidationError(
                f"The video says that it has {total_frames_num} frames; {MAX_FRAMES} are served. "
                "Send a shorter one.",
                parameter="video_url",
            )
        _check(int(cap.get(WIDTH)) * int(cap.get(HEIGHT)) * len(frame_idx))
        return read(cap, frame_idx, total_frames_num, **more)

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
    OpenCVVideoBackendMixin.read_frames = classmethod(read_bounded)
    VideoMediaIO.load_base64 = load_bounded


def _check(pixels: int) -> None:
    if pixels * RGB_BYTES > sound_memory.MAX_BYTES:
        raise VLLMValidationError(
            f"The frames of a video may take {sound_memory.MAX_BYTES >> 20} MiB once they are "
            "decoded. Send a smaller or shorter one.",
            parameter="video_url",
        )
