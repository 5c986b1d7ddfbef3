"""Shell. Adapter stores. One small contract covers a folder, the buckets of S3, GCS and Azure, and
the repositories of a Hugging Face hub.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from shared.adapters.identity import StoredAdapter, StoredFile
from shared.errors import ConfigError
from shared.stores.listing import Skipped
from shared.stores.transfer import Transfer

__all__ = [
    "AdapterStore",
    "Skipped",
    "StoredAdapter",
    "StoredFile",
    "Transfer",
    "open_store",
]


class AdapterStore(Protocol):
    """Where adapters are stored. Every method may raise StoreUnavailable. None ever blocks the
    event loop.

    A store is an async context manager: entering it opens its client, and leaving it closes the
    client. `skipped` is what the last complete listing left out.
    """

    url: str
    skipped: Skipped

    async def __aenter__(self) -> AdapterStore: ...
    async def __aexit__(self, *exc: object) -> None: ...

    async def exists(self) -> bool:
        """Whether anything lies below the root."""
        ...

    def list(self) -> AsyncIterator[StoredAdapter]:
        """Every adapter below the root, in no particular order. The store is read page by page."""
        ...

    async def find(self, name: str) -> StoredAdapter | None:
        """The adapter with this name, as the store shows it now. None if no `adapter_config.json`
        lies in its folder.
        """
        ...

    async def find_version(self, name: str, version: str) -> StoredAdapter | None:
        """An older version that the store still keeps: by its digest, the beginning of it, or what
        the store itself calls a version. None if it keeps none.
        """
        ...

    async def fetch(
        self, adapter: StoredAdapter, into: Path, transfer: Transfer | None = None
    ) -> None:
        """Copies the adapter's files into the existing folder `into`, complete and as listed. The
        folder is empty unless `transfer` says otherwise.

        Raises:
            StoreUnavailable: the store failed. The contents of `into` are then incomplete.
            AdapterNotFound: a file is gone, or has another version than listed. The adapter has
                changed and must be looked up again.
        """
        ...


_OPTIONS = {
    "file": frozenset[str](),
    "s3": frozenset({"endpoint_url", "region", "profile", "anonymous", "addressing_style"}),
    "gs": frozenset({"endpoint_url", "anonymous"}),
    "azure": frozenset({"endpoint_url", "anonymous"}),
    "hf": frozenset({"endpoint_url", "anonymous"}),
}


def open_store(url: str, options: Mapping[str, object] | None = None) -> AdapterStore:
    """The store for `s3://bucket/prefix`, `gs://bucket/prefix`, an `abfss://` URL, `hf://org`,
    `file:///folder` or a plain path. An SDK is imported only if its store is used.

    `options` come from the config's `store:` section: `endpoint_url` and `anonymous` (all but
    folders), `region`, `profile` and `addressing_style` (S3). Credentials come only from each SDK's
    own chain.

    Raises ConfigError for any other scheme, option or type, and for credentials in a URL.
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
            "gs://bucket/prefix, abfss://container@account.dfs.core.windows.net/prefix, hf://org, "
            "hf://org/repo@revision, file:///folder or a path"
        )
    return _opened(scheme, rest if sep else url, url, _checked(scheme, options or {}))


def _opened(scheme: str, folder: str, url: str, opts: Mapping[str, object]) -> AdapterStore:
    """An SDK is imported only where a store needs it."""
    if scheme == "file":
        from shared.stores.local import LocalStore

        return LocalStore(folder)
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
    if scheme == "hf":
        try:
            from shared.stores.hub import HubStore
        except ImportError as exc:
            raise ConfigError(
                "a hub store needs huggingface_hub here: install loraplex[hub]"
            ) from exc

        return HubStore(url, **opts)  # type: ignore[arg-type]
    from shared.stores.gcs import GCSStore

    return GCSStore(url, **opts)  # type: ignore[arg-type]


def _checked(scheme: str, options: Mapping[str, object]) -> dict[str, object]:
    """The options that are set. Wrong names and types are refused before any SDK sees them. Values
    are never quoted, because they may contain a secret.
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
