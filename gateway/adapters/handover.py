"""Shell. Scale-down: loads adapters on workers that stay, before the only worker that has them
retires.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

from gateway.fleet.commands import SendCommand
from gateway.fleet.fleet import Fleet
from gateway.supervisor.autoscaling.reports import AdapterHandover, ModelStatus
from shared.adapters.identity import AdapterRef
from shared.link.messages import AdapterAction

log = logging.getLogger("loraplex.handover")

AGAIN_S = 1.0
"""A load that has failed is sent again after this. A worker may take no commands for a moment, and
the one that leaves waits for much longer.
"""


class AdapterHandovers:
    """Sends each load that the supervisor wants until one has not failed, and forgets it when the
    supervisor no longer wants it.
    """

    def __init__(
        self,
        fleet: Fleet,
        send_command: SendCommand,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fleet, self._send_command, self._clock = fleet, send_command, clock
        # with the time when it was sent
        self._loads: dict[tuple[str, AdapterHandover], tuple[asyncio.Future[None], float]] = {}

    def on_scaling(self, models: Mapping[str, ModelStatus]) -> None:
        """Called with every status of the supervisor: base model -> status."""
        wanted = {
            (base, handover) for base, status in models.items() for handover in status.handovers
        }
        now = self._clock()
        self._loads = {
            key: (load, sent)
            for key, (load, sent) in self._loads.items()
            if key in wanted and not (now - sent >= AGAIN_S and _failed(load))
        }
        for base, handover in wanted - self._loads.keys():
            worker = self._fleet.get(handover.worker)
            if worker is None:
                continue
            adapter = AdapterRef(base, handover.adapter.name, handover.adapter.digest)
            load = self._send_command(worker, AdapterAction.LOAD, adapter, None)
            load.add_done_callback(_log_failure)
            self._loads[base, handover] = load, now


def _failed(load: asyncio.Future[None]) -> bool:
    return load.done() and (load.cancelled() or load.exception() is not None)


def _log_failure(load: asyncio.Future[None]) -> None:
    if not load.cancelled() and (error := load.exception()) is not None:
        log.info("adapter not loaded elsewhere before scale-down", extra={"error": str(error)})
