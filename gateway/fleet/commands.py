"""Shell. DOC."""

from __future__ import annotations

import asyncio
from typing import Protocol

from gateway.fleet.worker_view import WorkerView
from shared.adapters.identity import AdapterRef, StoredAdapter
from shared.link.messages import AdapterAction


class SendCommand(Protocol):
    """Dispatcher.tend: resolves once the worker has done it, fails with a LoraplexError."""

    def __call__(
        self,
        worker: WorkerView,
        action: AdapterAction,
        adapter: AdapterRef,
        stored: StoredAdapter | None,
    ) -> asyncio.Future[None]: ...
