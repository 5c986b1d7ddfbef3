"""Shell. Copies a base model from a bucket to this host's disk, once. All workers of the host share
the copy.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import aclosing, contextmanager
from pathlib import Path, PurePosixPath

from shared.adapters.identity import StoredAdapter, StoredFile
from shared.errors import ConfigError, LoraplexError
from shared.stores import open_store
from shared.stores.bucket import Bucket
from shared.stores.listing import digest_of, valid_path
from shared.stores.transfer import Transfer, fetch_adapter

log = logging.getLogger("loraplex.mirror")

MAX_FILES = 4096
LEFT_OUT = (".git/", ".cache/", "original/")
"""Folders of a model that no engine reads. `original/` holds the same weights once more."""


async def local_model(url: str, root: Path, options: Mapping[str, object] | None = None) -> Path:
    """The folder below `root` with the model that lies at `url` now. It is complete, and another
    version of the model gets another folder. `options` are those of open_store.

    Raises ConfigError if there is no model, or if it cannot be copied.
    """
    above, _, name = url.rstrip("/").rpartition("/")
    if above.endswith("/"):
        raise ConfigError(f"{url} is a whole bucket; give the folder of one model in it")
    try:
        store = open_store(above, options)
        assert isinstance(store, Bucket)
        async with store:
            return await _mirrored(store, url, name, root)
    except ConfigError:
        raise
    except LoraplexError as exc:
        message = exc.message.replace("adapter store", "bucket").replace("adapter", "model")
        raise ConfigError(f"the model at {url} cannot be fetched: {message}") from exc


async def _mirrored(store: Bucket, url: str, name: str, root: Path) -> Path:
    files = await _files(store, f"{name}/")
    if not any(file.path == "config.json" for file in files):
        raise ConfigError(f"there is no model at {url}: it holds no config.json")
    model = StoredAdapter(name, digest_of(url, files), tuple(files))
    folder, partial = root / model.digest, root / f"{model.digest}.partial"
    await asyncio.to_thread(root.mkdir, parents=True, exist_ok=True)
    with await asyncio.to_thread(_opened, root / f"{model.digest}.lock") as lock:
        await asyncio.to_thread(fcntl.flock, lock, fcntl.LOCK_EX)
        if not await asyncio.to_thread(folder.is_dir):
            log.info(
                "copying the base model to this host", extra={"url": url, "bytes": model.size_bytes}
            )
            await asyncio.to_thread(shutil.rmtree, partial, True)
            await asyncio.to_thread(partial.mkdir)
            await fetch_adapter(model, partial, store._stream, Transfer())
            os.replace(partial, folder)
            log.info("base model copied to this host", extra={"url": url, "folder": str(folder)})
    return folder


async def _files(store: Bucket, prefix: str) -> list[StoredFile]:
    found: list[StoredFile] = []
    async with aclosing(store.pages(prefix)) as pages:
        async for page in pages:
            for entry in page:
                path = entry.key.removeprefix(prefix)
                if valid_path(path) and not path.startswith(LEFT_OUT):
                    found.append(StoredFile(path, entry.size_bytes, entry.version))
            if len(found) > MAX_FILES:
                raise ConfigError(f"more than {MAX_FILES} files: is this the folder of one model?")
    # some stores list folders, too
    folders = {str(above) for file in found for above in PurePosixPath(file.path).parents}
    return [file for file in found if file.path not in folders]


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        yield handle
    finally:
        os.close(handle)
