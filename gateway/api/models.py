"""Shell. The bytes of `GET /v1/models`: made once per state of the catalogs, in a thread, because a hundred thousand names take a tenth of a second."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping

from gateway.api import schema as openai
from gateway.adapters.catalog import Catalog


class ModelList:
    """`catalogs`: every base model; None where it has no adapter store. `aliases`: those of a base model, listed beside its adapters."""

    def __init__(self, catalogs: Mapping[str, Catalog | None], aliases: Callable[[str], Iterable[str]], created: int) -> None:
        self._catalogs, self._aliases = catalogs, aliases
        self._created = created
        self._making = asyncio.Lock()
        self._state: tuple[object, ...] | None = None
        self._body = b""

    async def body(self) -> bytes:
        """As of now, or of a moment in this call."""
        if self._state != self._versions():
            async with self._making:  # many who ask at once wait for one
                state = self._versions()
                if self._state != state:
                    digests = {base: self._digests(base, catalog) for base, catalog in self._catalogs.items()}
                    self._body = await asyncio.to_thread(openai.model_list, digests, self._created)
                    self._state = state
        return self._body

    def _digests(self, base: str, catalog: Catalog | None) -> dict[str, str]:
        found = {}
        if catalog is not None:
            found = {name: adapter.digest for name, adapter in catalog.known.items()}
            # What answers differs from what the store shows only while a new version is made ready, or is refused.
            found |= {change.new.name: change.old.digest for change in catalog.versions.changes() if change.new.name in found}
        return found | dict.fromkeys(self._aliases(base), "")

    def _versions(self) -> tuple[object, ...]:
        return tuple(
            (
                tuple(self._aliases(base)),
                *((c.version, *((x.new.name, x.old.digest) for x in c.versions.changes())) if c is not None else ()),
            )
            for base, c in self._catalogs.items()
        )
