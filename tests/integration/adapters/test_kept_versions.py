"""Older versions of an adapter, in buckets that keep what was overwritten or deleted."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from datetime import UTC, datetime
from pathlib import Path

import boto3
import pytest
from aiohttp import web

from shared.adapters.identity import StoredAdapter, StoredFile
from shared.errors import AdapterNotFound
from shared.stores import AdapterStore, open_store
from tests.harness import cluster, make_adapter, sim_config
from tests.store_servers import http_server

pytestmark = pytest.mark.usefixtures("store_credentials")

CONFIG = b'{"r": 8}'
APART_S = 2.5
_numbers = itertools.count()


class VersionedBucket:
    """A bucket of a moto server, with versioning."""

    def __init__(self, url: str, *, versioning: bool = True) -> None:
        self.name = f"kept-{next(_numbers)}"
        self.options: dict[str, object] = {"endpoint_url": url, "region": "us-east-1"}
        self.s3 = boto3.client("s3", endpoint_url=url, region_name="us-east-1")
        self.s3.create_bucket(Bucket=self.name)
        if versioning:
            status = {"Status": "Enabled"}
            self.s3.put_bucket_versioning(Bucket=self.name, VersioningConfiguration=status)

    def put(self, key: str, data: bytes) -> str:
        answer = self.s3.put_object(Bucket=self.name, Key=f"all/{key}", Body=data)
        return str(answer.get("VersionId", ""))

    def delete(self, key: str) -> None:
        self.s3.delete_object(Bucket=self.name, Key=f"all/{key}")

    def opened(self) -> AdapterStore:
        return open_store(f"s3://{self.name}/all", self.options)


async def found(store: AdapterStore, name: str) -> StoredAdapter:
    adapter = await store.find(name)
    assert adapter is not None
    return adapter


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


async def test_what_was_overwritten_or_deleted_between_listing_and_fetch_comes_by_its_version_id(
    moto_url: str, tmp_path: Path
) -> None:
    bucket, old = VersionedBucket(moto_url), os.urandom(300_000)
    bucket.put("a/adapter_config.json", CONFIG)
    bucket.put("a/adapter_model.safetensors", old)
    async with bucket.opened() as store:
        listed = await found(store, "a")
        bucket.put("a/adapter_model.safetensors", os.urandom(300_000))
        bucket.put("a/adapter_model.safetensors", os.urandom(300_000))
        await store.fetch(listed, tmp_path / "overwritten")
        bucket.delete("a/adapter_config.json")
        await store.fetch(listed, tmp_path / "deleted")
    whole = {"adapter_config.json": CONFIG, "adapter_model.safetensors": old}
    assert contents(tmp_path / "overwritten") == contents(tmp_path / "deleted") == whole


async def test_an_older_version_is_found_by_its_digest_or_an_object_s_version_id(
    moto_url: str, tmp_path: Path
) -> None:
    """All within one second: buckets count in seconds, so of versions that came in two of them, an
    order within the second is not known.
    """
    began, ended = 0, 1
    while began != ended:
        bucket = VersionedBucket(moto_url)
        seen: list[tuple[StoredAdapter, str]] = []
        began = int(time.time())
        async with bucket.opened() as store:
            for n in range(3):
                bucket.put("a/adapter_config.json", b'{"r": %d}' % n)
                version_id = bucket.put("a/adapter_model.safetensors", b"weights %d" % n)
                bucket.put("a/README.md", b"card %d" % n)
                bucket.put("a/b/adapter_config.json", b"another adapter %d" % n)
                seen.append((await found(store, "a"), version_id))
        ended = int(time.time())
    async with bucket.opened() as store:
        for n, (adapter, version_id) in enumerate(seen):
            for version in (adapter.digest, adapter.digest[:8], version_id):
                assert await store.find_version("a", version) == adapter
            await store.fetch(adapter, tmp_path / str(n))
            assert contents(tmp_path / str(n)) == {
                "adapter_config.json": b'{"r": %d}' % n,
                "adapter_model.safetensors": b"weights %d" % n,
            }
        for version in ("0" * 16, "nobody", ""):
            assert await store.find_version("b", version) is None
        assert await store.find_version("../a", seen[0][0].digest) is None


async def test_a_bucket_without_versioning_keeps_nothing(moto_url: str, tmp_path: Path) -> None:
    bucket = VersionedBucket(moto_url, versioning=False)
    bucket.put("a/adapter_config.json", CONFIG)
    bucket.put("a/adapter_model.safetensors", b"old")
    async with bucket.opened() as store:
        old = await found(store, "a")
        bucket.put("a/adapter_model.safetensors", b"new")
        assert await store.find_version("a", old.digest) is None
        with pytest.raises(AdapterNotFound):
            await store.fetch(old, tmp_path)


@pytest.mark.parametrize("status", [403, 501])
async def test_a_server_that_lists_no_versions_keeps_nothing(status: int, tmp_path: Path) -> None:
    async def respond(request: web.Request) -> web.Response:
        if "versions" in request.query:
            return web.Response(status=status, text="<Error><Code>No</Code></Error>")
        return web.Response(status=412)

    async with (
        http_server(respond) as url,
        open_store("s3://bucket", {"endpoint_url": url, "region": "us-east-1"}) as store,
    ):
        assert await store.find_version("a", "0" * 16) is None
        listed = StoredAdapter("a", "0" * 16, (StoredFile("adapter_config.json", 8, "tag"),))
        with pytest.raises(AdapterNotFound):
            await store.fetch(listed, tmp_path)


async def test_a_request_and_an_alias_get_an_older_version_that_no_worker_has(
    moto_url: str, tmp_path: Path
) -> None:
    bucket, digests, ids = VersionedBucket(moto_url), [], []
    async with bucket.opened() as store:
        for n in range(3):
            if n:
                # Stores count time in seconds. Uploads that follow each other within one cannot
                # be told apart from one.
                await asyncio.sleep(APART_S)
            made = make_adapter(tmp_path, f"v{n}", rank=8 + n)
            bucket.put("a/adapter_config.json", (made / "adapter_config.json").read_bytes())
            weights = (made / "adapter_model.safetensors").read_bytes()
            ids.append(bucket.put("a/adapter_model.safetensors", weights))
            digests.append((await found(store, "a")).digest)
    config = sim_config(f"s3://{bucket.name}/all")
    lora = config["llm_configs"][0]["lora_config"]
    lora["store"] = bucket.options
    lora["aliases"] = {"prod": f"a@{digests[0]}", "next": f"a@{ids[1]}"}
    async with cluster(config, tmp_path) as c:
        await c.start_worker("w0")
        for model, digest in (
            ("sim:a", digests[2]),
            (f"sim:a@{digests[1]}", digests[1]),
            (f"sim:a@{ids[0]}", digests[0]),
            ("sim:prod", digests[0]),
            ("sim:next", digests[1]),
        ):
            status, body, _ = await c.chat(model, max_tokens=5)
            assert status == 200, body
            assert f"digest={digest}" in body["choices"][0]["message"]["content"]
        for version in ("0" * 16, "0" * 8, "nobody"):
            status, body, _ = await c.chat(f"sim:a@{version}", max_tokens=5)
            assert (status, body["error"]["code"]) == (404, "adapter_not_found")


async def test_generations_of_gcs_are_found_and_fetched_by_their_number(tmp_path: Path) -> None:
    """The emulator keeps no generations, so a server of the test's own does."""
    objects: list[dict[str, object]] = []
    data: dict[str, bytes] = {}

    def put(path: str, content: bytes) -> str:
        now, generation = 1_700_000_000 + len(data), str(1000 + len(data))
        time = datetime.fromtimestamp(now, UTC).isoformat()
        for row in objects:
            if row["name"] == f"all/{path}" and "timeDeleted" not in row:
                row["timeDeleted"] = time
        row = {"name": f"all/{path}", "size": str(len(content)), "generation": generation}
        objects.append(row | {"timeCreated": time})
        data[generation] = content
        return generation

    async def respond(request: web.Request) -> web.Response:
        if request.query.get("alt") == "media":
            generation = request.query["generation"]
            return web.Response(body=data[generation], headers={"x-goog-generation": generation})
        every = request.query.get("versions") == "true"
        rows = [
            row
            for row in sorted(objects, key=lambda row: str(row["name"]))
            if str(row["name"]).startswith(request.query["prefix"])
            and (every or "timeDeleted" not in row)
        ]
        return web.json_response({"items": rows})

    async with (
        http_server(respond) as url,
        open_store("gs://bucket/all", {"endpoint_url": url}) as store,
    ):
        put("a/adapter_config.json", CONFIG)
        generation = put("a/adapter_model.safetensors", b"old")
        first = await found(store, "a")
        put("a/adapter_model.safetensors", b"new")
        second = await found(store, "a")
        assert first.digest != second.digest
        for version in (first.digest, first.digest[:8], generation):
            assert await store.find_version("a", version) == first
        assert await store.find_version("a", second.digest) == second
        assert await store.find_version("a", "0" * 16) is None
        await store.fetch(first, tmp_path)
    assert contents(tmp_path) == {
        "adapter_config.json": CONFIG,
        "adapter_model.safetensors": b"old",
    }
