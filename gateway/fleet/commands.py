"""Shell. How other packages make a worker fetch, load, pin or evict an adapter."""

from __future__ import annotations

import asyncio
from typing import Protocol

from gateway.fleet.worker_view import WorkerView
from shared.adapters.identity import AdapterRef, StoredAdapter
from shared.link.messages import AdapterAction


class SendCommand(Protocol):
    """Sends a command to a worker. The future resolves when the worker has carried it out, and
    fails with a LoraplexError.
    """

    def __call__(
        self,
        worker: WorkerView,
        action: AdapterAction,
        adapter: AdapterRef,
        stored: StoredAdapter | None,
    ) -> asyncio.Future[None]: ...
