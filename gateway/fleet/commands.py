"""Shell. DOC."""

from __future__ import annotations

import asyncio
from typing import Protocol

from gateway.fleet.worker_view import Worker
from shared.adapters.identity import AdapterRef, StoredAdapter
from shared.link.messages import Action


class Tend(Protocol):
    """Dispatcher.tend: resolves once the worker has done it, fails with a LoraplexError."""

    def __call__(self, worker: Worker, action: Action, adapter: AdapterRef, stored: StoredAdapter | None) -> asyncio.Future[None]: ...
