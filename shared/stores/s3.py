"""Shell. Adapters in an S3 bucket, or in any store that speaks S3. No other module imports
aiobotocore.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import botocore
from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession
from botocore import exceptions as sdk
from botocore.parsers import ResponseParserError

from shared.adapters.identity import StoredAdapter, StoredFile
from shared.errors import AdapterNotFound, ConfigError, LoraplexError
from shared.stores.bucket import Bucket, parse_bucket_url
from shared.stores.history import MAX_OBJECT_VERSIONS, ObjectVersion, choose_state
from shared.stores.listing import Entry, valid_name
from shared.stores.object_store import (
    MALFORMED,
    StoreFailure,
    StoreProblem,
    TransferCut,
    changed,
    unavailable,
    unreachable,
)
from shared.stores.transfer import byte_range

CONNECT_TIMEOUT_S = 5.0
# Longest time between two pieces of a reply. transfer.py bounds a file as a whole.
READ_TIMEOUT_S = 15.0
# Longest time of one list request, or of a file's answer up to its first byte, with the SDK's
# retries.
REQUEST_TIMEOUT_S = 40.0
MAX_ATTEMPTS = 3
MAX_LISTINGS = 32
# More than the parts that a worker downloads at once. A part must not wait for a connection,
# because its time limit runs.
MAX_TRANSFERS = 128
CHUNK_BYTES = 256 * 1024
MAX_KEPT = 10_000

_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_DENIED = frozenset(
    {
        "AccessDenied",
        "AllAccessDisabled",
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "ExpiredToken",
        "InvalidToken",
        "401",
        "403",
    }
)
_THROTTLED = frozenset(
    {
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "RequestLimitExceeded",
        "TooManyRequests",
        "429",
        "503",
    }
)
_WRONG_REGION = frozenset(
    {
        "PermanentRedirect",
        "AuthorizationHeaderMalformed",
        "IllegalLocationConstraintException",
        "301",
    }
)
_ARCHIVED = frozenset({"InvalidObjectState"})
_GONE = frozenset({"NoSuchKey", "PreconditionFailed", "404", "412"})
_NO_CREDENTIALS = (
    sdk.NoCredentialsError,
    sdk.PartialCredentialsError,
    sdk.CredentialRetrievalError,
    sdk.TokenRetrievalError,
    sdk.UnauthorizedSSOTokenError,
    sdk.SSOError,
)
_UNREACHABLE = (sdk.HTTPClientError, sdk.ConnectionError, aiohttp.ClientError, OSError)
_FOREIGN = (sdk.ClientError, sdk.BotoCoreError, aiohttp.ClientError, ResponseParserError, OSError)


class S3Store(Bucket):
    """`s3://bucket/prefix`. A file's version is its ETag, and a fetch is conditional on it. Where
    the bucket has versioning, a file that was overwritten meanwhile is fetched by its version id.
    """

    def __init__(
        self,
        url: str,
        endpoint_url: str | None = None,
        region: str | None = None,
        profile: str | None = None,
        anonymous: bool = False,
        addressing_style: str | None = None,
    ) -> None:
        self._bucket, self._prefix, anonymous_url = parse_bucket_url(url)
        self.url = f"s3://{self._bucket}/{self._prefix}"
        self._endpoint_url, self._region, self._profile = endpoint_url, region, profile
        self._anonymous = anonymous or anonymous_url
        self._addressing_style = addressing_style
        self._exit = AsyncExitStack()
        self._client: Any = None
        self._reader: Any = None
        # (key, ETag) of files that were overwritten -> the version id that brings them
        self._kept: dict[tuple[str, str], str] = {}

    async def __aenter__(self) -> S3Store:
        config = AioConfig(
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            retries={"mode": "standard", "total_max_attempts": MAX_ATTEMPTS},
            max_pool_connections=MAX_LISTINGS,
            **({"signature_version": botocore.UNSIGNED} if self._anonymous else {}),
        )
        try:
            session = AioSession(profile=self._profile)
            if style := self._style(session):
                config = config.merge(AioConfig(s3={"addressing_style": style}))
            client = session.create_client(
                "s3", endpoint_url=self._endpoint_url, region_name=self._region, config=config
            )
            self._client = await self._exit.enter_async_context(client)
            # Files have a client of their own. A transfer counts its tries itself, and must not use
            # up the connections of listings.
            config = config.merge(
                AioConfig(
                    retries={"mode": "standard", "total_max_attempts": 1},
                    max_pool_connections=MAX_TRANSFERS,
                )
            )
            reader = session.create_client(
                "s3", endpoint_url=self._endpoint_url, region_name=self._region, config=config
            )
            self._reader = await self._exit.enter_async_context(reader)
        except sdk.ProfileNotFound as exc:
            raise ConfigError(
                "the SDK's configuration has no such profile", param="profile"
            ) from exc
        except ValueError as exc:
            raise ConfigError(
                "the S3 client refuses this endpoint_url or region", param="endpoint_url"
            ) from exc
        except _FOREIGN as exc:
            raise _translated(exc) from exc
        return self

    def _style(self, session: AioSession) -> str | None:
        """Whether the bucket is named in the host or in the path. None: as the AWS configuration
        says.
        """
        if self._addressing_style or self._bucket.startswith("arn:"):
            return self._addressing_style or "auto"
        theirs = session.get_scoped_config().get("s3")
        if isinstance(theirs, dict) and theirs.get("addressing_style"):
            return None
        custom = self._endpoint_url or any(os.environ.get(name) for name in _ENDPOINT_VARIABLES)
        # Self-hosted servers seldom have a DNS name per bucket.
        return "path" if custom else "auto"

    async def __aexit__(self, *exc: object) -> None:
        await self._exit.aclose()

    async def pages(self, prefix: str) -> AsyncGenerator[Sequence[Entry], None]:
        if self._bucket.endswith("--x-s3"):
            # Directory buckets (S3 Express) list whole folders only, in no order.
            yield sorted([entry async for page in self._raw_pages(prefix) for entry in page])
            return
        async for page in self._raw_pages(prefix):
            yield page

    async def find_version(self, name: str, version: str) -> StoredAdapter | None:
        """`version` is a digest, or the version id of one of the adapter's files."""
        if not valid_name(name):
            return None
        objects = await self._kept_objects(f"{name}/")
        return await asyncio.to_thread(choose_state, name, objects, version)

    async def _kept_objects(self, prefix: str) -> list[ObjectVersion]:
        """As `_object_versions`, but empty where the store has no versions, or does not list them
        for this key.
        """
        try:
            return await self._object_versions(prefix)
        except StoreFailure as exc:
            if exc.trouble in (StoreProblem.ACCESS_DENIED, StoreProblem.FAILED):
                return []
            raise

    async def _object_versions(self, prefix: str) -> list[ObjectVersion]:
        """The kept versions of all objects below a prefix, the newest of each first. Only the
        current ones if the bucket has no versioning.
        """
        request = {"Bucket": self._bucket, "Prefix": self._prefix + prefix}
        found: list[ObjectVersion] = []
        while len(found) < MAX_OBJECT_VERSIONS:
            try:
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    reply = await self._client.list_object_versions(**request)
                items = (*reply.get("Versions", ()), *reply.get("DeleteMarkers", ()))
                found += [self._object_version(item) for item in items]
            except (*_FOREIGN, *MALFORMED) as exc:
                raise _translated(exc) from exc
            follows = (reply.get("NextKeyMarker"), reply.get("NextVersionIdMarker"))
            if not reply.get("IsTruncated"):
                break
            if follows == (request.get("KeyMarker"), request.get("VersionIdMarker")):
                raise unavailable(StoreProblem.BROKEN_REPLY, "a listing without end")
            request |= {"KeyMarker": follows[0], "VersionIdMarker": follows[1]}
        return found

    def _object_version(self, item: dict[str, Any]) -> ObjectVersion:
        key = item["Key"].removeprefix(self._prefix)
        since = item["LastModified"].timestamp()
        if "ETag" not in item:
            return ObjectVersion(since, key, "", None)
        return ObjectVersion(since, key, item["VersionId"], self._entry(item))

    async def _raw_pages(self, prefix: str) -> AsyncGenerator[Sequence[Entry], None]:
        request = {"Bucket": self._bucket, "Prefix": self._prefix + prefix}
        while True:
            try:
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    reply = await self._client.list_objects_v2(**request)
                if reply.keys() <= {"ResponseMetadata"}:
                    raise unavailable(StoreProblem.BROKEN_REPLY, "no listing")
                page = [self._entry(item) for item in reply.get("Contents", ())]
            except (*_FOREIGN, *MALFORMED) as exc:
                raise _translated(exc) from exc
            yield page
            if not reply.get("IsTruncated"):
                return
            if reply.get("NextContinuationToken") in (None, request.get("ContinuationToken")):
                raise unavailable(StoreProblem.BROKEN_REPLY, "a listing without end")
            request["ContinuationToken"] = reply["NextContinuationToken"]

    def _entry(self, item: dict[str, Any]) -> Entry:
        return Entry(item["Key"].removeprefix(self._prefix), item["Size"], item["ETag"].strip('"'))

    @asynccontextmanager
    async def _stream(
        self, adapter_name: str, file: StoredFile, offset: int, length: int
    ) -> AsyncIterator[AsyncGenerator[bytes, None]]:
        key = f"{adapter_name}/{file.path}"
        request = {
            "Bucket": self._bucket,
            "Key": self._prefix + key,
            "IfMatch": f'"{file.version}"',
        }
        ranged = byte_range(file, offset, length)
        if ranged:
            request["Range"] = ranged
        kept = self._kept.get((key, file.version))
        reply = await self._opened(adapter_name, request | ({"VersionId": kept} if kept else {}))
        if reply is None:
            request["VersionId"] = await self._kept_version(adapter_name, key, file)
            reply = await self._opened(adapter_name, request)
        if reply is None:
            raise changed(adapter_name)
        body = reply["Body"]
        try:
            if reply.get("ETag", "").strip('"') != file.version:
                raise changed(adapter_name)  # the server ignored If-Match
            if ranged and reply["ResponseMetadata"]["HTTPStatusCode"] != 206:
                raise unavailable(StoreProblem.BROKEN_REPLY, "no range support")
            yield _chunks(body)
        finally:
            body.close()

    async def _opened(self, adapter_name: str, request: dict[str, Any]) -> Any:
        """The answer to a request for a file. None: it is not there, or not in this version."""
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                return await self._reader.get_object(**request)
        except _FOREIGN as exc:
            failure = _translated(exc, adapter_name)
            if isinstance(failure, AdapterNotFound):
                return None
            raise failure from exc

    async def _kept_version(self, adapter_name: str, key: str, file: StoredFile) -> str:
        """The id under which the bucket still keeps this version of a file.

        Raises AdapterNotFound if it keeps none.
        """
        objects = await self._kept_objects(key)
        for version in objects:
            if (
                version.key == key
                and version.entry is not None
                and (version.entry.version, version.entry.size_bytes)
                == (file.version, file.size_bytes)
            ):
                self._kept[key, file.version] = version.version_id
                if len(self._kept) > MAX_KEPT:
                    self._kept.pop(next(iter(self._kept)))
                return version.version_id
        raise changed(adapter_name)


async def _chunks(body: Any) -> AsyncGenerator[bytes, None]:
    try:
        while chunk := await body.read(CHUNK_BYTES):
            yield chunk
    except _FOREIGN as exc:
        raise TransferCut from exc


def _translated(exc: Exception, adapter_name: str | None = None) -> LoraplexError:
    """Our error for an error of the SDK. `adapter_name` is set if one file was requested. Then "not
    found" means that the adapter has changed.
    """
    if isinstance(exc, sdk.ClientError):
        code = str(exc.response.get("Error", {}).get("Code", ""))
        return _refused(
            code, exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0), adapter_name
        )
    if isinstance(exc, _NO_CREDENTIALS):
        return unavailable(StoreProblem.NO_CREDENTIALS)
    if isinstance(exc, _UNREACHABLE):  # a TimeoutError is an OSError
        return unreachable(exc)
    if isinstance(exc, (ResponseParserError, *MALFORMED)):
        return unavailable(StoreProblem.BROKEN_REPLY)
    return unavailable(StoreProblem.FAILED, type(exc).__name__)


def _refused(code: str, status: int, adapter_name: str | None) -> LoraplexError:
    names = {code, str(status)}
    if code == "NoSuchBucket":
        return unavailable(StoreProblem.NO_BUCKET)
    if adapter_name is not None and names & _GONE:
        return changed(adapter_name)
    for known, trouble in (
        (_ARCHIVED, StoreProblem.ARCHIVED),  # also a 403
        (_DENIED, StoreProblem.ACCESS_DENIED),
        (_THROTTLED, StoreProblem.THROTTLED),
        (_WRONG_REGION, StoreProblem.WRONG_REGION),
    ):
        if names & known:
            return unavailable(trouble)
    # The other side wrote the code. It is left out unless it is a plain word.
    return unavailable(
        StoreProblem.FAILED, code if re.fullmatch(r"[A-Za-z0-9.]{1,64}", code) else str(status)
    )
