"""Shell. Loads on workers that stay, before the only worker with an adapter leaves."""

from __future__ import annotations

import asyncio

from gateway.adapters.handover import AGAIN_S, AdapterHandovers
from gateway.fleet.fleet import Fleet
from gateway.fleet.worker_view import WorkerView
from gateway.supervisor.autoscaling.reports import AdapterHandover, HeldAdapter, ModelStatus
from shared.adapters.identity import AdapterRef, StoredAdapter
from shared.errors import WorkerUnavailable
from shared.link.messages import AdapterAction, Heartbeat, WorkerState

LEAVES = {
    "m": ModelStatus(wanted=1, handovers=(AdapterHandover(HeldAdapter("a", "1"), "w0"),)),
}


async def test_a_load_that_failed_is_sent_again_after_a_moment_and_one_that_did_not_is_not() -> (
    None
):
    fleet, now = Fleet(3.0), 100.0
    fleet.heartbeat(Heartbeat("w0", 1, 1, "m", WorkerState.SERVING), now)
    sent: list[asyncio.Future[None]] = []

    def send(
        worker: WorkerView, action: AdapterAction, adapter: AdapterRef, _: StoredAdapter | None
    ) -> asyncio.Future[None]:
        assert (worker.id, action, adapter.name) == ("w0", AdapterAction.LOAD, "a")
        sent.append(asyncio.get_running_loop().create_future())
        return sent[-1]

    handovers = AdapterHandovers(fleet, send, lambda: now)
    handovers.on_scaling(LEAVES)
    sent[0].set_exception(WorkerUnavailable("The worker does not serve.", retry_after_s=1.0))
    now += AGAIN_S / 2
    handovers.on_scaling(LEAVES)
    assert len(sent) == 1, "not ten times a second"
    now += AGAIN_S / 2
    handovers.on_scaling(LEAVES)
    assert len(sent) == 2
    sent[1].set_result(None)
    now += 2 * AGAIN_S
    handovers.on_scaling(LEAVES)
    assert len(sent) == 2
    handovers.on_scaling({})
    handovers.on_scaling(LEAVES)
    assert len(sent) == 3, "it is wanted anew"
