"""Shell. What the bucket stores have in common. A bucket lists in pages and streams ranges of
objects. Listing, finding and fetching adapters follow from these two.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path

from shared.adapters.identity import StoredAdapter, StoredFile
from shared.errors import ConfigError
from shared.stores.listing import Entry, Grouping, Skipped
from shared.stores.object_store import find_adapter, list_adapters
from shared.stores.transfer import Stream, Transfer, fetch_adapter

# The names that S3 or GCS accepts, including directory buckets, and GCS names with dots and
# underscores.
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,221}")
_ACCESS_POINT = re.compile(
    r"arn:aws[a-z-]*:s3[a-z-]*:[a-z0-9-]*:\d{12}:(?:accesspoint|outpost)[/:][A-Za-z0-9._-]+"
    r"(?:[/:]accesspoint[/:][A-Za-z0-9._-]+)?(?=/|\Z)"
)


class Bucket(ABC):
    """The contract of AdapterStore, built on two operations."""

    skipped = Skipped()

    @abstractmethod
    def pages(self, prefix: str) -> AsyncGenerator[Sequence[Entry], None]:
        """Like Objects.pages."""

    @abstractmethod
    def _stream(self, adapter_name: str, file: StoredFile, offset: int, length: int) -> Stream:
        """These bytes of the listed version, or an error."""

    async def exists(self) -> bool:
        async with aclosing(self.pages("")) as pages:
            async for page in pages:
                return bool(page)
        return False

    async def list(self) -> AsyncIterator[StoredAdapter]:
        grouping = Grouping()
        async for adapter in list_adapters(self, grouping):
            yield adapter
        self.skipped = grouping.skipped

    async def find(self, name: str) -> StoredAdapter | None:
        return await find_adapter(self, name)

    async def find_version(self, name: str, version: str) -> StoredAdapter | None:
        return None

    async def fetch(
        self, adapter: StoredAdapter, into: Path, transfer: Transfer | None = None
    ) -> None:
        await fetch_adapter(adapter, into, self._stream, transfer)


def parse_bucket_url(url: str) -> tuple[str, str, bool]:
    """(bucket, prefix, anonymous) of `scheme://bucket/prefix`. The prefix is empty or ends in `/`.

    The bucket may also be the ARN of an access point: `s3://arn:aws:s3:REGION:ACCOUNT:accesspoint/
    NAME/prefix`. `anonymous` is Ray's form `s3://anonymous@bucket/prefix`. Raises ConfigError if
    there is no bucket, or if the URL contains credentials.
    """
    scheme, _, rest = url.partition("://")
    if (point := _ACCESS_POINT.match(rest)) is not None:
        prefix = rest[point.end() :].strip("/")
        return point.group(), prefix and prefix + "/", False
    host, _, path = rest.partition("/")
    user, at, bucket = host.rpartition("@")
    if at and user != "anonymous":
        raise ConfigError(
            f"a {scheme}:// URL must hold no credentials; the SDK's own chain provides them"
        )
    if not _BUCKET.fullmatch(bucket):
        raise ConfigError(
            f"no valid bucket name in the {scheme}:// URL; it must look like "
            f"{scheme}://bucket/prefix"
        )
    prefix = path.strip("/")
    return bucket, prefix and prefix + "/", bool(at)
