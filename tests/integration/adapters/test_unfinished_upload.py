"""A refusal for an upload in progress says when to ask again, and ends with the upload. A hub has
no such uploads: each of its commits is whole.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from azure.storage.blob.aio import ContainerClient

from tests.harness import chat_body, cluster, make_adapter, sim_config
from tests.store_servers import GCSPlace, LocalPlace, S3Place, azurite_process

pytestmark = pytest.mark.usefixtures("store_credentials")

AZURE_ACCOUNT = "devstoreaccount1"
# The emulator's well-known key, the same everywhere.
AZURE_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)
LIMIT_S = 60
_numbers = itertools.count()
Put = Callable[[str, bytes], Awaitable[None]]


@pytest.mark.parametrize("kind", ["file", "s3", "gcs"])
async def test_a_422_for_half_an_upload_has_retry_after_and_ends_with_the_upload(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bucket = f"half-{next(_numbers)}"
    place: LocalPlace | S3Place | GCSPlace = LocalPlace(tmp_path / "adapters")
    if kind == "s3":
        place = S3Place(request.getfixturevalue("moto_url"), bucket, "all/")
    if kind == "gcs":
        place = GCSPlace(request.getfixturevalue("gcs_url"), bucket, "all/")

    async def put(key: str, data: bytes) -> None:
        await asyncio.to_thread(place.put, key, data)

    await _ends_with_the_upload(place.url, place.options, put, tmp_path)


async def test_so_it_does_in_azure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_KEY", AZURE_KEY)
    credential = {"account_name": AZURE_ACCOUNT, "account_key": AZURE_KEY}
    with azurite_process(tmp_path / "azurite") as server:
        endpoint = f"{server.url}/{AZURE_ACCOUNT}"
        async with ContainerClient(endpoint, "loras", credential=credential) as client:
            await client.create_container()

            async def put(key: str, data: bytes) -> None:
                await client.upload_blob(f"all/{key}", data, overwrite=True)

            url = f"abfss://loras@{AZURE_ACCOUNT}.dfs.core.windows.net/all"
            await _ends_with_the_upload(url, {"endpoint_url": endpoint}, put, tmp_path)


async def _ends_with_the_upload(
    url: str, options: dict[str, object], put: Put, tmp_path: Path
) -> None:
    """A client that waits as long as Retry-After says is refused at most once after the upload is
    complete: within those two seconds the store was looked at again. So it is if the config comes
    last, and nothing is an adapter before.
    """
    whole = make_adapter(tmp_path, "whole")
    config_text = (whole / "adapter_config.json").read_bytes()
    weights = (whole / "adapter_model.safetensors").read_bytes()
    await put("new/adapter_config.json", config_text)
    await put("cut/adapter_model.safetensors", weights)
    await put("cut/adapter_config.json", config_text[:20])
    config = sim_config(url, catalog_refresh_s=3600.0)  # the next listing would come after an hour
    config["llm_configs"][0]["lora_config"]["store"] = options
    async with cluster(config, tmp_path) as c, asyncio.timeout(LIMIT_S):
        await c.start_worker("w0")

        async def ask(name: str, expected: str = "") -> int:
            body = chat_body(f"sim:{name}", max_tokens=2)
            async with c.http.post(f"{c.url}/v1/chat/completions", json=body) as answer:
                if answer.status not in (200, 404):
                    assert answer.status == 422, await answer.text()
                    assert answer.headers["Retry-After"] == "2"
                    code = (await answer.json())["error"]["code"]
                    assert code == f"invalid_adapter_{expected}"
                return answer.status

        await put("bare/adapter_model.safetensors", weights)
        assert await ask("bare") == 404
        await put("bare/adapter_config.json", config_text)
        await asyncio.sleep(2)
        assert await ask("bare") == 200

        for name, expected, missing, data in (
            ("new", "missing_file", "adapter_model.safetensors", weights),
            ("cut", "incomplete", "adapter_config.json", config_text),
        ):
            for _ in range(3):  # the first look at the store and the ones that follow the refusal
                assert await ask(name, expected) == 422
            await put(f"{name}/{missing}", data)
            if await ask(name, expected) == 422:
                await asyncio.sleep(2)  # as the client was told
                assert await ask(name, expected) == 200
