"""Shell. Scale-down: loads adapters on workers that stay, before the only worker that has them
retires.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from gateway.fleet.commands import SendCommand
from gateway.fleet.fleet import Fleet
from gateway.supervisor.autoscaling.reports import AdapterHandover, ModelStatus
from shared.adapters.identity import AdapterRef
from shared.link.messages import AdapterAction

log = logging.getLogger("loraplex.handover")


class AdapterHandovers:
    """Sends each load that the supervisor wants once, and forgets it when the supervisor no longer
    wants it.
    """

    def __init__(self, fleet: Fleet, send_command: SendCommand) -> None:
        self._fleet, self._send_command = fleet, send_command
        self._loads: dict[tuple[str, AdapterHandover], asyncio.Future[None]] = {}

    def on_scaling(self, models: Mapping[str, ModelStatus]) -> None:
        """Called with every status of the supervisor: base model -> status."""
        wanted = {
            (base, handover) for base, status in models.items() for handover in status.handovers
        }
        self._loads = {key: load for key, load in self._loads.items() if key in wanted}
        for base, handover in wanted - self._loads.keys():
            worker = self._fleet.get(handover.worker)
            if worker is None:
                continue
            adapter = AdapterRef(base, handover.adapter.name, handover.adapter.digest)
            load = self._send_command(worker, AdapterAction.LOAD, adapter, None)
            load.add_done_callback(_log_failure)
            self._loads[base, handover] = load


def _log_failure(load: asyncio.Future[None]) -> None:
    if not load.cancelled() and (error := load.exception()) is not None:
        log.info("adapter not loaded elsewhere before scale-down", extra={"error": str(error)})
