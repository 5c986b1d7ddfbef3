"""Shell. Adapters in a Google Cloud Storage bucket. No other module imports gcloud."""

from __future__ import annotations

import asyncio
import io
import os
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any
from urllib.parse import quote

import aiohttp
from gcloud.aio.auth import Token
from gcloud.aio.storage import Storage

from shared.adapters.identity import StoredAdapter, StoredFile
from shared.errors import LoraplexError
from shared.stores.bucket import Bucket, parse_bucket_url
from shared.stores.history import MAX_OBJECT_VERSIONS, ObjectVersion, choose_state
from shared.stores.listing import Entry, valid_name
from shared.stores.object_store import (
    MALFORMED,
    StoreProblem,
    TransferCut,
    changed,
    unavailable,
    unreachable,
)
from shared.stores.transfer import byte_range

PUBLIC_ENDPOINT = "https://storage.googleapis.com"
# The SDK would ask for full control by default. Nothing here writes.
SCOPES = ["https://www.googleapis.com/auth/devstorage.read_only"]
CONNECT_TIMEOUT_S = 5.0
# Longest time between two pieces of a reply. transfer.py bounds a file as a whole.
READ_TIMEOUT_S = 15.0
# Longest time of one list request, or of one attempt for a file up to its first byte.
REQUEST_TIMEOUT_S = 20.0
# Longest time to get a token. The SDK itself tries five times, with growing pauses.
TOKEN_TIMEOUT_S = 30.0
MAX_ATTEMPTS = 3
BACKOFF_S = 0.2
# More than the parts that a worker downloads at once. A part must not wait for a connection,
# because its time limit runs.
MAX_CONNECTIONS = 160
CHUNK_BYTES = 256 * 1024

# https://cloud.google.com/storage/docs/retry-strategy
_RETRYABLE = frozenset({408, 429, 500, 502, 503, 504})
# Only what Entry needs. A full item is twenty times larger.
_FIELDS = "items(name,size,generation),nextPageToken"
_ALL_FIELDS = "items(name,size,generation,timeCreated,timeDeleted),nextPageToken"


class GCSStore(Bucket):
    """`gs://bucket/prefix`. A file's version is its generation, which a fetch compares with the
    answer's. Where the bucket has versioning, a file that was overwritten meanwhile is fetched by
    its generation.

    STORAGE_EMULATOR_HOST is honoured. No token is sent to it, to an `http://` endpoint_url, or if
    `anonymous` is set.
    """

    def __init__(self, url: str, endpoint_url: str | None = None, anonymous: bool = False) -> None:
        self._bucket, self._prefix, anonymous_url = parse_bucket_url(url)
        self.url = f"gs://{self._bucket}/{self._prefix}"
        host = os.environ.get("STORAGE_EMULATOR_HOST", "")
        emulator = host if not host or "://" in host else f"http://{host}"
        self._endpoint_url = (endpoint_url or emulator or PUBLIC_ENDPOINT).rstrip("/")
        self._tokenless = (
            anonymous
            or anonymous_url
            or self._endpoint_url.startswith("http://")
            or bool(emulator and not endpoint_url)
        )
        self._session: aiohttp.ClientSession | None = None
        self._storage: Any = None
        self._token: Any = None
        self._asking: asyncio.Task[object] | None = None

    async def __aenter__(self) -> GCSStore:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=MAX_CONNECTIONS),
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S
            ),
        )
        try:
            # With an empty service file the SDK does not look for credentials that are never sent.
            empty = io.StringIO("{}") if self._tokenless else None
            self._token = await asyncio.to_thread(
                Token, service_file=empty, session=self._session, scopes=SCOPES
            )
        except (OSError, ValueError, KeyError) as exc:
            await self._session.close()
            raise unavailable(StoreProblem.NO_CREDENTIALS) from exc
        # To this SDK "Dev" means: send no token. Its other meaning, no TLS verification, does not
        # apply to a session of our own.
        self._storage = Storage(
            session=self._session,
            token=self._token,
            api_root=self._endpoint_url,
            api_is_dev=self._tokenless,
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._asking is not None:
            self._asking.cancel()
        if self._session is not None:
            await self._session.close()

    async def pages(self, prefix: str) -> AsyncGenerator[Sequence[Entry], None]:
        async for items in self._items({"prefix": self._prefix + prefix, "fields": _FIELDS}):
            try:
                page = [self._entry(item) for item in items]
            except MALFORMED as exc:
                raise unavailable(StoreProblem.BROKEN_REPLY) from exc
            yield page

    async def find_version(self, name: str, version: str) -> StoredAdapter | None:
        """`version` is a digest, or the generation of one of the adapter's files."""
        if not valid_name(name):
            return None
        found: list[ObjectVersion] = []
        request = {"prefix": f"{self._prefix}{name}/", "fields": _ALL_FIELDS, "versions": "true"}
        async for items in self._items(request):
            try:
                found += [one for item in items for one in self._moments(item)]
            except MALFORMED as exc:
                raise unavailable(StoreProblem.BROKEN_REPLY) from exc
            if len(found) > MAX_OBJECT_VERSIONS:
                break
        found.sort(key=lambda one: one.since, reverse=True)
        return await asyncio.to_thread(choose_state, name, found, version)

    def _moments(self, item: dict[str, Any]) -> Iterator[ObjectVersion]:
        """When a generation came, and when it went."""
        entry = self._entry(item)
        came = datetime.fromisoformat(item["timeCreated"]).timestamp()
        if went := item.get("timeDeleted"):
            yield ObjectVersion(
                datetime.fromisoformat(went).timestamp(), entry.key, entry.version, None
            )
        yield ObjectVersion(came, entry.key, entry.version, entry)

    async def _items(self, request: dict[str, str]) -> AsyncGenerator[list[Any], None]:
        """The items of a listing, page by page."""
        while True:
            reply = await self._request(
                lambda: self._storage.list_objects(
                    self._bucket, params=dict(request), timeout=_timeout(True)
                )
            )
            try:
                items, token = list(reply.get("items", ())), reply.get("nextPageToken")
            except MALFORMED as exc:
                raise unavailable(StoreProblem.BROKEN_REPLY) from exc
            yield items
            if not token:
                return
            if token == request.get("pageToken"):
                raise unavailable(StoreProblem.BROKEN_REPLY, "a listing without end")
            request["pageToken"] = token

    def _entry(self, item: dict[str, Any]) -> Entry:
        return Entry(
            item["name"].removeprefix(self._prefix), int(item["size"]), str(int(item["generation"]))
        )

    @asynccontextmanager
    async def _stream(
        self, adapter_name: str, file: StoredFile, offset: int, length: int
    ) -> AsyncIterator[AsyncGenerator[bytes, None]]:
        key = f"{self._prefix}{adapter_name}/{file.path}"
        ranged = byte_range(file, offset, length)
        # One attempt only, because a transfer counts its tries itself.
        opened = await self._request(lambda: self._open(key, file, ranged), adapter_name, 1)
        async with opened as response:
            generation = response.headers.get("x-goog-generation")
            if generation not in (None, file.version):
                raise changed(adapter_name)
            if ranged and response.status != 206:
                raise unavailable(StoreProblem.BROKEN_REPLY, "no range support")
            yield _chunks(response)
        if generation is None:
            await self._confirm(adapter_name, key, file)

    async def _open(self, key: str, file: StoredFile, ranged: str) -> aiohttp.ClientResponse:
        """Asks for the listed generation, which the SDK's own download cannot."""
        assert self._session is not None
        # Asking for gzip stops GCS from decompressing on the way, which would change the size.
        headers = {"Accept-Encoding": "gzip"} | ({"Range": ranged} if ranged else {})
        if not self._tokenless:
            headers["Authorization"] = f"Bearer {await self._token.get()}"
        return await self._session.get(
            f"{self._endpoint_url}/storage/v1/b/{self._bucket}/o/{quote(key, safe='')}",
            params={"alt": "media", "generation": file.version},
            headers=headers,
            timeout=_timeout(False),
            auto_decompress=False,
            raise_for_status=True,
        )

    async def _confirm(self, adapter_name: str, key: str, file: StoredFile) -> None:
        """For servers that do not say which generation they sent. A generation only grows. So if
        the object still has the listed one, that one was sent.
        """
        item = await self._request(
            lambda: self._storage.download_metadata(self._bucket, key, timeout=_timeout(True)),
            adapter_name,
        )
        if str(item.get("generation")) != file.version:
            raise changed(adapter_name)

    async def _request(
        self,
        request: Callable[[], Awaitable[Any]],
        adapter_name: str | None = None,
        attempts: int | None = None,
    ) -> Any:
        """The answer to one request, after retries: this SDK has none of its own. The SDK's errors
        become ours here.
        """
        await self._authorise()
        attempt = 1
        while True:
            try:
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    return await request()
            except (aiohttp.ClientError, OSError, ValueError) as exc:
                if attempt == (attempts or MAX_ATTEMPTS) or not _retryable(exc):
                    raise _translated(exc, adapter_name) from exc
            await asyncio.sleep(BACKOFF_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
            attempt += 1

    async def _authorise(self) -> None:
        """Gets a token before the SDK asks for one. In the SDK, one cancelled request would cancel
        the refresh that others wait for.
        """
        if self._tokenless:
            return
        if self._asking is None or self._asking.done():
            self._asking = asyncio.ensure_future(self._token.get())
        done, _ = await asyncio.wait({self._asking}, timeout=TOKEN_TIMEOUT_S)
        if not done:
            raise unavailable(StoreProblem.NO_CREDENTIALS, "no token in time")
        if failure := self._asking.exception():
            raise unavailable(StoreProblem.NO_CREDENTIALS) from failure


def _timeout(whole_reply: bool) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(
        total=REQUEST_TIMEOUT_S if whole_reply else None,
        sock_connect=CONNECT_TIMEOUT_S,
        sock_read=READ_TIMEOUT_S,
    )


async def _chunks(response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
    try:
        while chunk := await response.content.read(CHUNK_BYTES):
            yield chunk
    except (aiohttp.ClientError, OSError) as exc:
        raise TransferCut from exc


def _retryable(exc: Exception) -> bool:
    if isinstance(exc, aiohttp.ClientResponseError):
        return exc.status in _RETRYABLE
    return isinstance(exc, (aiohttp.ClientError, OSError))


def _translated(exc: Exception, adapter_name: str | None) -> LoraplexError:
    """Our error for an error of the SDK. `adapter_name` is set if one file was requested. Then "not
    found" means that the adapter has changed.
    """
    if isinstance(exc, aiohttp.ClientResponseError):
        if exc.status in (404, 412):
            return (
                changed(adapter_name)
                if adapter_name is not None
                else unavailable(StoreProblem.NO_BUCKET)
            )
        if exc.status in (401, 403):
            return unavailable(StoreProblem.ACCESS_DENIED)
        if exc.status in (429, 503):
            return unavailable(StoreProblem.THROTTLED)
        return unavailable(StoreProblem.FAILED, str(exc.status))
    if isinstance(exc, ValueError) and not isinstance(exc, aiohttp.ClientError):
        return unavailable(StoreProblem.BROKEN_REPLY)
    return unreachable(exc)
