"""Shell. Heartbeats. Each one is a full snapshot of this worker, sent to every gateway. They are
sent at an interval, and at once when the agent has news.

One synchronous call reads the snapshot, and sending it never waits for a request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from shared.link import messages
from worker.adapters.load_times import LoadTimes
from worker.engine.base import EngineFacts, EngineStats
from worker.session import GatewaySession
from worker.settings import WorkerSettings


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """What a heartbeat says of the worker; it is the same for every gateway. `running` and
    `waiting` count requests. `suspect` is the reason why the engine is not trusted ("": it is
    trusted).
    """

    state: messages.WorkerState
    reason: str
    facts: EngineFacts
    stats: EngineStats
    running: int
    waiting: int
    adapters: tuple[messages.AdapterState, ...]
    times: LoadTimes
    loads: dict[str, int]
    evictions: dict[str, int]
    suspect: str = ""
    warming: bool = False
    engine_requests: int = 0
    failed: bool = False


class HeartbeatSender:
    """Sends the heartbeats of one worker. `status` takes the snapshot. `host` names the disk cache
    of this host. Workers of other hosts get files from `peer_endpoint` ("": from nowhere).
    """

    def __init__(
        self,
        settings: WorkerSettings,
        sessions: Iterable[GatewaySession],
        status: Callable[[], WorkerStatus],
        host: str,
        peer_endpoint: str,
    ) -> None:
        self._settings, self._sessions, self._status = settings, sessions, status
        self._host, self._peer_endpoint = host, peer_endpoint

    async def run(self) -> None:
        """Sends a heartbeat every `heartbeat_s`, until cancelled."""
        while True:
            self.send()
            await asyncio.sleep(self._settings.heartbeat_s)

    def send(self) -> None:
        """Sends one heartbeat to every gateway now. Never waits."""
        status = self._status()
        for session in self._sessions:
            session.send_heartbeat(self._heartbeat(session, status))

    def _heartbeat(self, session: GatewaySession, status: WorkerStatus) -> messages.Heartbeat:
        settings, facts, stats, times = self._settings, status.facts, status.stats, status.times
        return messages.Heartbeat(
            worker=settings.worker,
            epoch=session.epoch,
            seq=session.next_seq(),
            base=settings.base,
            state=status.state,
            capacity=min(settings.model.deployment_config.max_ongoing_requests, facts.capacity),
            slots=facts.slots,
            running=status.running,
            waiting=status.waiting,
            yours=session.open_requests,
            acked=session.last_sid,
            kv_usage=stats.kv_usage,
            adapters=status.adapters,
            prefill_tokens_per_s=stats.prefill_tokens_per_s,
            step_s=stats.step_s,
            load_s=times.load_s,
            stall_s=times.stall_s,
            load_bytes=round(times.load_bytes),
            reason=status.reason,
            fetch_s=times.fetch_s,
            host=self._host,
            peer_endpoint=self._peer_endpoint,
            suspect=status.suspect,
            tasks=facts.tasks,
            max_model_len=facts.max_model_len,
            adapter_loads=status.loads,
            adapter_evictions=status.evictions,
            warming=status.warming,
            engine_requests=status.engine_requests,
            failed=status.failed,
            stalled_s=times.stalled_s,
        )
