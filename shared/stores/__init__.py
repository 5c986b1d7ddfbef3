"""Shell. Adapter stores: one small contract over a folder, or a bucket of S3, GCS or Azure."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from shared.adapters.identity import StoredAdapter, StoredFile
from shared.errors import ConfigError
from shared.stores.listing import Skipped
from shared.stores.transfer import Transfer

# What S3 and GCS accept between them, including directory buckets and GCS names with dots and
# underscores.
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,221}")
_ACCESS_POINT = re.compile(
    r"arn:aws[a-z-]*:s3[a-z-]*:[a-z0-9-]*:\d{12}:(?:accesspoint|outpost)[/:][A-Za-z0-9._-]+"
    r"(?:[/:]accesspoint[/:][A-Za-z0-9._-]+)?(?=/|\Z)"
)

__all__ = [
    "AdapterStore",
    "Skipped",
    "StoredAdapter",
    "StoredFile",
    "Transfer",
    "open_store",
    "parse_bucket_url",
]


class AdapterStore(Protocol):
    """Where adapters live. Every method may raise StoreUnavailable; none ever blocks the event
    loop.

    A store is an async context manager: entering opens its client, leaving closes it. `skipped` is
    what the last complete listing left out.
    """

    url: str
    skipped: Skipped

    async def __aenter__(self) -> AdapterStore: ...
    async def __aexit__(self, *exc: object) -> None: ...

    async def exists(self) -> bool:
        """Whether anything at all lies below the root."""
        ...

    def list(self) -> AsyncIterator[StoredAdapter]:
        """Every adapter below the root, paginated underneath, in no particular order."""
        ...

    async def find(self, name: str) -> StoredAdapter | None:
        """One adapter by name, asked of the store now; None where no `adapter_config.json` lies in
        that folder.
        """
        ...

    async def fetch(
        self, adapter: StoredAdapter, into: Path, transfer: Transfer | None = None
    ) -> None:
        """Copies the adapter's files into the existing folder `into` (empty unless `transfer` says
        otherwise), complete and as listed.

        Raises:
            StoreUnavailable: the store failed; what `into` holds then is incomplete.
            AdapterNotFound: a file is gone or has another version than listed: the adapter changed,
                look it up again.
        """
        ...


_OPTIONS = {
    "file": frozenset[str](),
    "s3": frozenset({"endpoint_url", "region", "profile", "anonymous", "addressing_style"}),
    "gs": frozenset({"endpoint_url", "anonymous"}),
    "azure": frozenset({"endpoint_url", "anonymous"}),
}


def open_store(url: str, options: Mapping[str, object] | None = None) -> AdapterStore:
    """The store for `s3://bucket/prefix`, `gs://bucket/prefix`, `file:///folder` or a plain path.
    SDKs are imported on use only.

    `options` (from the config's `store:` section) may hold `endpoint_url` and `anonymous` (S3,
    GCS), `region`, `profile` and `addressing_style` (S3); credentials come only from each SDK's own
    chain. Raises ConfigError for any other scheme, option or type, and for credentials in a URL.
    """
    scheme, sep, rest = url.partition("://")
    scheme = scheme if sep else "file"
    if scheme == "s3a":  # Hadoop's name for S3
        scheme, url = "s3", f"s3://{rest}"
    if scheme == "abfss" or (scheme == "https" and ".core." in rest.partition("/")[0]):
        scheme = "azure"
    if scheme not in _OPTIONS:
        raise ConfigError(
            f"no adapter store for {scheme}://; use s3://bucket/prefix, "
            "gs://bucket/prefix, abfss://container@account.dfs.core.windows.net/prefix, "
            "file:///folder or a path"
        )
    opts = _checked(scheme, options or {})
    if scheme == "file":
        from shared.stores.local import LocalStore

        return LocalStore(rest if sep else url)
    if scheme == "s3":
        from shared.stores.s3 import S3Store

        return S3Store(url, **opts)  # type: ignore[arg-type]
    if scheme == "azure":
        try:
            from shared.stores.azure import AzureStore
        except ImportError as exc:
            raise ConfigError(
                "an Azure store needs the Azure SDK here: install loraplex[azure]"
            ) from exc

        return AzureStore(url, **opts)  # type: ignore[arg-type]
    from shared.stores.gcs import GCSStore

    return GCSStore(url, **opts)  # type: ignore[arg-type]


def _checked(scheme: str, options: Mapping[str, object]) -> dict[str, object]:
    """The options that are set, refused by name or type before any SDK sees them. Values are never
    quoted: they may hold a secret.
    """
    given = {
        key: value for key, value in options.items() if value is not None and value is not False
    }
    for key, value in given.items():
        if key not in _OPTIONS[scheme]:
            known = ", ".join(sorted(_OPTIONS[scheme])) or "none"
            raise ConfigError(
                f"unknown store option {key!r} for a {scheme}:// store; known: {known}", param=key
            )
        if not isinstance(value, bool if key == "anonymous" else str):
            raise ConfigError(
                f"store option {key!r} must be a {'boolean' if key == 'anonymous' else 'string'}",
                param=key,
            )
    endpoint = given.get("endpoint_url")
    if isinstance(endpoint, str):
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                "endpoint_url must look like https://host or http://host:port", param="endpoint_url"
            )
        if "@" in parts.netloc or parts.query:
            raise ConfigError(
                "endpoint_url must hold no credentials; the SDK's own chain provides them",
                param="endpoint_url",
            )
    return given


def parse_bucket_url(url: str) -> tuple[str, str, bool]:
    """(bucket, prefix, anonymous) of `scheme://bucket/prefix`. The prefix is empty or ends in `/`.

    The bucket may also be the ARN of an access point: `s3://arn:aws:s3:REGION:ACCOUNT:accesspoint/
    NAME/prefix`. `anonymous` is Ray's form `s3://anonymous@bucket/prefix`. Raises ConfigError for
    no bucket or for credentials in the URL.
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
