"""Shell. Adapters in a container of Azure Blob Storage. No other module imports azure."""

from __future__ import annotations

import asyncio
import importlib
import os
import re
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from azure.core import MatchConditions
from azure.core import exceptions as sdk
from azure.storage.blob import StorageErrorCode
from azure.storage.blob.aio import ContainerClient

from shared.adapters.identity import StoredFile, may_be_part
from shared.errors import ConfigError, LoraplexError
from shared.stores.bucket import Bucket
from shared.stores.listing import Entry
from shared.stores.object_store import (
    MALFORMED,
    StoreProblem,
    TransferCut,
    changed,
    unavailable,
    unreachable,
)
from shared.stores.transfer import byte_range

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 15.0
REQUEST_TIMEOUT_S = 40.0
MAX_ATTEMPTS = 3
BACKOFF_S = 0.5
KEY_VARIABLES = ("AZURE_STORAGE_KEY", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN")
_ARCHIVED = (StorageErrorCode.BLOB_ARCHIVED, StorageErrorCode.BLOB_BEING_REHYDRATED)
_URLS = (
    # the form of Ray and Hadoop
    re.compile(
        r"(?:abfss|azure)://(?P<container>[a-z0-9$-]{3,63})@(?P<account>[a-z0-9]{3,24})"
        r"\.(?:dfs|blob)\.(?P<cloud>core\.[a-z.]+)(?:/(?P<prefix>.*))?\Z"
    ),
    re.compile(
        r"https://(?P<account>[a-z0-9]{3,24})\.(?:dfs|blob)\.(?P<cloud>core\.[a-z.]+)"
        r"/(?P<container>[a-z0-9$-]{3,63})(?:/(?P<prefix>[^?]*))?\Z"
    ),
)


class AzureStore(Bucket):
    """`abfss://container@account.dfs.core.windows.net/prefix`. A file's version is its ETag, and a
    fetch is conditional on it.

    The key or token comes from the environment (KEY_VARIABLES). Without one it comes from the
    machine's identity, if azure-identity is installed.
    """

    def __init__(self, url: str, endpoint_url: str | None = None, anonymous: bool = False) -> None:
        found = next(filter(None, (form.match(url) for form in _URLS)), None)
        if found is None:
            raise ConfigError(
                "an Azure store must look like "
                "abfss://container@account.dfs.core.windows.net/prefix"
            )
        prefix = (found["prefix"] or "").strip("/")
        self._prefix = prefix and prefix + "/"
        self._container = found["container"]
        self._account_url = endpoint_url or f"https://{found['account']}.blob.{found['cloud']}"
        self._account = found["account"]
        self._anonymous = anonymous
        self.url = f"azure://{self._container}@{self._account}.blob.{found['cloud']}/{prefix}"
        self._exit = AsyncExitStack()
        self._client: Any = None

    async def __aenter__(self) -> AzureStore:
        credential = None if self._anonymous else await self._credential()
        client = ContainerClient(
            self._account_url,
            self._container,
            credential=credential,
            connection_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            # without these three the SDK waits for 15 s before it tries again
            retry_total=MAX_ATTEMPTS - 1,
            initial_backoff=BACKOFF_S,
            increment_base=BACKOFF_S,
            random_jitter_range=BACKOFF_S / 2,
        )
        self._client = await self._exit.enter_async_context(client)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._exit.aclose()

    async def _credential(self) -> Any:
        given = next((v for name in KEY_VARIABLES if (v := os.environ.get(name))), None)
        if given is not None:
            if "sig=" in given:
                return given
            return {"account_name": self._account, "account_key": given}
        try:
            identity = importlib.import_module("azure.identity.aio")
        except ImportError as exc:
            raise unavailable(
                StoreProblem.NO_CREDENTIALS, f"set {KEY_VARIABLES[0]}, or install azure-identity"
            ) from exc
        return await self._exit.enter_async_context(identity.DefaultAzureCredential())

    async def pages(self, prefix: str) -> AsyncGenerator[Sequence[Entry], None]:
        found = self._client.list_blobs(name_starts_with=self._prefix + prefix).by_page()
        while True:
            before = found.continuation_token
            try:
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    page = [self._entry(item) async for item in await anext(found)]
            except StopAsyncIteration:
                return
            except (sdk.AzureError, OSError, *MALFORMED) as exc:
                raise _translated(exc) from exc
            yield page
            if before and found.continuation_token == before:
                raise unavailable(StoreProblem.BROKEN_REPLY, "a listing without end")

    def _entry(self, item: Any) -> Entry:
        name = item.name.removeprefix(self._prefix)
        # a folder of a hierarchical namespace is listed, too, and may have no size
        is_folder = item.size is None and not may_be_part(name.rpartition("/")[2])
        return Entry(name, 0 if is_folder else int(item.size), item.etag.strip('"'))

    @asynccontextmanager
    async def _stream(
        self, adapter_name: str, file: StoredFile, offset: int, length: int
    ) -> AsyncIterator[AsyncGenerator[bytes, None]]:
        part = {"offset": offset, "length": length} if byte_range(file, offset, length) else {}
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                body = await self._client.download_blob(
                    f"{self._prefix}{adapter_name}/{file.path}",
                    etag=f'"{file.version}"',
                    match_condition=MatchConditions.IfNotModified,
                    **part,
                )
        except (sdk.AzureError, OSError, ValueError) as exc:
            raise _translated(exc, adapter_name) from exc
        yield _chunks(body, adapter_name)


async def _chunks(body: Any, adapter_name: str) -> AsyncGenerator[bytes, None]:
    try:
        async for chunk in body.chunks():
            yield chunk
    except sdk.ResourceModifiedError as exc:
        raise changed(adapter_name) from exc
    except (sdk.AzureError, OSError) as exc:
        raise TransferCut from exc


def _translated(exc: Exception, adapter_name: str | None = None) -> LoraplexError:
    """Our error for an error of the SDK. `adapter_name` is set if one file was requested. Then "not
    found" means that the adapter has changed.
    """
    status = exc.status_code if isinstance(exc, sdk.HttpResponseError) else None
    if status in (404, 412):
        return changed(adapter_name) if adapter_name else unavailable(StoreProblem.NO_BUCKET)
    if getattr(exc, "error_code", None) in _ARCHIVED:
        return unavailable(StoreProblem.ARCHIVED)
    if status in (401, 403) or isinstance(exc, sdk.ClientAuthenticationError):
        return unavailable(StoreProblem.ACCESS_DENIED)
    if status in (429, 503):
        return unavailable(StoreProblem.THROTTLED)
    if status is not None:
        return unavailable(StoreProblem.FAILED, str(status))
    if isinstance(exc, MALFORMED):
        return unavailable(StoreProblem.BROKEN_REPLY)
    return unreachable(exc)
