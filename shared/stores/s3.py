"""Shell. Adapters in an S3 bucket, or in anything that speaks S3. The only `import aiobotocore`."""

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

from shared.adapters.identity import StoredFile
from shared.errors import ConfigError, LoraplexError
from shared.stores import parse_bucket_url
from shared.stores.bucket import Bucket
from shared.stores.listing import Entry
from shared.stores.objects import TransferCut, Trouble, changed, unavailable
from shared.stores.transfer import byte_range

CONNECT_TIMEOUT_S = 5.0
# Between two pieces of a reply. A file as a whole is bounded in objects.py.
READ_TIMEOUT_S = 15.0
# One list request, or a file's answer up to its first byte, with the SDK's retries.
REQUEST_TIMEOUT_S = 40.0
MAX_ATTEMPTS = 3
MAX_LISTINGS = 32
# More than the parts that a worker ever has in the air: a part must not wait for a connection while
# its patience runs.
MAX_TRANSFERS = 128
CHUNK_BYTES = 256 * 1024

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
    """`s3://bucket/prefix`. A file's version is its ETag, and a fetch is conditional on it."""

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
            # Files have a client of their own: a transfer counts its tries itself, and must not
            # take the connections of listings.
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
        # Servers of one's own seldom have a DNS name per bucket.
        return "path" if custom else "auto"

    async def __aexit__(self, *exc: object) -> None:
        await self._exit.aclose()

    async def pages(self, prefix: str) -> AsyncGenerator[Sequence[Entry], None]:
        if self._bucket.endswith("--x-s3"):
            # Directory buckets (S3 Express) list in no order, and only by whole folders.
            yield sorted([entry async for page in self._raw_pages(prefix) for entry in page])
            return
        async for page in self._raw_pages(prefix):
            yield page

    async def _raw_pages(self, prefix: str) -> AsyncGenerator[Sequence[Entry], None]:
        request = {"Bucket": self._bucket, "Prefix": self._prefix + prefix}
        while True:
            try:
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    reply = await self._client.list_objects_v2(**request)
            except _FOREIGN as exc:
                raise _translated(exc) from exc
            yield [self._entry(item) for item in reply.get("Contents", ())]
            if not reply.get("IsTruncated"):
                return
            if reply.get("NextContinuationToken") in (None, request.get("ContinuationToken")):
                raise unavailable(Trouble.BROKEN_REPLY, "a listing without end")
            request["ContinuationToken"] = reply["NextContinuationToken"]

    def _entry(self, item: dict[str, Any]) -> Entry:
        return Entry(item["Key"].removeprefix(self._prefix), item["Size"], item["ETag"].strip('"'))

    @asynccontextmanager
    async def _stream(
        self, adapter_name: str, file: StoredFile, offset: int, length: int
    ) -> AsyncIterator[AsyncGenerator[bytes, None]]:
        request = {
            "Bucket": self._bucket,
            "Key": f"{self._prefix}{adapter_name}/{file.path}",
            "IfMatch": f'"{file.version}"',
        }
        ranged = byte_range(file, offset, length)
        if ranged:
            request["Range"] = ranged
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                reply = await self._reader.get_object(**request)
        except _FOREIGN as exc:
            raise _translated(exc, adapter_name) from exc
        body = reply["Body"]
        try:
            if reply.get("ETag", "").strip('"') != file.version:
                raise changed(adapter_name)  # a server that does not know If-Match
            if ranged and reply["ResponseMetadata"]["HTTPStatusCode"] != 206:
                raise unavailable(Trouble.BROKEN_REPLY, "no range support")
            yield _chunks(body)
        finally:
            body.close()


async def _chunks(body: Any) -> AsyncGenerator[bytes, None]:
    try:
        while chunk := await body.read(CHUNK_BYTES):
            yield chunk
    except _FOREIGN as exc:
        raise TransferCut from exc


def _translated(exc: Exception, adapter_name: str | None = None) -> LoraplexError:
    """Our error for one of the SDK's. `adapter_name` is set where one file was asked for, so that
    "not found" means the adapter.
    """
    if isinstance(exc, sdk.ClientError):
        code = str(exc.response.get("Error", {}).get("Code", ""))
        return _refused(
            code, exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0), adapter_name
        )
    if isinstance(exc, _NO_CREDENTIALS):
        return unavailable(Trouble.NO_CREDENTIALS)
    if isinstance(exc, _UNREACHABLE):  # TimeoutError is an OSError
        return unavailable(Trouble.UNREACHABLE)
    if isinstance(exc, ResponseParserError):
        return unavailable(Trouble.BROKEN_REPLY)
    return unavailable(Trouble.FAILED, type(exc).__name__)


def _refused(code: str, status: int, adapter_name: str | None) -> LoraplexError:
    names = {code, str(status)}
    if code == "NoSuchBucket":
        return unavailable(Trouble.NO_BUCKET)
    if adapter_name is not None and names & _GONE:
        return changed(adapter_name)
    for known, trouble in (
        (_DENIED, Trouble.ACCESS_DENIED),
        (_THROTTLED, Trouble.THROTTLED),
        (_WRONG_REGION, Trouble.WRONG_REGION),
    ):
        if names & known:
            return unavailable(trouble)
    # The code is the other side's text; anything but a plain word is left out.
    return unavailable(
        Trouble.FAILED, code if re.fullmatch(r"[A-Za-z0-9.]{1,64}", code) else str(status)
    )
