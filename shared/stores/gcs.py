"""Shell. Adapters in a Google Cloud Storage bucket. The only `import gcloud`."""

from __future__ import annotations

import asyncio
import io
import os
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from gcloud.aio.auth import Token
from gcloud.aio.storage import Storage

from shared.adapters.identity import StoredFile
from shared.errors import LoraplexError
from shared.stores import parse_bucket_url
from shared.stores.bucket import Bucket
from shared.stores.listing import Entry
from shared.stores.objects import TransferCut, Trouble, changed, unavailable
from shared.stores.transfer import byte_range

PUBLIC_ENDPOINT = "https://storage.googleapis.com"
# The SDK's default asks for full control; nothing here writes.
SCOPES = ["https://www.googleapis.com/auth/devstorage.read_only"]
CONNECT_TIMEOUT_S = 5.0
# Between two pieces of a reply. A file as a whole is bounded in objects.py.
READ_TIMEOUT_S = 15.0
# One list request, or a file's answer up to its first byte, one attempt of it.
REQUEST_TIMEOUT_S = 20.0
# Getting a token: the SDK itself retries five times with growing pauses.
TOKEN_TIMEOUT_S = 30.0
MAX_ATTEMPTS = 3
BACKOFF_S = 0.2
# More than the parts that a worker ever has in the air: a part must not wait for a connection while
# its patience runs.
MAX_CONNECTIONS = 160
CHUNK_BYTES = 256 * 1024

# https://cloud.google.com/storage/docs/retry-strategy
_RETRYABLE = frozenset({408, 429, 500, 502, 503, 504})
# Only what Entry needs: a full item is twenty times larger.
_FIELDS = "items(name,size,generation),nextPageToken"


class GCSStore(Bucket):
    """`gs://bucket/prefix`. A file's version is its generation, which a fetch compares with the
    answer's.

    STORAGE_EMULATOR_HOST is honoured. To it, to an `http://` endpoint_url and where `anonymous` is
    set no token is sent.
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
            # An empty service file keeps the SDK from looking for credentials that are never sent.
            empty = io.StringIO("{}") if self._tokenless else None
            self._token = await asyncio.to_thread(
                Token, service_file=empty, session=self._session, scopes=SCOPES
            )
        except (OSError, ValueError, KeyError) as exc:
            await self._session.close()
            raise unavailable(Trouble.NO_CREDENTIALS) from exc
        # "Dev" means to this SDK: send no token. Its other meaning, no TLS verification, does not
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
        request = {"prefix": self._prefix + prefix, "fields": _FIELDS}
        while True:
            reply = await self._asked(
                lambda: self._storage.list_objects(
                    self._bucket, params=dict(request), timeout=_timeout(True)
                )
            )
            try:
                page = [self._entry(item) for item in reply.get("items", ())]
                token = reply.get("nextPageToken")
            except (AttributeError, KeyError, TypeError, ValueError) as exc:
                raise unavailable(Trouble.BROKEN_REPLY) from exc
            yield page
            if not token:
                return
            if token == request.get("pageToken"):
                raise unavailable(Trouble.BROKEN_REPLY, "a listing without end")
            request["pageToken"] = token

    def _entry(self, item: dict[str, Any]) -> Entry:
        return Entry(
            item["name"].removeprefix(self._prefix), int(item["size"]), str(item["generation"])
        )

    @asynccontextmanager
    async def _stream(
        self, adapter_name: str, file: StoredFile, offset: int, length: int
    ) -> AsyncIterator[AsyncGenerator[bytes, None]]:
        key = f"{self._prefix}{adapter_name}/{file.path}"
        # Asking for gzip turns off GCS's decompression on the way, which would change the size.
        ranged = byte_range(file, offset, length)
        headers = {"Accept-Encoding": "gzip"} | ({"Range": ranged} if ranged else {})
        # One attempt: a transfer counts its tries itself.
        opened = await self._asked(
            lambda: self._storage.download_stream(
                self._bucket, key, headers=dict(headers), timeout=_timeout(False)
            ),
            adapter_name,
            1,
        )
        async with opened as response:
            generation = response.headers.get("x-goog-generation")
            if generation not in (None, file.version):
                raise changed(adapter_name)
            if ranged and response.status != 206:
                raise unavailable(Trouble.BROKEN_REPLY, "no range support")
            yield _chunks(response)
        if generation is None:
            await self._confirm(adapter_name, key, file)

    async def _confirm(self, adapter_name: str, key: str, file: StoredFile) -> None:
        """For servers that do not say which generation they sent: it only grows, so if it is still
        the listed one, that was sent.
        """
        item = await self._asked(
            lambda: self._storage.download_metadata(self._bucket, key, timeout=_timeout(True)),
            adapter_name,
        )
        if str(item.get("generation")) != file.version:
            raise changed(adapter_name)

    async def _asked(
        self,
        request: Callable[[], Awaitable[Any]],
        adapter_name: str | None = None,
        attempts: int | None = None,
    ) -> Any:
        """One request's answer, after retries: this SDK has none of its own. Foreign errors end
        here.
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
        """Makes sure of a token before the SDK asks for it: it lets one cancelled request cancel
        the refresh that others wait for.
        """
        if self._tokenless:
            return
        if self._asking is None or self._asking.done():
            self._asking = asyncio.ensure_future(self._token.get())
        done, _ = await asyncio.wait({self._asking}, timeout=TOKEN_TIMEOUT_S)
        if not done:
            raise unavailable(Trouble.NO_CREDENTIALS, "no token in time")
        if failure := self._asking.exception():
            raise unavailable(Trouble.NO_CREDENTIALS) from failure


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
    """Our error for one of the SDK's. `adapter_name` is set where one file was asked for, so that
    "not found" means the adapter.
    """
    if isinstance(exc, aiohttp.ClientResponseError):
        if exc.status in (404, 412):
            return (
                changed(adapter_name)
                if adapter_name is not None
                else unavailable(Trouble.NO_BUCKET)
            )
        if exc.status in (401, 403):
            return unavailable(Trouble.ACCESS_DENIED)
        if exc.status in (429, 503):
            return unavailable(Trouble.THROTTLED)
        return unavailable(Trouble.FAILED, str(exc.status))
    if isinstance(exc, ValueError) and not isinstance(exc, aiohttp.ClientError):
        return unavailable(Trouble.BROKEN_REPLY)
    return unavailable(Trouble.UNREACHABLE)
