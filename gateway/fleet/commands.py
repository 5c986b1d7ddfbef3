"""Shell. How other rooms have a worker fetch, load, pin or evict an adapter."""

from __future__ import annotations

import asyncio
from typing import Protocol

from gateway.fleet.worker_view import WorkerView
from shared.adapters.identity import AdapterRef, StoredAdapter
from shared.link.messages import AdapterAction


class SendCommand(Protocol):
    """The future resolves once the worker has done it, and fails with a LoraplexError."""

    def __call__(
        self,
        worker: WorkerView,
        action: AdapterAction,
        adapter: AdapterRef,
        stored: StoredAdapter | None,
    ) -> asyncio.Future[None]: ...
