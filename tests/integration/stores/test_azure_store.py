"""Adapters in Azure Blob Storage: the real SDK against Azurite, Microsoft's own emulator."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from azure.storage.blob.aio import ContainerClient

from shared.errors import AdapterNotFound, ConfigError, StoreUnavailable
from shared.stores import AdapterStore, open_store
from tests.store_servers import azurite_process

ACCOUNT = "devstoreaccount1"
# The emulator's well-known key, the same everywhere.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
CONFIG, WEIGHTS = b'{"r": 8}', bytes(range(256)) * 40


@pytest.fixture(scope="module")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with azurite_process(tmp_path_factory.mktemp("azurite")) as server:
        yield f"{server.url}/{ACCOUNT}"


@pytest_asyncio.fixture
async def container(
    azurite: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[ContainerClient]:
    monkeypatch.setenv("AZURE_STORAGE_KEY", KEY)
    credential = {"account_name": ACCOUNT, "account_key": KEY}
    async with ContainerClient(azurite, "loras", credential=credential) as client:
        await client.create_container()
        for name in ("all/a", "all/team/b c", "other/x"):
            await client.upload_blob(f"{name}/adapter_config.json", CONFIG)
            await client.upload_blob(f"{name}/adapter_model.safetensors", WEIGHTS)
        yield client
        await client.delete_container()


def opened(azurite: str, url: str = "") -> AdapterStore:
    where = url or f"abfss://loras@{ACCOUNT}.dfs.core.windows.net/all"
    return open_store(where, {"endpoint_url": azurite})


@pytest.mark.parametrize(
    "url",
    [
        f"abfss://loras@{ACCOUNT}.dfs.core.windows.net/all",
        f"azure://loras@{ACCOUNT}.blob.core.windows.net/all/",
        f"https://{ACCOUNT}.blob.core.windows.net/loras/all",
    ],
)
async def test_adapters_below_the_prefix_are_listed_found_and_fetched(
    azurite: str, container: ContainerClient, url: str, tmp_path: Path
) -> None:
    async with opened(azurite, url) as store:
        listed = {a.name: a async for a in store.list()}
        assert set(listed) == {"a", "team/b c"}
        found = await store.find("team/b c")
        assert found == listed["team/b c"] and await store.find("x") is None
        await store.fetch(found, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == WEIGHTS


async def test_a_file_that_changed_since_the_listing_is_not_fetched(
    azurite: str, container: ContainerClient, tmp_path: Path
) -> None:
    async with opened(azurite) as store:
        old = await store.find("a")
        assert old is not None
        await container.upload_blob("all/a/adapter_model.safetensors", WEIGHTS, overwrite=True)
        with pytest.raises(AdapterNotFound):
            await store.fetch(old, tmp_path)
        new = await store.find("a")
        assert new is not None and new.digest != old.digest


async def test_an_absent_container_is_unavailable_and_a_url_without_one_is_refused(
    azurite: str, container: ContainerClient
) -> None:
    async with opened(azurite, f"azure://nope@{ACCOUNT}.blob.core.windows.net/all") as store:
        with pytest.raises(StoreUnavailable, match="no such bucket"):
            await store.find("a")
    with pytest.raises(ConfigError, match="abfss://container@account"):
        open_store("azure://nope")
