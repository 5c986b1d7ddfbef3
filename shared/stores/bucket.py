"""Shell. What S3 and GCS have in common: a bucket lists in pages and streams ranges of objects;
listing, finding and fetching follow.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path

from shared.adapters.identity import StoredAdapter, StoredFile
from shared.stores.listing import Entry, Grouping, Skipped
from shared.stores.objects import find_adapter, list_adapters
from shared.stores.transfer import Stream, Transfer, fetch_adapter


class Bucket(ABC):
    """The contract of AdapterStore over two operations."""

    skipped = Skipped()

    @abstractmethod
    def pages(self, prefix: str) -> AsyncGenerator[Sequence[Entry], None]:
        """As Objects.pages."""

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

    async def fetch(
        self, adapter: StoredAdapter, into: Path, transfer: Transfer | None = None
    ) -> None:
        await fetch_adapter(adapter, into, self._stream, transfer)
