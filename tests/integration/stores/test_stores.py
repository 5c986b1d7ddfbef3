"""One contract for all stores: a folder, S3 (a moto process) and GCS (an emulator process). Then
what each does when its server fails.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import ssl
import subprocess
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
from aiohttp import web

from shared.adapters.identity import StoredAdapter, StoredFile
from shared.errors import AdapterNotFound, ConfigError, StoreUnavailable
from shared.stores import AdapterStore, Skipped, open_store
from shared.stores import azure as azure_module
from shared.stores import gcs as gcs_module
from shared.stores import s3 as s3_module
from shared.stores import transfer as transfer_module
from shared.stores.listing import SkipReason
from tests.store_servers import (
    GCSPlace,
    LocalPlace,
    Place,
    S3Place,
    gcs_process,
    http_server,
    moto_process,
    paging_proxy,
)

pytestmark = pytest.mark.usefixtures("store_credentials")

CONFIG = b'{"peft_type": "LORA", "r": 8}'
_numbers = itertools.count()


@pytest.fixture(params=["local", "s3", "gcs"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    bucket = f"bucket-{next(_numbers)}"
    if request.param == "local":
        return LocalPlace(tmp_path / "adapters")
    if request.param == "s3":
        return S3Place(request.getfixturevalue("moto_url"), bucket, "models/lora/")
    return GCSPlace(request.getfixturevalue("gcs_url"), bucket, "models/lora/")


def opened(place: Place) -> AdapterStore:
    return open_store(place.url, place.options)


def put_adapter(place: Place, name: str, weights: bytes = b"weights") -> None:
    place.put(f"{name}/adapter_config.json", CONFIG)
    place.put(f"{name}/adapter_model.safetensors", weights)


async def listed(store: AdapterStore) -> dict[str, StoredAdapter]:
    return {adapter.name: adapter async for adapter in store.list()}


async def found(store: AdapterStore, name: str) -> StoredAdapter:
    adapter = await store.find(name)
    assert adapter is not None
    return adapter


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


async def test_a_listing_shows_nested_adapters_and_nothing_else(place: Place) -> None:
    put_adapter(place, "pirate")
    put_adapter(place, "team/eu/haiku")
    put_adapter(place, "team/eu/haiku/v2")
    place.put("pirate/checkpoint/state.json", b"{}")
    place.put("README.md", b"hello")
    place.put("notes/todo.txt", b"x")
    place.put("pirate/not allowed.txt", b"x")
    async with opened(place) as store:
        adapters = await listed(store)
    both = {"adapter_config.json", "adapter_model.safetensors"}
    assert {name: {f.path for f in a.files} for name, a in adapters.items()} == {
        "pirate": both,
        "team/eu/haiku": both,
        "team/eu/haiku/v2": both,
    }
    assert adapters["team/eu/haiku"].size_bytes == len(CONFIG) + len(b"weights")
    assert store.skipped == Skipped()


async def test_an_empty_store_lists_nothing(place: Place) -> None:
    place.put("README.md", b"hello")
    async with opened(place) as store:
        assert await listed(store) == {}
        assert await store.find("README.md") is None


async def test_find_agrees_with_the_listing(place: Place) -> None:
    for name in ("a", "a/b", "a-b", "a.b", "deep/er/c"):
        put_adapter(place, name, name.encode())
    async with opened(place) as store:
        adapters = await listed(store)
        assert {name: await store.find(name) for name in adapters} == adapters


@pytest.mark.parametrize(
    "name",
    [
        "nobody",
        "team",
        "a/nobody",
        "",
        "/",
        "a/",
        "../a",
        "a/../a",
        "/etc",
        ".",
        "a\x00",
        "A",
        "x" * 5000,
    ],
)
async def test_find_answers_none_for_a_name_that_is_no_adapter(place: Place, name: str) -> None:
    put_adapter(place, "a")
    put_adapter(place, "team/b")
    async with opened(place) as store:
        assert await store.find(name) is None


async def test_a_fetch_brings_the_adapter_s_own_files_with_equal_bytes(
    place: Place, tmp_path: Path
) -> None:
    weights = os.urandom(3 * 1024 * 1024 + 17)
    put_adapter(place, "big/one", weights)
    place.put("big/one/adapter_model.bin", b"a stale pickle")
    into = tmp_path / "into"
    into.mkdir()
    async with opened(place) as store:
        await store.fetch(await found(store, "big/one"), into)
    assert contents(into) == {
        "adapter_config.json": CONFIG,
        "adapter_model.safetensors": weights,
    }


async def test_the_digest_changes_with_the_files_and_only_then(place: Place) -> None:
    put_adapter(place, "a", b"1" * 200_000)
    put_adapter(place, "b")
    async with opened(place) as store:
        first = await listed(store)
        put_adapter(place, "b", b"others come and go")
        assert (await found(store, "a")).digest == first["a"].digest
        place.put("a/adapter_model.safetensors", b"2" * 200_000)
        replaced = await found(store, "a")
        place.put("a/optimizer.pt", b"x")
        assert await found(store, "a") == replaced, "a bystander is no part of the adapter"
        second = await listed(store)
    assert first["a"].digest != replaced.digest
    assert replaced == second["a"]
    assert first["b"].digest != second["b"].digest


@pytest.mark.parametrize("change", ["replaced", "deleted"])
async def test_a_fetch_of_an_adapter_that_changed_is_not_found(
    place: Place, tmp_path: Path, change: str
) -> None:
    put_adapter(place, "a", b"before")
    async with opened(place) as store:
        stale = await found(store, "a")
        if change == "replaced":
            place.put("a/adapter_model.safetensors", b"AFTER!")
        else:
            place.delete("a/adapter_model.safetensors")
        with pytest.raises(AdapterNotFound):
            await store.fetch(stale, tmp_path / "into")


async def test_a_fetch_never_writes_outside_of_its_folder_nor_over_a_file(
    place: Place, tmp_path: Path
) -> None:
    put_adapter(place, "a")
    into = tmp_path / "into"
    into.mkdir()
    async with opened(place) as store:
        adapter = await found(store, "a")
        for path in ("../evil", "/tmp/evil", "x/../../evil"):
            forged = StoredAdapter("a", adapter.digest, (StoredFile(path, 1, "v"), *adapter.files))
            with pytest.raises(AdapterNotFound):
                await store.fetch(forged, into)
        assert contents(into) == {}
        victim = tmp_path / "victim"
        victim.write_bytes(b"mine")
        (into / "adapter_config.json").symlink_to(victim)
        with pytest.raises(StoreUnavailable):
            await store.fetch(adapter, into)
    assert victim.read_bytes() == b"mine"
    assert not (tmp_path / "evil").exists()


async def test_a_bucket_or_folder_that_does_not_exist_is_unavailable_in_clear_words(
    place: Place,
) -> None:
    async with open_store(place.elsewhere("no-such-place"), place.options) as store:
        with pytest.raises(StoreUnavailable, match=r"no such bucket|does not exist"):
            await listed(store)
        with pytest.raises(StoreUnavailable, match=r"no such bucket|does not exist"):
            await store.find("a")


async def test_a_cancelled_fetch_ends_at_once_and_leaves_the_store_usable(
    place: Place, tmp_path: Path
) -> None:
    put_adapter(place, "a", os.urandom(1 << 20))
    async with opened(place) as store:
        adapter = await found(store, "a")
        task = asyncio.create_task(store.fetch(adapter, tmp_path / "one"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(60):
                await task
        await store.fetch(adapter, tmp_path / "two")
        assert len(contents(tmp_path / "two")) == 2


async def test_more_objects_than_a_page_of_s3_are_all_listed(moto_url: str) -> None:
    place = S3Place(moto_url, f"bucket-{next(_numbers)}", "many/")
    for i in range(510):
        put_adapter(place, f"adapter-{i:04d}")
    async with opened(place) as store:
        assert sorted(await listed(store)) == [f"adapter-{i:04d}" for i in range(510)]
        assert (await found(store, "adapter-0509")).files
    # The prefix itself is now a folder of many pages without a config. A miss must not walk through
    # them.
    async with open_store(f"s3://{place.url.split('/')[2]}", place.options) as store:
        assert await store.find("many") is None


async def test_pages_of_gcs_are_followed_to_the_end_and_each_asked_once(gcs_url: str) -> None:
    place = GCSPlace(gcs_url, f"bucket-{next(_numbers)}", "many/")
    for i in range(50):
        put_adapter(place, f"adapter-{i:04d}")
    async with (
        paging_proxy(gcs_url, 7) as (url, asked),
        open_store(place.url, {"endpoint_url": url}) as store,
    ):
        assert sorted(await listed(store)) == [f"adapter-{i:04d}" for i in range(50)]
        assert asked == ["", *(str(start) for start in range(7, 100, 7))]


async def test_a_miss_in_a_large_folder_costs_at_most_three_requests(gcs_url: str) -> None:
    place = GCSPlace(gcs_url, f"bucket-{next(_numbers)}", "")
    for i in range(40):
        place.put(f"0/{i:04d}", b"x")
    async with (
        paging_proxy(gcs_url, 5) as (url, asked),
        open_store(place.url, {"endpoint_url": url}) as store,
    ):
        assert await store.find("0") is None
        assert len(asked) == 3


async def test_s3_anonymous_reads_without_any_credentials(
    moto_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = S3Place(moto_url, f"bucket-{next(_numbers)}", "p/")
    put_adapter(place, "a")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    async with open_store(place.url.replace("s3://", "s3://anonymous@"), place.options) as store:
        assert set(await listed(store)) == {"a"}
        assert "anonymous" not in store.url
    async with open_store(place.url, place.options) as store:
        with pytest.raises(StoreUnavailable, match="no usable credentials"):
            await listed(store)


async def test_s3_access_denied_says_so_and_names_no_key(moto_url: str, tmp_path: Path) -> None:
    place = S3Place(moto_url, f"bucket-{next(_numbers)}", "p/")
    put_adapter(place, "a")
    async with opened(place) as store:
        adapter = await found(store, "a")
        with place.access_denied():
            for attempt in (listed(store), store.find("a"), store.fetch(adapter, tmp_path)):
                with pytest.raises(StoreUnavailable, match="denied access") as caught:
                    await attempt
                assert "test-" not in caught.value.message
                assert caught.value.__cause__ is not None


async def test_gcs_honours_the_emulator_variable(
    gcs_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = GCSPlace(gcs_url, f"bucket-{next(_numbers)}", "")
    put_adapter(place, "a")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_url.removeprefix("http://"))
    async with open_store(place.url) as store:
        assert set(await listed(store)) == {"a"}


async def test_gcs_sends_no_token_in_the_clear_and_none_where_anonymous(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "missing.json"))
    headers: list[set[str]] = []

    async def respond(request: web.Request) -> web.Response:
        headers.append(set(request.headers))
        return web.json_response({})

    async with (
        http_server(respond) as url,
        open_store("gs://bucket/p", {"endpoint_url": url}) as store,
    ):
        assert await listed(store) == {}
    assert headers and all("Authorization" not in h for h in headers)
    async with open_store(
        "gs://bucket/p", {"endpoint_url": "https://127.0.0.1:1", "anonymous": True}
    ):
        pass
    with pytest.raises(StoreUnavailable, match="no usable credentials"):
        async with open_store("gs://bucket/p", {"endpoint_url": "https://127.0.0.1:1"}):
            pass


async def test_an_unknown_s3_profile_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="profile"):
        async with open_store("s3://bucket", {"profile": "nobody"}):
            pass


@pytest.mark.parametrize("kind", ["s3", "gcs"])
def test_a_killed_server_is_unavailable_within_seconds(kind: str, tmp_path: Path) -> None:
    with moto_process() if kind == "s3" else gcs_process() as server:
        place = (
            S3Place(server.url, "bucket", "p/")
            if kind == "s3"
            else GCSPlace(server.url, "bucket", "p/")
        )
        put_adapter(place, "a")

        async def scenario() -> None:
            async with opened(place) as store:
                adapter = await found(store, "a")
                server.kill()
                async with asyncio.timeout(10):
                    calls = (listed(store), store.find("a"), store.fetch(adapter, tmp_path))
                    outcomes = await asyncio.gather(*calls, return_exceptions=True)
                assert [
                    (isinstance(o, StoreUnavailable), "unreachable" in str(o)) for o in outcomes
                ] == [(True, True)] * 3

        asyncio.run(scenario())


# What no emulator does. A server of the test's own answers as S3 or GCS would on a bad day.

FILE = StoredFile("adapter_model.safetensors", 100_000, "7")
ADAPTER = StoredAdapter("a", "0" * 16, (FILE,))


URLS = {
    "s3": "s3://bucket/p",
    "gcs": "gs://bucket/p",
    "azure": "abfss://bucket@account.dfs.core.windows.net/p",
}


def bad_day(kind: str, url: str) -> AbstractAsyncContextManager[AdapterStore]:
    return open_store(URLS[kind], {"endpoint_url": url})


@pytest.fixture(params=["s3", "gcs"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=list(URLS))
def any_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AZURE_STORAGE_KEY", "a2V5")
    return str(request.param)


@pytest.fixture
def one_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switches off retries. They take seconds and do not matter to these tests."""
    monkeypatch.setattr(gcs_module, "MAX_ATTEMPTS", 1)
    monkeypatch.setattr(s3_module, "MAX_ATTEMPTS", 1)
    monkeypatch.setattr(azure_module, "MAX_ATTEMPTS", 1)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (403, "denied access"),
        (401, "denied access"),
        (429, "slow down"),
        (503, "slow down"),
        (500, "failed"),
        (400, "failed"),
    ],
)
@pytest.mark.usefixtures("one_attempt")
async def test_each_refusal_has_its_own_words_and_quotes_nothing(
    any_kind: str, status: int, words: str, tmp_path: Path
) -> None:
    async def respond(request: web.Request) -> web.Response:
        return web.Response(
            status=status,
            text="<Error><Code>hunter2 hunter2</Code><Message>hunter2</Message></Error>",
        )

    async with http_server(respond) as url, bad_day(any_kind, url) as store:
        for attempt in (store.find("a"), store.fetch(ADAPTER, tmp_path)):
            with pytest.raises(StoreUnavailable, match=words) as caught:
                await attempt
            assert "hunter2" not in caught.value.message
            assert (caught.value.retry_after_s is not None) == (words == "slow down")


S3_ITEM = (
    "<Contents><Key>p/a/adapter_config.json</Key><Size>2</Size>"
    "<ETag>&quot;1&quot;</ETag></Contents>"
)
S3_LISTING = f"<ListBucketResult>{S3_ITEM}</ListBucketResult>"
GCS_LISTING = '{"items": [{"name": "p/a/adapter_config.json", "size": "2", "generation": "1"}]}'
AZURE_LISTING = (
    "<EnumerationResults><Prefix>p/</Prefix><Blobs><Blob><Name>p/a/adapter_config.json</Name>"
    "<Properties><Last-Modified>Mon, 30 Nov 2026 09:00:00 GMT</Last-Modified><Etag>1</Etag>"
    "<Content-Length>2</Content-Length><BlobType>BlockBlob</BlobType></Properties></Blob></Blobs>"
    "<NextMarker/></EnumerationResults>"
)
LISTINGS = {"s3": S3_LISTING, "gcs": GCS_LISTING, "azure": AZURE_LISTING}
RETRIED_S = 8.0  # less than a client waits for an unknown name


@pytest.mark.parametrize("kind", ["s3", "azure"])
@pytest.mark.usefixtures("one_attempt")
async def test_a_file_that_is_archived_is_not_taken_for_one_that_is_denied(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_KEY", "a2V5")

    async def respond(request: web.Request) -> web.Response:
        code = {"s3": "InvalidObjectState", "azure": "BlobArchived"}[kind]
        return web.Response(
            status={"s3": 403, "azure": 409}[kind],
            headers={"x-ms-error-code": code},
            text=f"<Error><Code>{code}</Code><Message>Archived</Message></Error>",
            content_type="application/xml",
        )

    async with http_server(respond) as url, bad_day(kind, url) as store:
        with pytest.raises(StoreUnavailable, match="archived: restore it"):
            await store.fetch(ADAPTER, tmp_path)


def listing_reply(kind: str, text: str) -> web.Response:
    form = "application/json" if kind == "gcs" else "application/xml"
    return web.Response(text=text, content_type=form)


@pytest.mark.usefixtures("one_attempt")
async def test_a_reply_that_is_no_listing_is_an_error_and_not_an_empty_store(any_kind: str) -> None:
    async def respond(request: web.Request) -> web.Response:
        return web.Response(
            text="<html>Sign in to the hotel's network</html", content_type="text/html"
        )

    async with http_server(respond) as url, bad_day(any_kind, url) as store:
        with pytest.raises(StoreUnavailable):
            await listed(store)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("s3", ""),
        ("s3", "<html><body>Sign in</body></html>"),
        *(
            ("s3", S3_LISTING.replace(part, other))
            for part, other in (
                ("<Key>p/a/adapter_config.json</Key>", ""),
                ("<Size>2</Size>", ""),
                ("<Size>2<", "<Size>two<"),
                ("<ETag>&quot;1&quot;</ETag>", ""),
                ("</Size>", "</Size><LastModified>yesterday</LastModified>"),
            )
        ),
        ("gcs", ""),
        ("gcs", "[]"),
        ("gcs", GCS_LISTING.replace('"2"', "Infinity")),
        ("gcs", GCS_LISTING.replace('"size": "2", ', "")),
        ("gcs", GCS_LISTING.replace('"1"', '"\\ud800"')),
        ("azure", ""),
        ("azure", "<html><body>Sign in</body></html>"),
        ("azure", "<EnumerationResults/>"),
        ("azure", AZURE_LISTING.replace("<NextMarker/>", "<NextMarker>2</NextMarker>")),
        *(
            ("azure", AZURE_LISTING.replace(part, other))
            for part, other in (
                ("<Name>p/a/adapter_config.json</Name>", ""),
                ("<Content-Length>2</Content-Length>", ""),
                ("<Content-Length>2<", "<Content-Length>two<"),
                ("<Etag>1</Etag>", ""),
                ("Mon, 30 Nov 2026 09:00:00 GMT", "yesterday"),
            )
        ),
    ],
)
@pytest.mark.usefixtures("one_attempt")
async def test_a_listing_that_lacks_something_or_never_ends_is_an_error(
    kind: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_KEY", "a2V5")

    async def respond(request: web.Request) -> web.Response:
        return listing_reply(kind, text)

    async with http_server(respond) as url, bad_day(kind, url) as store:
        for attempt in (listed(store), store.find("a")):
            async with asyncio.timeout(RETRIED_S):
                with pytest.raises(StoreUnavailable, match="makes no sense"):
                    await attempt


def make_certificate(certificate: Path, key: Path) -> None:
    what = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    whose = ["-subj", "/CN=store", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*what, *whose, *files], check=True, capture_output=True)


async def test_a_store_whose_certificate_nobody_vouches_for_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_KEY", "a2V5")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make_certificate(certificate, key)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)

    async def respond(request: web.Request) -> web.Response:
        return listing_reply("s3", S3_LISTING)

    async with http_server(respond, context) as url:
        for where in (*URLS.values(), "hf://org"):
            options = {"endpoint_url": url} | ({"anonymous": True} if where == URLS["gcs"] else {})
            into = tmp_path / where.partition(":")[0]
            into.mkdir()
            async with open_store(where, options) as store:
                for attempt in (listed(store), store.fetch(ADAPTER, into)):
                    with pytest.raises(StoreUnavailable, match="certificate is not valid, or not"):
                        await attempt
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        async with bad_day("s3", url) as store:
            assert set(await listed(store)) == {"a"}


async def test_one_failure_of_the_server_is_retried(any_kind: str) -> None:
    answers = iter([500])

    async def respond(request: web.Request) -> web.Response:
        if status := next(answers, None):
            return web.Response(status=status)
        return listing_reply(any_kind, LISTINGS[any_kind])

    async with (
        asyncio.timeout(RETRIED_S),
        http_server(respond) as url,
        bad_day(any_kind, url) as store,
    ):
        assert set(await listed(store)) == {"a"}


def file_server(
    data: bytes, cut_after: list[int], ranges: list[str], etag: str = "7"
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """Serves one file with range support. It cuts its connections after the numbers of bytes in
    `cut_after`, one entry per answer.
    """

    async def respond(request: web.Request) -> web.StreamResponse:
        if request.query.get("alt") == "json":
            return web.json_response({"generation": etag})
        asked = request.headers.get("Range", "")
        ranges.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-") or 0)
        headers = {
            "ETag": f'"{etag}"',
            "x-goog-generation": etag,
            "Content-Length": str(len(data) - start),
        }
        reply = web.StreamResponse(status=206 if asked else 200, headers=headers)
        await reply.prepare(request)
        limit = cut_after.pop(0) if cut_after else len(data)
        await reply.write(data[start : start + limit])
        if limit < len(data) - start:
            assert request.transport is not None
            request.transport.close()
        return reply

    return respond


async def test_a_cut_transfer_goes_on_where_it_stopped(kind: str, tmp_path: Path) -> None:
    data = os.urandom(FILE.size_bytes)
    ranges: list[str] = []
    async with (
        http_server(file_server(data, [30_000, 20_000], ranges)) as url,
        bad_day(kind, url) as store,
    ):
        await store.fetch(ADAPTER, tmp_path)
    assert contents(tmp_path) == {FILE.path: data}
    assert ranges == ["", "bytes=30000-", "bytes=50000-"]


async def test_a_transfer_that_brings_nothing_more_is_given_up(kind: str, tmp_path: Path) -> None:
    ranges: list[str] = []
    async with (
        http_server(file_server(os.urandom(FILE.size_bytes), [30_000, 0, 0, 0], ranges)) as url,
        bad_day(kind, url) as store,
    ):
        with pytest.raises(StoreUnavailable, match="cut"):
            await store.fetch(ADAPTER, tmp_path)
    assert len(ranges) == 2


@pytest.mark.parametrize("size_bytes", [FILE.size_bytes - 1, FILE.size_bytes + 1])
async def test_a_file_of_another_size_than_listed_is_never_taken_for_complete(
    kind: str, tmp_path: Path, size_bytes: int
) -> None:
    async with (
        http_server(file_server(os.urandom(size_bytes), [], [])) as url,
        bad_day(kind, url) as store,
    ):
        with pytest.raises(StoreUnavailable):
            await store.fetch(ADAPTER, tmp_path)


async def test_another_version_is_refused_even_where_the_server_ignores_the_condition(
    kind: str, tmp_path: Path
) -> None:
    async with (
        http_server(file_server(os.urandom(FILE.size_bytes), [], [], etag="8")) as url,
        bad_day(kind, url) as store,
    ):
        with pytest.raises(AdapterNotFound):
            await store.fetch(ADAPTER, tmp_path)


async def test_a_store_that_trickles_is_given_up_at_the_deadline(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer_module, "GRACE_S", 0.5)
    monkeypatch.setattr(transfer_module, "MIN_BYTES_PER_S", 1 << 30)
    stopped = asyncio.Event()

    async def respond(request: web.Request) -> web.StreamResponse:
        reply = web.StreamResponse(
            headers={
                "ETag": '"7"',
                "x-goog-generation": "7",
                "Content-Length": str(FILE.size_bytes),
            }
        )
        await reply.prepare(request)
        await reply.write(b"x")
        await stopped.wait()
        return reply

    async with http_server(respond) as url, bad_day(kind, url) as store:
        async with asyncio.timeout(60):
            with pytest.raises(StoreUnavailable, match="too slow"):
                await store.fetch(ADAPTER, tmp_path)
        stopped.set()


async def test_folders_that_azure_lists_before_their_neighbours_are_no_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So does an account with a hierarchical namespace."""
    monkeypatch.setenv("AZURE_STORAGE_KEY", "a2V5")
    begin, blob, end = AZURE_LISTING.partition("<Blob>")[0], "", "</Blobs></EnumerationResults>"
    for name in ("a", "a/adapter_config.json", "a-b", "a-b/adapter_config.json"):
        size = "<Content-Length>2</Content-Length>" if "." in name else ""
        blob += (
            f"<Blob><Name>p/{name}</Name><Properties><Etag>1</Etag>{size}"
            "<BlobType>BlockBlob</BlobType></Properties></Blob>"
        )

    async def respond(request: web.Request) -> web.Response:
        return listing_reply("azure", begin + blob + end)

    async with http_server(respond) as url, bad_day("azure", url) as store:
        assert set(await listed(store)) == {"a", "a-b"}


async def test_a_directory_bucket_that_lists_in_no_order_is_sorted_first() -> None:
    async def respond(request: web.Request) -> web.Response:
        keys = [
            f"{name}/adapter_{part}"
            for part in ("model.safetensors", "config.json")
            for name in "ba"
        ]
        items = "".join(
            f"<Contents><Key>{key}</Key><Size>2</Size><ETag>&quot;1&quot;</ETag></Contents>"
            for key in keys
        )
        return web.Response(
            text=f"<ListBucketResult>{items}</ListBucketResult>", content_type="application/xml"
        )

    async with http_server(respond) as url:
        options = {"endpoint_url": url, "anonymous": True, "region": "us-east-1"}
        async with open_store("s3://loras--use1-az4--x-s3", options) as store:
            assert {name: len(a.files) for name, a in (await listed(store)).items()} == {
                "a": 2,
                "b": 2,
            }
        async with open_store("s3://loras", options) as store:
            with pytest.raises(StoreUnavailable, match="makes no sense"):
                await listed(store)


# What only a file system does.


async def test_links_are_followed_below_the_root_and_refused_beyond_it(tmp_path: Path) -> None:
    place = LocalPlace(tmp_path / "root")
    outside = LocalPlace(tmp_path / "outside")
    put_adapter(outside, "secret")
    put_adapter(place, "v7")
    put_adapter(place, "half")
    root = place.folder
    (root / "prod").symlink_to("v7")
    (root / "leak").symlink_to(tmp_path / "outside" / "secret")
    (root / "half" / "leak.safetensors").symlink_to(
        tmp_path / "outside" / "secret" / "adapter_model.safetensors"
    )
    (root / "v7" / "up").symlink_to("..")
    (root / "v7" / "itself").symlink_to(".")
    async with opened(place) as store:
        adapters = await listed(store)
        assert set(adapters) == {"v7", "prod", "half"}
        assert {f.path for f in adapters["half"].files} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        assert await store.find("leak") is None
        assert await store.find("prod") == adapters["prod"]
        assert await store.find("v7/itself") is None
        reasons = {SkipReason.LINK: 1, SkipReason.LOOP: 4}
        assert dict(store.skipped.counts) == reasons, store.skipped
        assert "leads out of the store" in store.skipped.why("leak")
        async with opened(outside) as elsewhere:
            secret = next(
                f
                for f in (await found(elsewhere, "secret")).files
                if f.path == "adapter_model.safetensors"
            )
        stolen = StoredFile("leak.safetensors", secret.size_bytes, secret.version)
        with pytest.raises(AdapterNotFound):
            await store.fetch(StoredAdapter("half", "0" * 16, (stolen,)), tmp_path / "into")


async def test_a_pipe_or_a_socket_in_the_folder_neither_hangs_nor_shows(tmp_path: Path) -> None:
    place = LocalPlace(tmp_path / "root")
    put_adapter(place, "a")
    os.mkfifo(place.folder / "a" / "pipe")
    async with opened(place) as store, asyncio.timeout(60):
        assert {f.path for f in (await listed(store))["a"].files} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }


async def test_two_adapters_of_equal_size_and_clamped_time_have_different_digests(
    tmp_path: Path,
) -> None:
    place = LocalPlace(tmp_path / "root")
    for name, weights in (("a", b"1" * 50_000), ("b", b"2" * 50_000)):
        put_adapter(place, name, weights)
        os.utime(place.folder / name / "adapter_model.safetensors", ns=(10**18, 10**18))
    async with opened(place) as store:
        before = await listed(store)
        place.put("a/adapter_model.safetensors", b"3" * 50_000)
        os.utime(place.folder / "a" / "adapter_model.safetensors", ns=(10**18, 10**18))
        after = await listed(store)
    assert before["a"].files[1].version != before["b"].files[1].version
    assert before["a"].digest != after["a"].digest
    assert before["b"] == after["b"]


async def test_copies_of_a_folder_with_its_times_agree_on_digests(tmp_path: Path) -> None:
    one, two = LocalPlace(tmp_path / "host1"), LocalPlace(tmp_path / "host2")
    for place in (one, two):
        put_adapter(place, "a")
        for file in (place.folder / "a").iterdir():
            os.utime(file, ns=(10**18, 10**18))
    async with opened(one) as first, opened(two) as second:
        assert await listed(first) == await listed(second)
