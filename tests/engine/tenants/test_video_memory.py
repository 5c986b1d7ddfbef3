"""A video is bounded by what its frames take once they are decoded, before any of them is."""

from __future__ import annotations

import asyncio
import base64
import io
from pathlib import Path
from typing import Any

import pytest

from tests.engine.tenants.test_media_names import parser_of

SIZE = (64, 48)  # width and height in pixels
FRAME_BYTES = SIZE[0] * SIZE[1] * 3
READ = 32
"""Frames that vLLM reads of a video of more."""


@pytest.fixture
def film(tmp_path: Path) -> str:
    """40 frames."""
    import cv2
    import numpy as np

    path = tmp_path / "film.avi"
    made = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, SIZE)
    for _ in range(READ + 8):
        made.write(np.zeros((SIZE[1], SIZE[0], 3), np.uint8))
    made.release()
    return "data:video/avi;base64," + base64.b64encode(path.read_bytes()).decode()


def pictures(count: int) -> str:
    from PIL import Image

    data = io.BytesIO()
    Image.new("RGB", SIZE).save(data, "JPEG")
    return "data:video/jpeg;base64," + ",".join(
        [base64.b64encode(data.getvalue()).decode()] * count
    )


def loaders() -> list[str]:
    """The ways in which vLLM's models sample a video, but for those that need a GPU."""
    from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

    known = VIDEO_LOADER_REGISTRY
    return [name for name in known.name2class if not known.backend_requires_gpu(name)]


async def decoded(
    url: str, most_bytes: int, monkeypatch: pytest.MonkeyPatch, loader: str = "opencv"
) -> Any:
    """The frames as an array, or the failure."""
    from vllm.multimodal.media import MediaConnector

    from worker.engine.vllm.tenants import sound_memory, video_memory

    video_memory.bound_videos()
    video_memory.bound_videos()
    monkeypatch.setattr(sound_memory, "MAX_BYTES", most_bytes)
    parser, tracker = parser_of("AsyncMultiModalContentParser")
    parser._connector = MediaConnector({"video": {"video_backend": loader}})
    parser.parse_video(url)
    (found,) = await asyncio.gather(*(item() for item in tracker.items), return_exceptions=True)
    return found if isinstance(found, Exception) else found[0].media[0]


async def test_a_film_is_decoded_if_its_frames_fit(
    film: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = await decoded(film, READ * FRAME_BYTES + len(film), monkeypatch)
    assert frames.shape == (READ, SIZE[1], SIZE[0], 3)


async def test_the_files_of_films_count_since_they_are_kept(
    film: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A film of a few frames may be a file of 256 MiB where it is fetched."""
    from vllm.exceptions import VLLMValidationError
    from vllm.multimodal.media import MediaConnector

    from worker.engine.vllm.tenants import sound_memory, video_memory

    video_memory.bound_videos()
    sound_memory.bound_sounds()
    monkeypatch.setattr(sound_memory, "MAX_BYTES", 5 << 20)
    parser, tracker = parser_of("AsyncMultiModalContentParser")
    parser._connector = MediaConnector()
    kind, _, data = film.partition(",")
    padded = base64.b64decode(data) + bytes(1 << 20)
    for _ in range(8):
        parser.parse_video(f"{kind},{base64.b64encode(padded).decode()}")
    found = await asyncio.gather(*(item() for item in tracker.items), return_exceptions=True)
    refused = [one for one in found if isinstance(one, VLLMValidationError)]
    taken = READ * FRAME_BYTES + len(padded)
    assert len(found) - len(refused) == (5 << 20) // taken > 0


async def test_of_a_film_that_does_not_fit_no_frame_is_decoded(
    film: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm.multimodal.video_decoders.opencv import cv2

    read = list[object]()
    monkeypatch.setattr(cv2, "cvtColor", lambda *more: read.append(more))
    for loader in loaders():
        refusal = await decoded(film, FRAME_BYTES - 1, monkeypatch, loader)
        assert isinstance(refusal, VLLMValidationError), (loader, refusal)
        assert "The frames of a video" in str(refusal)
    refusal = await decoded(film, READ * FRAME_BYTES - 1, monkeypatch)
    assert isinstance(refusal, VLLMValidationError)
    assert not read


async def test_a_film_that_claims_frames_without_end_is_refused_before_they_are_listed(
    film: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm.multimodal.video import VIDEO_LOADER_REGISTRY
    from vllm.multimodal.video_decoders.opencv import OpenCVVideoBackendMixin

    from worker.engine.vllm.tenants.video_memory import MAX_FRAMES

    told, listed = OpenCVVideoBackendMixin.get_video_metadata, list[object]()

    def claims(cap: Any) -> Any:
        return told(cap)._replace(total_frames_num=MAX_FRAMES + 1)

    monkeypatch.setattr(OpenCVVideoBackendMixin, "get_video_metadata", staticmethod(claims))
    for loader in loaders():
        kind = VIDEO_LOADER_REGISTRY.name2class[loader]
        monkeypatch.setattr(
            kind, "compute_frames_index_to_sample", lambda **more: listed.append(more)
        )
        refusal = await decoded(film, 1 << 30, monkeypatch, loader)
        assert isinstance(refusal, VLLMValidationError), (loader, refusal)
        assert "says that it has" in str(refusal)
    assert not listed


@pytest.mark.parametrize(("count", "read"), [(3, 3), (READ + 8, READ)])
async def test_pictures_as_frames_count_as_often_as_they_are_held(
    count: int, read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM holds each picture, and puts all of them into one block."""
    from vllm.exceptions import VLLMValidationError

    held = 2 * read * FRAME_BYTES
    frames = await decoded(pictures(count), held, monkeypatch)
    assert frames.shape == (read, SIZE[1], SIZE[0], 3)
    refusal = await decoded(pictures(count), held - 1, monkeypatch)
    assert isinstance(refusal, VLLMValidationError)
