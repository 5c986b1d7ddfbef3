"""Shell. Base models in a bucket (a moto process), brought to disk once."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import pytest

from shared.errors import ConfigError
from shared.stores.mirror import local_model
from tests.store_servers import S3Place

_numbers = itertools.count()


@pytest.fixture
def place(moto_url: str, store_credentials: None) -> S3Place:
    place = S3Place(moto_url, f"models-{next(_numbers)}", "llama/")
    place.put("config.json", b"{}")
    place.put("deep", b"")  # as Data Lake Gen2 lists folders
    place.put("deep/part", b"")
    place.put("deep/part/model.safetensors", b"w" * 100_000)
    place.put("original/consolidated.pth", b"x")
    return place


async def test_a_model_is_brought_whole_and_once_however_many_workers_ask(
    place: S3Place, tmp_path: Path
) -> None:
    asked = (local_model(place.url, tmp_path, place.options) for _ in range(3))
    folders = {*await asyncio.gather(*asked)}
    assert len(folders) == 1
    folder = folders.pop()
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert found == {"config.json", "deep/part/model.safetensors"}
    assert (folder / "deep/part/model.safetensors").read_bytes() == b"w" * 100_000
    (folder / "config.json").write_bytes(b"kept")
    await local_model(place.url, tmp_path, place.options)
    assert (folder / "config.json").read_bytes() == b"kept"


async def test_another_version_gets_a_folder_of_its_own(place: S3Place, tmp_path: Path) -> None:
    before = await local_model(place.url, tmp_path, place.options)
    place.put("config.json", b'{"new": 1}')
    after = await local_model(place.url, tmp_path, place.options)
    assert before != after and (after / "config.json").read_bytes() == b'{"new": 1}'


async def test_what_is_no_model_or_cannot_be_had_is_said_with_its_address(
    place: S3Place, tmp_path: Path
) -> None:
    place.delete("config.json")
    with pytest.raises(ConfigError, match=r"s3://models-.*no config.json"):
        await local_model(place.url, tmp_path, place.options)
    with pytest.raises(ConfigError, match="s3://no-such-bucket/x"):
        await local_model("s3://no-such-bucket/x", tmp_path, place.options)
