"""Adapters in a Hugging Face hub: huggingface_hub against a server that speaks the hub's API."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio
from aiohttp import web

from shared.adapters.identity import CONFIG_FILE, StoredAdapter
from shared.errors import AdapterNotFound, ConfigError, StoreUnavailable
from shared.stores import AdapterStore, open_store
from shared.stores import transfer as transfer_module
from tests.harness import cluster, make_adapter, sim_config
from tests.hub_server import HubServer, hub_server

CONFIG, WEIGHTS = b'{"r": 8}', os.urandom(5000)
WHOLE = {"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS}
BYSTANDERS = {"README.md": b"card", "training_args.bin": b"x", "checkpoint-9/optimizer.pt": b"y"}


@pytest_asyncio.fixture
async def hub(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[HubServer]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "accepted")
    async with hub_server() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


async def listed(store: AdapterStore) -> dict[str, StoredAdapter]:
    return {adapter.name: adapter async for adapter in store.list()}


async def found(store: AdapterStore, name: str) -> StoredAdapter:
    adapter = await store.find(name)
    assert adapter is not None
    return adapter


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


async def test_the_adapters_of_an_organisation_are_listed_page_by_page_and_found(
    hub: HubServer,
) -> None:
    hub.page = 2
    hub.commit("acme/pirate", {**WHOLE, **BYSTANDERS})
    hub.commit("acme/base-model", {"config.json": b"{}", "model.safetensors": b"w"})
    hub.commit("acme/many", {f"{d}/{k}": v for d in ("a", "b c/d") for k, v in WHOLE.items()})
    hub.commit("acme/zebra", WHOLE)
    hub.commit("other/secret", WHOLE)
    async with open_store("hf://acme") as store:
        adapters = await listed(store)
        assert set(adapters) == {"pirate", "many/a", "many/b c/d", "zebra"}
        assert {f.path for f in adapters["pirate"].files} == set(WHOLE)
        for name, adapter in adapters.items():
            assert await store.find(name) == adapter
        for name in ("many", "base-model", "nobody", "../other/secret", "pirate/x", "a--b", ""):
            assert await store.find(name) is None
        assert await store.exists()


async def test_a_second_listing_asks_only_for_what_changed(hub: HubServer) -> None:
    for i in range(5):
        hub.commit(f"acme/a{i}", WHOLE)
    async with open_store("hf://acme") as store:
        before = await listed(store)
        hub.asked.clear()
        hub.commit("acme/a3", {**WHOLE, "adapter_model.safetensors": b"other"})
        after = await listed(store)
    assert len(hub.asked) == 2, hub.asked
    assert {n for n in after if after[n].digest != before[n].digest} == {"a3"}


async def test_a_repository_whose_answer_makes_no_sense_keeps_no_other_from_being_listed(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.stores.hub_client.MAX_REPLY_BYTES", 10_000)
    for name in ("a", "large", "z"):
        hub.commit(f"acme/{name}", WHOLE)
    async with open_store("hf://acme") as store:
        before = await listed(store)
        hub.commit("acme/a", {**WHOLE, "adapter_config.json": b'{"r": 4}'})
        hub.commit("acme/new", {**WHOLE, **{f"junk/{n}": b"" for n in range(1000)}})
        hub.commit("acme/large", {**WHOLE, **{f"junk/{n}": b"" for n in range(1000)}})
        monkeypatch.setattr(hub, "_listing", listing_without_junk(hub))
        after = await listed(store)
        assert after.keys() == {"a", "large", "z"}
        assert after["large"] == before["large"] and after["a"] != before["a"]
        assert store.skipped.total == 1 and "cannot be read" in store.skipped.why("new")


def listing_without_junk(hub: HubServer) -> Callable[[web.Request], web.Response]:
    """A hub shows only the first files of each repository there."""

    def listing(request: web.Request) -> web.Response:
        rows = [
            {"id": repo, "sha": commits[0][0], "siblings": [{"rfilename": CONFIG_FILE}]}
            for repo, commits in hub.repos.items()
        ]
        return web.json_response(rows)

    return listing


@pytest.mark.parametrize("part_bytes", [8 << 20, 1024])
async def test_a_fetch_brings_the_listed_commit_even_if_there_is_a_newer_one(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_bytes: int
) -> None:
    monkeypatch.setattr(transfer_module, "PART_BYTES", part_bytes)
    commit = hub.commit("acme/pirate", {**WHOLE, **BYSTANDERS})
    async with open_store("hf://acme") as store:
        adapter = await found(store, "pirate")
        assert {f.version for f in adapter.files} == {commit}
        hub.commit("acme/pirate", {**WHOLE, "adapter_model.safetensors": os.urandom(5000)})
        await store.fetch(adapter, tmp_path)
    assert contents(tmp_path) == WHOLE
    sent = dict(hub.tokens)
    assert sent == {"127.0.0.1": "Bearer accepted", "localhost": ""}, "no token for another host"


async def test_a_commit_that_changes_the_readme_alone_makes_no_new_version(hub: HubServer) -> None:
    hub.commit("acme/pirate", WHOLE)
    async with open_store("hf://acme") as store:
        before = await found(store, "pirate")
        hub.commit("acme/pirate", {**WHOLE, "README.md": b"card"})
        after = await found(store, "pirate")
    assert after.digest == before.digest and after.files != before.files


async def test_a_revision_pins_a_repository(hub: HubServer, tmp_path: Path) -> None:
    old = hub.commit("acme/pirate", WHOLE)
    hub.commit("acme/pirate", {**WHOLE, "adapter_model.safetensors": b"newer"})
    hub.tags["acme/pirate", "v1.0"] = old
    for revision in (old, "v1.0"):
        async with open_store(f"hf://acme/pirate@{revision}") as store:
            adapters = await listed(store)
            assert set(adapters) == {"pirate"}
            into = tmp_path / revision
            await store.fetch(adapters["pirate"], into)
            assert contents(into) == WHOLE
            assert await store.find("other") is None
    async with open_store("hf://acme/pirate@gone") as store:
        for question in (listed(store), store.find("pirate"), store.exists()):
            with pytest.raises(StoreUnavailable, match="no such repository or revision"):
                await question


async def test_an_older_version_is_found_by_commit_tag_and_digest(
    hub: HubServer, tmp_path: Path
) -> None:
    old = hub.commit("acme/pirate", WHOLE)
    hub.tags["acme/pirate", "v1.0"] = old
    async with open_store("hf://acme") as store:
        first = await found(store, "pirate")
        hub.commit("acme/pirate", {**WHOLE, "adapter_model.safetensors": b"newer"})
        assert (await found(store, "pirate")).digest != first.digest
        for version in (old, old[:10], "v1.0", first.digest, first.digest[:8]):
            assert await store.find_version("pirate", version) == first
        for version in ("0" * 16, "v2.0", "../x", "x" * 300):
            assert await store.find_version("pirate", version) is None
        await store.fetch(first, tmp_path)
    assert contents(tmp_path) == WHOLE


async def test_what_strangers_propose_and_what_a_pin_leaves_out_is_not_served(
    hub: HubServer,
) -> None:
    pinned = hub.commit("acme/pirate", WHOLE)
    newest = hub.commit("acme/pirate", {**WHOLE, "adapter_model.safetensors": b"newer"})
    proposed = hub.commit("acme/pirate", {**WHOLE, "adapter_model.safetensors": b"a stranger's"})
    hub.proposals.add(proposed)
    hub.tags["acme/pirate", "refs/pr/1"] = proposed
    async with open_store("hf://acme") as store:
        for version in (proposed, proposed[:12], "refs/pr/1"):
            assert await store.find_version("pirate", version) is None
    async with open_store(f"hf://acme/pirate@{pinned}") as store:
        only = await found(store, "pirate")
        assert await store.find_version("pirate", only.digest) == only
        assert await store.find_version("pirate", pinned) == only
        for version in (newest, "main"):
            assert await store.find_version("pirate", version) is None


async def test_a_gated_repository_is_listed_and_its_fetch_says_what_to_do(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit("acme/pirate", WHOLE)
    hub.gated.add("acme/pirate")
    async with open_store("hf://acme") as store:
        await store.fetch(await found(store, "pirate"), tmp_path / "with")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    async with open_store("hf://acme", {"anonymous": True}) as store:
        adapter = await found(store, "pirate")
        with pytest.raises(StoreUnavailable, match="accepted its terms"):
            await store.fetch(adapter, tmp_path / "without")


async def test_adapters_of_a_hub_are_served_and_an_older_one_by_its_tag(
    hub: HubServer, tmp_path: Path
) -> None:
    digests = []
    for n in range(2):
        made = make_adapter(tmp_path, f"v{n}", rank=8 + n)
        commit = hub.commit("acme/pirate", {p.name: p.read_bytes() for p in made.iterdir()})
        hub.tags["acme/pirate", f"v{n}"] = commit
        async with open_store("hf://acme") as store:
            digests.append((await found(store, "pirate")).digest)
    async with cluster(sim_config("hf://acme"), tmp_path) as c:
        await c.start_worker("w0")
        names = ("pirate", "pirate@v0", f"pirate@{digests[0]}", f"pirate@{commit}", "pirate@v9")
        for name, digest in zip(names, (1, 0, 0, 1, None), strict=True):
            status, body, _ = await c.chat(f"sim:{name}", max_tokens=5)
            if digest is None:
                assert (status, body["error"]["code"]) == (404, "adapter_not_found")
            else:
                assert status == 200, body
                said = body["choices"][0]["message"]["content"]
                assert f"digest={digests[digest]}" in said
        async with c.http.get(f"{c.url}/v1/models") as answer:
            assert "sim:pirate" in await answer.text()


def _answer(status: int, **headers: str) -> web.Response:
    return web.json_response({"error": "x"}, status=status, headers=headers)


@pytest.mark.parametrize(
    ("status", "headers", "said"),
    [
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "check HF_TOKEN"),
        (401, {}, "check HF_TOKEN"),
        (403, {}, "check HF_TOKEN"),
        (429, {"Retry-After": "300"}, "slow down"),
        (500, {}, "failed"),
        (503, {}, "failed"),
    ],
)
async def test_a_hub_that_fails_is_unavailable_in_clear_words_and_never_absent(
    hub: HubServer, tmp_path: Path, status: int, headers: dict[str, str], said: str
) -> None:
    hub.commit("acme/pirate", WHOLE)
    async with open_store("hf://acme") as store:
        adapter = await found(store, "pirate")
        hub.refuse = lambda _: _answer(status, **headers)
        for question in (store.find("pirate"), listed(store), store.fetch(adapter, tmp_path)):
            with pytest.raises(StoreUnavailable, match=said):
                await question


async def test_a_hub_that_fails_once_is_asked_again(hub: HubServer) -> None:
    hub.commit("acme/pirate", WHOLE)
    failures = [_answer(502)]
    hub.refuse = lambda _: failures.pop() if failures else None
    async with open_store("hf://acme") as store:
        assert await store.find("pirate") is not None


@pytest.mark.parametrize(
    "reply", [b"<html>", b"[]", b'{"sha": "x"}', b'{"sha": null}', b'{"sha": "\\ud800"}', b"\xff"]
)
async def test_a_reply_that_makes_no_sense_is_unavailable(hub: HubServer, reply: bytes) -> None:
    hub.refuse = lambda _: web.Response(body=reply)
    async with open_store("hf://acme") as store:
        with pytest.raises(StoreUnavailable, match="makes no sense"):
            await store.find("pirate")


async def test_a_hub_that_is_silent_or_gone_is_unavailable_within_five_seconds(
    hub: HubServer,
) -> None:
    started = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        started.set()
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        async with open_store("hf://acme", {"endpoint_url": f"http://127.0.0.1:{port}"}) as store:
            async with asyncio.timeout(5):
                with pytest.raises(StoreUnavailable, match="unreachable"):
                    await store.find("pirate")
            assert started.is_set()
    finally:
        server.close()
    async with open_store("hf://acme", {"endpoint_url": f"http://127.0.0.1:{port}"}) as store:
        async with asyncio.timeout(5):
            with pytest.raises(StoreUnavailable, match="unreachable"):
                await store.find("pirate")


async def test_more_bytes_than_listed_and_a_changed_file_are_not_taken(
    hub: HubServer, tmp_path: Path
) -> None:
    hub.commit("acme/pirate", WHOLE)
    async with open_store("hf://acme") as store:
        adapter = await found(store, "pirate")
        small = json.dumps({"r": 9, "more": "x" * 500}).encode()
        # of one file: the other one, which would be too short, is fetched at the same time
        hub.refuse = lambda r: web.Response(body=small) if r.path.endswith(CONFIG_FILE) else None
        with pytest.raises(StoreUnavailable, match="more bytes than listed"):
            await store.fetch(adapter, tmp_path / "one")
        hub.refuse = lambda r: (
            web.Response(body=CONFIG, headers={"X-Repo-Commit": "0" * 40})
            if "resolve" in r.path
            else None
        )
        with pytest.raises(AdapterNotFound):
            await store.fetch(adapter, tmp_path / "two")


@pytest.mark.parametrize(
    "url", ["hf://", "hf://a/b/c", "hf://a@v1", "hf://-a", "hf://a/b@", "hf://a/b@v 1"]
)
def test_a_url_that_names_no_organisation_or_repository_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="hf://org"):
        open_store(url)
