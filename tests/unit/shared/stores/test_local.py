"""Listing a real folder of adapters, and what the next listing looks at again."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import StoreUnavailable
from shared.stores import folder_listing
from shared.stores.folder_listing import FolderListing
from shared.stores.local import LocalStore
from tests.processes import no_descriptors_left

NAMES = ["a", "b", "team/a", "team/b", "a/inner", "bad name/x", ".hidden/x"]
NOBODY = 65534
_times = itertools.count(10**18, 1000)


def age(root: Path) -> None:
    """Makes all files look as if they were written long ago, each at another time. So any change
    from now on is seen, however coarse the file system's clock is.
    """
    for folder, _, files in os.walk(root):
        for path in (folder, *(os.path.join(folder, file) for file in files)):
            if os.path.exists(path):  # a link to nowhere
                os.utime(path, ns=(0, next(_times)))


def put(root: Path, name: str, weights: bytes = b"weights") -> None:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(weights)


def remove(root: Path, name: str) -> None:
    shutil.rmtree(root / name, ignore_errors=True)


def change_in_place(root: Path, name: str) -> None:
    path = root / name / "adapter_model.safetensors"
    if path.exists():
        with path.open("r+b") as handle:
            handle.write(os.urandom(4))


def add_file(root: Path, name: str) -> None:
    if (root / name).is_dir():
        (root / name / f"note-{next(_times)}.txt").write_text("x")


def replace_file(root: Path, name: str) -> None:
    path = root / name / "adapter_model.safetensors"
    if path.exists():
        path.with_suffix(".new").write_bytes(b"WEIGHTS")
        path.with_suffix(".new").rename(path)


def drop_config(root: Path, name: str) -> None:
    (root / name / "adapter_config.json").unlink(missing_ok=True)


def move(root: Path, name: str) -> None:
    if (root / name).is_dir():
        (root / name).rename(root / f"moved-{next(_times)}")


def link(root: Path, name: str) -> None:
    target = root / f"link-{NAMES.index(name)}"
    if not target.is_symlink():
        target.symlink_to(name)


CHANGES: list[Callable[[Path, str], None]] = [
    put,
    remove,
    change_in_place,
    add_file,
    replace_file,
    drop_config,
    move,
    link,
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    return (tmp_path_factory.mktemp("root") for _ in itertools.count())


@given(
    changes=st.lists(
        st.lists(st.tuples(st.sampled_from(CHANGES), st.sampled_from(NAMES)), max_size=3),
        min_size=2,
        max_size=6,
    )
)
def test_a_listing_that_remembers_the_last_one_shows_what_a_new_one_shows(
    folders: Iterator[Path], changes: list[list[tuple[Callable[[Path, str], None], str]]]
) -> None:
    root = next(folders)
    put(root, "a")
    put(root, "team/b")
    listing = FolderListing(str(root))
    for some in changes:
        age(root)
        listing.scan(str(root))
        for change, name in some:
            change(root, name)
        adapters, skipped = listing.scan(str(root))
        fresh, fresh_skipped = FolderListing(str(root)).scan(str(root))
        assert sorted(a.name for a in adapters) == sorted(a.name for a in fresh)
        assert {a.name: a for a in adapters} == {a.name: a for a in fresh}
        assert dict(skipped.counts) == dict(fresh_skipped.counts)


def test_what_has_not_changed_is_not_read_again_and_is_the_same_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES[:4]:
        put(tmp_path, name)
    age(tmp_path)
    listing = FolderListing(str(tmp_path))
    before, _ = listing.scan(str(tmp_path))
    change_in_place(tmp_path, "b")
    opened: list[str] = []
    real = folder_listing.open_regular
    monkeypatch.setattr(
        folder_listing, "open_regular", lambda path: opened.append(path) or real(path)
    )
    after, _ = listing.scan(str(tmp_path))
    assert {os.path.dirname(path) for path in opened} == {str(tmp_path / "b")}
    old, new = ({a.name: a for a in listed} for listed in (before, after))
    assert {name for name in old if new[name] is old[name]} == {"a", "team/a", "team/b"} and new[
        "b"
    ].digest != old["b"].digest


def test_a_folder_that_changed_a_moment_ago_is_looked_at_in_full_the_next_time(
    tmp_path: Path,
) -> None:
    """The folder's time may be too coarse to show another change."""
    put(tmp_path, "a")
    listing = FolderListing(str(tmp_path))
    listing.scan(str(tmp_path))
    status = (tmp_path / "a").stat()
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    (tmp_path / "a" / "adapter_model.safetensors.index.json").write_text("x")
    (tmp_path / "a" / "adapter_model-00001-of-00002.safetensors").write_text("x")
    os.utime(tmp_path / "a", ns=(status.st_atime_ns, status.st_mtime_ns))
    adapters, _ = listing.scan(str(tmp_path))
    assert "adapter_model-00001-of-00002.safetensors" in {f.path for f in adapters[0].files}


async def test_a_name_of_many_parts_that_nobody_has_costs_no_more_than_a_short_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved: list[str] = []
    real = os.path.realpath

    def counted(path: str) -> str:
        resolved.append(path)
        return real(path)

    monkeypatch.setattr(os.path, "realpath", counted)
    for name in ("x", "/".join("x" * 90)):
        assert await LocalStore(str(tmp_path)).find(name) is None
    assert len(resolved) == 2  # the root, each time


def test_a_listing_without_descriptors_fails_and_takes_no_adapter_for_gone(tmp_path: Path) -> None:
    put(tmp_path, "a")
    listing = FolderListing(str(tmp_path))
    whole = listing.scan(str(tmp_path))
    put(tmp_path, "a", b"others")
    with no_descriptors_left(), pytest.raises(OSError, match="Too many open files"):
        listing.scan(str(tmp_path))
    assert len(listing.scan(str(tmp_path))[0]) == len(whole[0]) == 1


async def test_a_folder_that_cannot_be_opened_for_lack_of_descriptors_is_not_called_missing(
    tmp_path: Path,
) -> None:
    put(tmp_path, "a")
    store = LocalStore(str(tmp_path))
    assert await store.find("a") is not None  # its thread is there from now on
    with no_descriptors_left(), pytest.raises(StoreUnavailable, match="Too many open files"):
        await store.find("a")


@contextlib.contextmanager
def folder_of_somebody() -> Iterator[Path]:
    """A folder of a user who is not root, in a process that runs as that user. Root may read
    everything.
    """
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(NOBODY)
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    finally:
        if is_root:
            os.seteuid(0)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
async def test_a_file_that_may_not_be_read_is_there_and_its_fetch_says_why(file: str) -> None:
    await asyncio.to_thread(int)  # imports what threads need while everything may be read
    with folder_of_somebody() as root:
        put(root / "store", "a")
        (root / "store" / "a" / file).chmod(0)
        async with LocalStore(str(root / "store")) as store:
            (adapter,) = [adapter async for adapter in store.list()]
            assert len(adapter.files) == 2 and await store.find("a") == adapter
            assert [skipped.key for skipped in store.skipped.shown] == [f"a/{file}"]
            (root / "into").mkdir()
            with pytest.raises(StoreUnavailable, match="denied access"):
                await store.fetch(adapter, root / "into")
            (root / "store" / "a" / file).chmod(0o600)
            assert await store.find("a") != adapter


async def test_who_asks_for_an_adapter_below_a_closed_folder_is_told_of_it() -> None:
    await asyncio.to_thread(int)
    with folder_of_somebody() as root:
        put(root, "team/a")
        (root / "team").chmod(0)
        async with LocalStore(str(root)) as store:
            assert [adapter async for adapter in store.list()] == []
            assert "check its permissions" in store.skipped.why("team/a")
            assert store.skipped.why("team-b") == ""
        (root / "team").chmod(0o700)
