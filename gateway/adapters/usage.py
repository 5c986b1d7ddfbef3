"""Pure. What a gateway process has seen of each adapter: its requests, the time of the last one,
and the last refusal. Bounded: those unused for the longest time are forgotten.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

import msgspec

from shared.adapters.identity import AdapterRef
from shared.errors import AdapterNotFound, InvalidAdapter, LoraplexError, StoreUnavailable

MAX_RECORDS = 20_000
MAX_REASON = 500  # characters
ABOUT_ADAPTERS = (AdapterNotFound, InvalidAdapter, StoreUnavailable)


class UsageRecord(msgspec.Struct, array_like=True):
    """`last_used` is in seconds of the Unix epoch. `refused` is the digest that was refused last;
    `on_disk` is one that a worker had on its disk.
    """

    hits: int = 0
    last_used: float = 0.0
    refused: str = ""
    code: str = ""
    reason: str = ""
    on_disk: str = ""

    def plus(self, other: UsageRecord) -> UsageRecord:
        """The records of two processes. The later one knows what was said last."""
        last = max(self, other, key=lambda record: record.last_used)
        return msgspec.structs.replace(last, hits=self.hits + other.hits)


AdapterName = tuple[str, str]
"""(base model, name of the adapter)."""


class AdapterUsage:
    """The usage records, by (base, name)."""

    def __init__(self) -> None:
        self._records: OrderedDict[AdapterName, UsageRecord] = OrderedDict()

    def get(self, base: str, name: str) -> UsageRecord | None:
        return self._records.get((base, name))

    def rows(self, base: str, name: str) -> list[tuple[str, str, UsageRecord]]:
        """The records of one adapter, or of all of them where `name` is empty."""
        if name:
            record = self._records.get((base, name))
            return [(base, name, record)] if record is not None else []
        return [(*key, record) for key, record in self._records.items()]

    def with_others(
        self, rows: Iterable[tuple[str, str, UsageRecord]]
    ) -> Mapping[AdapterName, UsageRecord]:
        """The records of this process and those of others."""
        total = dict(self._records)
        for base, name, record in rows:
            known = total.get((base, name))
            total[base, name] = record if known is None else known.plus(record)
        return total

    def used(self, adapter: AdapterRef, now: float) -> None:
        """A request came for the adapter."""
        record = self._record(adapter)
        record.hits += 1
        record.last_used = now

    def worked(self, adapter: AdapterRef) -> None:
        """A worker has the adapter on its disk, and it is valid."""
        record = self._record(adapter)
        record.on_disk = adapter.digest
        record.refused = record.code = record.reason = ""

    def failed(self, adapter: AdapterRef, error: LoraplexError) -> None:
        """A request or command failed. Only errors that say something about the adapter are
        recorded.
        """
        if isinstance(error, ABOUT_ADAPTERS):
            record = self._record(adapter)
            record.refused, record.code, record.reason = (
                adapter.digest,
                error.code,
                error.message[:MAX_REASON],
            )

    def _record(self, adapter: AdapterRef) -> UsageRecord:
        key = (adapter.base, adapter.name)
        record = self._records.get(key)
        if record is None:
            record = self._records[key] = UsageRecord()
            if len(self._records) > MAX_RECORDS:
                self._records.popitem(last=False)
        else:
            self._records.move_to_end(key)
        return record
