"""Shell. What the gauges of the fleet say of a worker."""

from __future__ import annotations

from gateway.fleet.fleet import Fleet
from gateway.telemetry.prometheus import FleetCollector
from shared.link.messages import Heartbeat, WorkerState


def state_of(fleet: Fleet) -> list[str]:
    (up, *_) = FleetCollector(fleet).collect()
    return [sample.labels["state"] for sample in up.samples]


def test_a_worker_that_nothing_can_be_sent_to_is_not_called_serving() -> None:
    fleet = Fleet(1.0)
    fleet.beat(Heartbeat("w0", 1, 1, "base", WorkerState.SERVING, 8, 2), 0.0)
    assert state_of(fleet) == ["joining"]
    fleet.attach("w0", 1)
    assert state_of(fleet) == ["serving"]
    fleet.beat(Heartbeat("w0", 1, 2, "base", WorkerState.DRAINING, 8, 2), 0.1)
    assert state_of(fleet) == ["draining"]
