"""Shell. A folder of adapters, on a local disk or a shared file system. All file work happens in
threads.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

from shared.adapters.identity import CONFIG_FILE, StoredAdapter, StoredFile
from shared.errors import ConfigError
from shared.stores.folder_listing import (
    FolderListing,
    below,
    open_regular,
    read_entry,
    version_of,
    walk,
)
from shared.stores.listing import Grouping, Skipped, valid_name
from shared.stores.object_store import StoreProblem, TransferCut, changed, unavailable
from shared.stores.transfer import Transfer, copy_adapter


class LocalStore:
    """Adapters below one folder. Links are followed as long as they stay below it.

    A file's version is its modification time and a hash of its two ends. The time alone is not
    enough: builds set it to a constant (container images, SOURCE_DATE_EPOCH), and two versions of
    an adapter have the same size. The inode cannot be used, because copies on two hosts must agree.
    """

    def __init__(self, root: str) -> None:
        path = unquote(root) if root.startswith("/") else root
        if not path:
            raise ConfigError("the adapter folder is empty; use file:///folder or a path")
        self._root = os.path.abspath(os.path.expanduser(path))
        self.url = f"file://{self._root}"
        self.skipped = Skipped()
        self._listing = FolderListing(self._root)

    async def __aenter__(self) -> LocalStore:
        return self

    async def __aexit__(self, *exc: object) -> None:
        return None

    async def exists(self) -> bool:
        """Whether the folder exists, even if it is empty. Raises StoreUnavailable if it
        does not.
        """
        await asyncio.to_thread(self._real_root)
        return True

    async def list(self) -> AsyncIterator[StoredAdapter]:
        adapters, self.skipped = await asyncio.to_thread(self._scan)
        for adapter in adapters:
            yield adapter

    async def find(self, name: str) -> StoredAdapter | None:
        if not valid_name(name):
            return None
        try:
            return await asyncio.to_thread(self._look_up, name)
        except OSError as exc:
            raise unavailable(StoreProblem.FAILED, exc.strerror or "") from exc

    async def find_version(self, name: str, version: str) -> StoredAdapter | None:
        return None

    async def fetch(
        self, adapter: StoredAdapter, into: Path, transfer: Transfer | None = None
    ) -> None:
        await copy_adapter(adapter, into, self._listed, transfer)

    def _scan(self) -> tuple[Sequence[StoredAdapter], Skipped]:
        try:
            return self._listing.scan(self._real_root())
        except OSError as exc:
            raise unavailable(StoreProblem.FAILED, exc.strerror or "") from exc

    def _look_up(self, name: str) -> StoredAdapter | None:
        real_root = self._real_root()
        # A name that nobody has costs one look, however many parts it has.
        if not os.path.isfile(os.path.join(real_root, name, CONFIG_FILE)) or not _reached(
            real_root, name
        ):
            return None
        grouping = Grouping()
        adapters: list[StoredAdapter] = []
        for key, path in walk(real_root, grouping, os.path.join(self._root, name), name):
            read = read_entry(key, path)
            if read is not None:
                adapters += grouping.add(read[0])
        adapters += grouping.finish()
        return next((a for a in adapters if a.name == name), None)

    def _real_root(self) -> str:
        try:
            with os.scandir(self._root):
                return os.path.realpath(self._root)
        except PermissionError as exc:
            raise unavailable(StoreProblem.ACCESS_DENIED) from exc
        except (FileNotFoundError, NotADirectoryError) as exc:
            raise unavailable(StoreProblem.NO_FOLDER) from exc
        except OSError as exc:
            raise unavailable(StoreProblem.FAILED, exc.strerror or "") from exc

    @contextmanager
    def _listed(self, adapter_name: str, file: StoredFile, offset: int) -> Iterator[BinaryIO]:
        real_root = self._real_root()
        path = os.path.realpath(os.path.join(real_root, adapter_name, file.path))
        if not valid_name(adapter_name) or not below(path, real_root):
            raise changed(adapter_name)
        listed = file.size_bytes, file.version
        try:
            handle = open_regular(path)
        except PermissionError as exc:
            raise unavailable(StoreProblem.ACCESS_DENIED) from exc
        except FileNotFoundError as exc:
            raise changed(adapter_name) from exc
        except OSError as exc:
            raise unavailable(StoreProblem.FAILED, exc.strerror or "") from exc
        with handle:
            if _version(handle) != listed:
                raise changed(adapter_name)
            handle.seek(offset)
            yield handle
            if _version(handle) != listed:
                raise changed(adapter_name)  # the file was overwritten while it was read


def _version(handle: BinaryIO) -> tuple[int, str]:
    try:
        return version_of(handle)
    except OSError as exc:
        raise TransferCut from exc


def _reached(real_root: str, name: str) -> bool:
    """Whether a listing gets to this folder. No step on the way may leave the root or lead back to
    a folder above.
    """
    steps = name.split("/")
    folders = [
        os.path.realpath(os.path.join(real_root, *steps[: i + 1])) for i in range(len(steps))
    ]
    return all(below(folder, real_root) for folder in folders) and len(set(folders)) == len(folders)
