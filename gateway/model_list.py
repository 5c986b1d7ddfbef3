"""Shell. The bytes of `GET /v1/models`: made once per state of the catalogs, in a thread, because a hundred thousand names take a tenth of a second."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from gateway import openai
from gateway.catalog import Catalog


class ModelList:
    """`catalogs`: every base model; None where it has no adapter store."""

    def __init__(self, catalogs: Mapping[str, Catalog | None], created: int) -> None:
        self._catalogs = catalogs
        self._created = created
        self._making = asyncio.Lock()
        self._state: tuple[int, ...] | None = None
        self._body = b""

    async def body(self) -> bytes:
        """As of now, or of a moment in this call."""
        if self._state != self._versions():
            async with self._making:  # many who ask at once wait for one
                state = self._versions()
                if self._state != state:
                    names = {base: tuple(catalog.known) if catalog is not None else () for base, catalog in self._catalogs.items()}
                    self._body = await asyncio.to_thread(openai.model_list, names, self._created)
                    self._state = state
        return self._body

    def _versions(self) -> tuple[int, ...]:
        return tuple(catalog.version for catalog in self._catalogs.values() if catalog is not None)
