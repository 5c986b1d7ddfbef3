"""Shell. Loads adapters on workers that stay, before the only worker that has them retires."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from gateway.fleet.commands import SendCommand
from gateway.fleet.fleet import Fleet
from gateway.supervisor.autoscaling.reports import ModelStatus, Move
from shared.adapters.identity import AdapterRef
from shared.link.messages import AdapterAction

log = logging.getLogger("loraplex.moves")


class AdapterMoves:
    """Asks for each move once, for as long as the supervisor wants it."""

    def __init__(self, fleet: Fleet, send_command: SendCommand) -> None:
        self._fleet, self._send_command = fleet, send_command
        self._asked: dict[tuple[str, Move], asyncio.Future[None]] = {}

    def on_scaling(self, models: Mapping[str, ModelStatus]) -> None:
        wanted = {(base, move) for base, status in models.items() for move in status.moves}
        self._asked = {key: asked for key, asked in self._asked.items() if key in wanted}
        for base, move in wanted - self._asked.keys():
            worker = self._fleet.get(move.worker)
            if worker is None:
                continue
            adapter = AdapterRef(base, move.adapter.name, move.adapter.digest)
            asked = self._send_command(worker, AdapterAction.LOAD, adapter, None)
            asked.add_done_callback(_log_failure)
            self._asked[base, move] = asked


def _log_failure(asked: asyncio.Future[None]) -> None:
    if not asked.cancelled() and (error := asked.exception()) is not None:
        log.info("an adapter was not moved", extra={"error": str(error)})
