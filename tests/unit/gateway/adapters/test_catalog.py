"""The catalog of adapters: listings of a real local store, and what is remembered of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.adapters import catalog as module
from gateway.adapters.catalog import Catalog
from gateway.api import models as models_module
from gateway.api.models import ModelList, model_list
from shared.adapters.identity import StoredAdapter
from shared.errors import AdapterNotFound, StoreUnavailable
from shared.stores.local import LocalStore

LIMIT_S = 20


class Watched(LocalStore):
    """The real local store. A test can hold its answers, and read what it was asked."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.asked: list[str] = []
        self.listed = 0
        self.open = asyncio.Event()
        self.open.set()

    async def find(self, name: str) -> StoredAdapter | None:
        self.asked.append(name)
        await self.open.wait()
        return await super().find(name)

    async def list(self) -> AsyncIterator[StoredAdapter]:
        self.listed += 1
        await self.open.wait()
        async for adapter in super().list():
            yield adapter


def put(root: Path, name: str, weights: bytes = b"weights") -> None:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    (folder / "adapter_model.safetensors").write_bytes(weights)


def put_config(root: Path, name: str, text: str) -> None:
    (root / name / "adapter_config.json").write_text(text)


def a_catalog(root: Path) -> tuple[Catalog, Watched]:
    store = Watched(str(root))
    return Catalog("tiny", store, refresh_s=3600.0), store


def take_down(root: Path) -> None:
    root.rename(root.with_name("elsewhere"))


def bring_up(root: Path) -> None:
    root.with_name("elsewhere").rename(root)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "adapters"
    for name in ("pirate", "team/haiku"):
        put(folder, name)
    return folder


async def test_a_listing_shows_every_adapter_and_only_then_is_the_catalog_listed(
    root: Path,
) -> None:
    catalog, _ = a_catalog(root)
    assert not catalog.listed and not catalog.known
    await catalog.refresh()
    assert catalog.listed and sorted(catalog.known) == ["pirate", "team/haiku"]


async def test_known_names_never_ask_the_store(root: Path) -> None:
    catalog, store = a_catalog(root)
    await catalog.refresh()
    store.open.clear()  # whoever asked now would wait for ever
    async with asyncio.timeout(LIMIT_S):
        assert (await catalog.find("pirate")).name == "pirate"
    assert store.asked == []


async def test_an_unknown_name_is_asked_for_once_and_known_from_then_on(root: Path) -> None:
    catalog, store = a_catalog(root)
    first = await catalog.find("team/haiku")
    assert await catalog.find("team/haiku") is first
    assert store.asked == ["team/haiku"] and "team/haiku" in catalog.known


async def test_an_adapter_that_appears_after_the_listing_is_found_by_name(root: Path) -> None:
    catalog, _ = a_catalog(root)
    await catalog.refresh()
    put(root, "new")
    assert (await catalog.find("new")).name == "new"


async def test_who_asks_for_a_trainer_s_folder_is_told_of_the_checkpoint_below(root: Path) -> None:
    catalog, _ = a_catalog(root)
    for step in (500, 1000):
        put(root, f"run/checkpoint-{step}")
    await catalog.refresh()
    with pytest.raises(AdapterNotFound, match="`run/checkpoint-1000`"):
        await catalog.find("run")


async def test_half_of_an_upload_is_listed_under_its_old_version(root: Path) -> None:
    catalog = Catalog("tiny", Watched(str(root)), refresh_s=3600.0, settle_s=3600.0)
    await catalog.refresh()
    old = catalog.known["pirate"]
    put(root, "pirate", b"others")
    (root / "pirate" / "adapter_config.json").write_text("{}")
    await catalog.refresh()
    new = catalog.known["pirate"]
    assert new.digest != old.digest, "all of it is new"
    (root / "pirate" / "adapter_config.json").write_text('{"r": 4}')
    await catalog.refresh()
    assert catalog.known["pirate"] == new


async def test_to_look_again_does_not_take_half_of_an_upload(root: Path) -> None:
    catalog = Catalog("tiny", Watched(str(root)), refresh_s=3600.0, settle_s=3600.0)
    await catalog.refresh()
    old = catalog.known["pirate"]
    put_config(root, "pirate", '{"r": 4}')
    assert await catalog.look_again("pirate") == old == catalog.known["pirate"]
    assert catalog.is_settling("pirate")
    put(root, "pirate", b"others")
    assert await catalog.look_again("pirate") != old, "all of it is new"
    assert not catalog.is_settling("pirate")


@pytest.mark.parametrize("by_listing", [True, False])
async def test_a_config_that_was_gone_for_a_moment_does_not_make_half_an_upload_a_version(
    root: Path, by_listing: bool
) -> None:
    catalog = Catalog("tiny", Watched(str(root)), refresh_s=3600.0, settle_s=3600.0)
    await catalog.refresh()
    old = catalog.known["pirate"]

    async def look() -> StoredAdapter | None:
        if by_listing:
            await catalog.refresh()
        else:
            with contextlib.suppress(AdapterNotFound):
                await catalog.look_again("pirate")
        return catalog.known.get("pirate")

    (root / "pirate" / "adapter_config.json").unlink()
    assert await look() is None
    put_config(root, "pirate", '{"r": 4}')
    assert await look() == old and catalog.is_settling("pirate")
    (root / "pirate" / "adapter_model.safetensors").write_bytes(b"others")
    new = await look()
    assert new not in (None, old) and not catalog.is_settling("pirate")


async def test_a_listing_between_config_and_weights_does_not_delay_a_new_adapter(
    root: Path,
) -> None:
    catalog = Catalog("tiny", Watched(str(root)), refresh_s=3600.0, settle_s=3600.0)
    put(root, "fresh")
    weights = root / "fresh" / "adapter_model.safetensors"
    weights.unlink()
    await catalog.refresh()
    assert len(catalog.known["fresh"].files) == 1
    weights.write_bytes(b"weights")
    await catalog.refresh()
    assert len(catalog.known["fresh"].files) == 2


async def test_who_says_that_an_upload_is_whole_is_believed(root: Path) -> None:
    catalog = Catalog("tiny", Watched(str(root)), refresh_s=3600.0, settle_s=3600.0)
    await catalog.refresh()
    old = catalog.known["pirate"]
    put_config(root, "pirate", '{"r": 4}')
    new = await catalog.look_again("pirate", whole=True)
    assert new != old and catalog.known["pirate"] == new and not catalog.is_settling("pirate")


async def test_what_was_refused_is_not_kept_while_its_upload_goes_on(root: Path) -> None:
    catalog = Catalog("tiny", Watched(str(root)), refresh_s=3600.0, settle_s=3600.0)
    await catalog.refresh()
    cut = catalog.known["pirate"]
    catalog.refused(cut)
    put(root, "pirate", b"more of the weights")
    (root / "pirate" / "adapter_config.json").touch()
    await catalog.refresh()
    assert catalog.known["pirate"].digest != cut.digest


async def test_the_store_is_asked_again_for_what_was_refused_but_not_each_time(root: Path) -> None:
    catalog, store = a_catalog(root)
    await catalog.refresh()
    cut = catalog.known["pirate"]
    put(root, "pirate", b"the whole weights")
    for _ in range(5):
        catalog.refused(cut)
    async with asyncio.timeout(LIMIT_S):
        while catalog.known["pirate"] == cut:
            await asyncio.sleep(0)
    catalog.refused(cut)
    assert store.asked == ["pirate"]


async def test_concurrent_questions_for_one_name_ask_the_store_once(root: Path) -> None:
    catalog, store = a_catalog(root)
    store.open.clear()
    async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
        finds = [
            tasks.create_task(catalog.find(name)) for name in ["pirate"] * 5 + ["team/haiku"] * 2
        ]
        while len(store.asked) < 2:
            await asyncio.sleep(0)
        store.open.set()
    assert sorted(store.asked) == ["pirate", "team/haiku"]
    assert len({f.result().digest for f in finds[:5]}) == 1


async def test_one_clients_leaving_does_not_cancel_the_question_of_the_others(root: Path) -> None:
    catalog, store = a_catalog(root)
    store.open.clear()
    async with asyncio.timeout(LIMIT_S):
        first, second = (
            asyncio.ensure_future(catalog.find("pirate")),
            asyncio.ensure_future(catalog.find("pirate")),
        )
        while not store.asked:
            await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        store.open.set()
        assert (await second).name == "pirate"
    assert store.asked == ["pirate"]


async def test_an_answer_that_nobody_waits_for_any_more_is_kept(root: Path) -> None:
    catalog, store = a_catalog(root)
    store.open.clear()
    async with asyncio.timeout(LIMIT_S):
        alone = asyncio.ensure_future(catalog.find("pirate"))
        while not store.asked:
            await asyncio.sleep(0)
        alone.cancel()
        store.open.set()
        assert (await catalog.find("pirate")).name == "pirate"
    assert store.asked == ["pirate"]


async def test_a_name_that_does_not_exist_is_not_asked_for_again_at_once(root: Path) -> None:
    catalog, store = a_catalog(root)
    for _ in range(3):
        with pytest.raises(AdapterNotFound) as caught:
            await catalog.find("nobody")
        assert caught.value.param == "model"
    assert store.asked == ["nobody"]


async def test_a_name_that_did_not_exist_is_asked_for_again_after_its_time(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog, store = a_catalog(root)
    monkeypatch.setattr(module, "NEGATIVE_TTL_S", 0.0)
    with pytest.raises(AdapterNotFound):
        await catalog.find("late")
    put(root, "late")
    assert (await catalog.find("late")).name == "late"
    assert store.asked == ["late", "late"]


async def test_a_listing_that_shows_a_missing_name_ends_its_being_missing(root: Path) -> None:
    catalog, _ = a_catalog(root)
    with pytest.raises(AdapterNotFound):
        await catalog.find("late")
    put(root, "late")
    await catalog.refresh()
    assert (await catalog.find("late")).name == "late"


async def test_the_memory_of_missing_names_is_bounded(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_NEGATIVE", 3)
    catalog, store = a_catalog(root)
    names = [f"nobody{i}" for i in range(5)]
    for name in [*names, names[-1], names[0]]:
        with pytest.raises(AdapterNotFound):
            await catalog.find(name)
    assert store.asked == [*names, names[0]], "the newest is remembered, the oldest forgotten"
    assert len(catalog._missing) <= 3


async def test_a_store_that_is_down_keeps_what_is_known_and_fails_what_is_not(root: Path) -> None:
    catalog, _ = a_catalog(root)
    await catalog.refresh()
    take_down(root)
    with pytest.raises(StoreUnavailable):
        await catalog.refresh()
    assert (await catalog.find("pirate")).name == "pirate" and sorted(catalog.known) == [
        "pirate",
        "team/haiku",
    ]
    with pytest.raises(StoreUnavailable):
        await catalog.find("nobody")


async def test_a_name_is_not_taken_for_missing_because_the_store_was_down(root: Path) -> None:
    catalog, _ = a_catalog(root)
    take_down(root)
    with pytest.raises(StoreUnavailable):
        await catalog.find("pirate")
    bring_up(root)
    assert (await catalog.find("pirate")).name == "pirate"


async def test_a_store_that_does_not_answer_is_unavailable_in_time(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIND_TIMEOUT_S", 0.01)
    catalog, store = a_catalog(root)
    store.open.clear()
    async with asyncio.timeout(LIMIT_S):
        with pytest.raises(StoreUnavailable) as caught:
            await catalog.find("pirate")
    assert caught.value.retry_after_s
    store.open.set()
    monkeypatch.setattr(module, "FIND_TIMEOUT_S", LIMIT_S)
    assert (await catalog.find("pirate")).name == "pirate"


async def test_a_removed_adapter_is_gone_with_the_next_listing(root: Path) -> None:
    catalog, _ = a_catalog(root)
    await catalog.refresh()
    (root / "pirate" / "adapter_config.json").unlink()
    await catalog.refresh()
    assert sorted(catalog.known) == ["team/haiku"]
    with pytest.raises(AdapterNotFound):
        await catalog.find("pirate")


async def test_the_mapping_that_somebody_reads_does_not_change_under_them(root: Path) -> None:
    catalog, _ = a_catalog(root)
    await catalog.refresh()
    before = catalog.known
    put(root, "new")
    await catalog.find("new")
    assert "new" not in before and "new" in catalog.known


async def test_to_look_again_asks_the_store_and_gets_the_new_version(root: Path) -> None:
    catalog, store = a_catalog(root)
    await catalog.refresh()
    old = await catalog.find("pirate")
    put(root, "pirate", b"other weights, longer")
    assert (await catalog.find("pirate")).digest == old.digest
    assert (await catalog.look_again("pirate")).digest != old.digest
    assert store.asked == ["pirate"] and catalog.known["pirate"].digest != old.digest


async def test_to_look_again_after_a_removal_is_not_found(root: Path) -> None:
    catalog, _ = a_catalog(root)
    await catalog.refresh()
    (root / "pirate" / "adapter_config.json").unlink()
    with pytest.raises(AdapterNotFound):
        await catalog.look_again("pirate")
    assert "pirate" not in catalog.known


async def test_to_look_again_while_the_store_is_down_forgets_nothing(root: Path) -> None:
    """What the store once showed stays usable while it is down, because workers may still hold that
    version.
    """
    catalog, _ = a_catalog(root)
    await catalog.refresh()
    take_down(root)
    with pytest.raises(StoreUnavailable):
        await catalog.look_again("pirate")
    assert "pirate" in catalog.known


async def test_a_listing_is_cut_at_its_bound_and_the_rest_is_found_by_name(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_ADAPTERS", 1)
    catalog, _ = a_catalog(root)
    await catalog.refresh()
    assert len(catalog.known) == 1
    assert {(await catalog.find(n)).name for n in ("pirate", "team/haiku")} == {
        "pirate",
        "team/haiku",
    }


async def test_refreshing_goes_on_after_a_failed_listing(root: Path) -> None:
    store = Watched(str(root))
    catalog = Catalog("tiny", store, refresh_s=0.0)
    take_down(root)
    running = asyncio.create_task(catalog.run())
    async with asyncio.timeout(LIMIT_S):
        while store.listed < 2:
            await asyncio.sleep(0)
        bring_up(root)
        while not catalog.listed:
            await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert sorted(catalog.known) == ["pirate", "team/haiku"]


@given(name=st.text(max_size=20) | st.from_regex(r"(\.|/|\.\./|a){0,6}", fullmatch=True))
@settings(max_examples=30)
def test_no_name_leads_out_of_the_store(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = tmp_path_factory.getbasetemp() / "catalog-names"
    put(base, "secret")
    put(base / "adapters", "a")

    async def find() -> str | None:
        try:
            return (await a_catalog(base / "adapters")[0].find(name)).name
        except AdapterNotFound:
            return None

    assert asyncio.run(find()) in (None, "a")


# ---- what is kept while nothing changes ----------------------------------------------------------


async def test_a_listing_without_news_leaves_the_mapping_and_its_version_alone(root: Path) -> None:
    catalog, _ = a_catalog(root)
    await catalog.refresh()
    known, version = catalog.known, catalog.version
    await catalog.refresh()
    assert catalog.known is known and catalog.version == version
    put(root, "pirate", b"other weights, longer")
    await catalog.refresh()
    assert catalog.known is not known and catalog.version == version + 1


async def test_the_model_list_is_made_once_per_state_of_the_catalogs_however_many_ask(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    real = model_list
    monkeypatch.setattr(
        models_module, "model_list", lambda names, *more: made.append(1) or real(names, *more)
    )
    catalog, _ = a_catalog(root)
    models = ModelList({"tiny": catalog, "plain": None}, lambda base: (), 5)
    assert b"pirate" not in await models.body()
    await catalog.refresh()
    bodies = await asyncio.gather(*(models.body() for _ in range(20)))
    assert (
        all(
            body is bodies[0] and b'"tiny:pirate"' in body and b'"plain"' in body for body in bodies
        )
        and len(made) == 2
    )
    put(root, "new")
    await catalog.find("new")
    assert b'"tiny:new"' in await models.body() and len(made) == 3


async def test_the_event_loop_gets_its_turns_while_a_long_listing_is_taken_in(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TURN", 2)
    for number in range(10):
        put(root, f"a{number}")
    catalog, store = a_catalog(root)
    adapters = [a async for a in LocalStore(str(root)).list()]

    async def ready() -> AsyncIterator[StoredAdapter]:
        for adapter in adapters:
            yield adapter

    monkeypatch.setattr(store, "list", ready)
    turns: list[int] = []

    async def other() -> None:
        while True:
            turns.append(1)
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    await catalog.refresh()
    task.cancel()
    assert len(turns) >= len(adapters) // 2
