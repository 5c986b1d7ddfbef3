"""Shell. What all stores share: their failures in words, and how adapters are listed and found with
one operation, `pages`.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from enum import Enum
from typing import Protocol

from shared.adapters.identity import CONFIG_FILE, StoredAdapter
from shared.errors import AdapterNotFound, StoreUnavailable
from shared.stores.listing import Entry, Grouping, OutOfOrder, valid_name

# what it raises to read a reply that has another form than it should
MALFORMED = (AttributeError, KeyError, OverflowError, TypeError, ValueError)
# seconds that a throttled client is told to wait
THROTTLED_RETRY_AFTER_S = 5.0


class StoreProblem(Enum):
    """Why a store is unavailable, in words that name no path, no key and no credential."""

    NO_CREDENTIALS = "no usable credentials for the adapter store were found"
    ACCESS_DENIED = (
        "the adapter store denied access: check the credentials and the bucket's permissions"
    )
    ARCHIVED = "a file of the adapter is archived: restore it in the adapter store"
    HUB_DENIED = "the hub denied access: check HF_TOKEN"
    GATED = (
        "the hub gives this repository only to those who accepted its terms: accept them, and set "
        "HF_TOKEN to that account's token"
    )
    NO_BUCKET = "the adapter store has no such bucket"
    NO_REPOSITORY = "the hub has no such repository or revision, or hides it: check HF_TOKEN"
    NO_PREFIX = "nothing lies below the adapter store's prefix"
    NO_FOLDER = "the adapter folder does not exist or is not a folder"
    WRONG_REGION = "the adapter store's bucket lies in another region: set `region`"
    UNREACHABLE = "the adapter store is unreachable"
    UNTRUSTED = (
        "the adapter store's TLS certificate is not valid, or not trusted here: name its authority "
        "in SSL_CERT_FILE, or in AWS_CA_BUNDLE for S3"
    )
    THROTTLED = "the adapter store asked to slow down"
    TOO_SLOW = "the adapter store is too slow: the transfer was given up"
    CUT = "the adapter store cut the transfer"
    BROKEN_REPLY = "the adapter store sent a reply that makes no sense"
    FAILED = "the adapter store failed"
    NOT_WRITABLE = "the adapter cannot be written to the local disk"


# These may pass by themselves. The others stay until a person has done something.
_TRANSIENT = frozenset(
    {
        StoreProblem.UNREACHABLE,
        StoreProblem.THROTTLED,
        StoreProblem.TOO_SLOW,
        StoreProblem.CUT,
        StoreProblem.FAILED,
    }
)


class StoreFailure(StoreUnavailable):
    """A StoreUnavailable that knows its kind of trouble."""

    def __init__(self, trouble: StoreProblem, detail: str = "") -> None:
        message = f"{trouble.value} ({detail})" if detail else trouble.value
        super().__init__(
            message,
            retry_after_s=THROTTLED_RETRY_AFTER_S if trouble is StoreProblem.THROTTLED else None,
        )
        self.trouble = trouble


def unavailable(trouble: StoreProblem, detail: str = "") -> StoreUnavailable:
    """The error for `trouble`. `detail` is a status or an error code, never a message that the
    other side wrote.
    """
    return StoreFailure(trouble, detail)


def unreachable(exc: BaseException, detail: str = "") -> StoreUnavailable:
    """The error for a connection that failed. SDKs wrap the reason."""
    reason: BaseException | None = exc
    while reason is not None:
        if isinstance(reason, ssl.SSLCertVerificationError):
            return unavailable(StoreProblem.UNTRUSTED)
        reason = reason.__cause__ or reason.__context__
    return unavailable(StoreProblem.UNREACHABLE, detail)


def transient(error: StoreUnavailable) -> bool:
    """Whether trying again soon makes sense."""
    return isinstance(error, StoreFailure) and error.trouble in _TRANSIENT


def changed(adapter_name: str) -> AdapterNotFound:
    return AdapterNotFound(
        f"The adapter `{adapter_name}` changed in its store while it was being fetched.",
        param="model",
    )


class TransferCut(StoreFailure):
    """The body of a file broke off. Asking for the rest may work."""

    def __init__(self) -> None:
        super().__init__(StoreProblem.CUT)


class Objects(Protocol):
    """What `list` and `find` need of an object store. It raises only StoreUnavailable."""

    def pages(self, prefix: str) -> AsyncGenerator[Sequence[Entry], None]:
        """The entries whose keys begin with `prefix`, page by page, in ascending order. Keys and
        prefix are relative to the root.
        """
        ...


async def list_adapters(objects: Objects, grouping: Grouping) -> AsyncIterator[StoredAdapter]:
    """Every adapter of an object store, each as soon as its whole folder has been listed."""
    try:
        async with aclosing(objects.pages("")) as pages:
            async for page in pages:
                for entry in page:
                    for adapter in grouping.add(entry):
                        yield adapter
    except OutOfOrder as exc:
        raise unavailable(StoreProblem.BROKEN_REPLY, "keys out of order") from exc
    for adapter in grouping.finish():
        yield adapter


async def find_adapter(objects: Objects, name: str) -> StoredAdapter | None:
    """One adapter, usually with one list request. A folder without a config needs three, however
    many pages lie below it.
    """
    if not valid_name(name):
        return None
    config_key = f"{name}/{CONFIG_FILE}"
    grouping = Grouping()
    found: list[StoredAdapter] = []
    seen, number = False, 0
    try:
        async with aclosing(objects.pages(f"{name}/")) as pages:
            async for page in pages:
                number += 1
                seen = seen or any(entry.key == config_key for entry in page)
                passed = bool(page) and page[-1].key > config_key
                if not seen and (
                    passed or (number == 2 and not await _exists(objects, config_key))
                ):
                    return None
                found += [a for entry in page for a in grouping.add(entry) if a.name == name]
    except OutOfOrder as exc:
        raise unavailable(StoreProblem.BROKEN_REPLY, "keys out of order") from exc
    found += [a for a in grouping.finish() if a.name == name]
    return found[0] if found else None


async def _exists(objects: Objects, key: str) -> bool:
    async with aclosing(objects.pages(key)) as pages:
        async for page in pages:
            return any(entry.key == key for entry in page)
    return False
