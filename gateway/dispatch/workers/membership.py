"""Shell. What this gateway does when a worker comes, changes or leaves. It logs that, welcomes the
worker, and tells it what to load first. For a lost worker it hands back its requests.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from gateway.dispatch.workers.outbox import WorkerOutbox
from gateway.fleet.fleet import (
    Fleet,
    FleetEvent,
    WorkerChanged,
    WorkerJoined,
    WorkerLost,
    WorkerView,
)
from gateway.routing.policy import Policy
from shared.adapters.identity import AdapterRef
from shared.link import messages

log = logging.getLogger("loraplex.dispatcher")


class Membership:
    """Passes news of workers to `fleet`, and acts on the events that follow.

    Args:
        on_lost: takes back the requests of a worker whose life is over.
        on_room: called with the base model of a worker that may have room for waiting requests.
    """

    def __init__(
        self,
        fleet: Fleet,
        policy: Policy,
        outbox: WorkerOutbox,
        clock: Callable[[], float],
        on_lost: Callable[[WorkerLost], None],
        on_room: Callable[[str], None],
    ) -> None:
        self._fleet = fleet
        self._policy = policy
        self._outbox = outbox
        self._clock = clock
        self._on_lost = on_lost
        self._on_room = on_room
        self.wanted_on: Callable[[WorkerView], Iterable[AdapterRef]] = lambda _: ()
        """What a worker is to load whatever is asked for."""

    def heartbeat(self, peer: bytes, heartbeat: messages.Heartbeat) -> None:
        self._apply(self._fleet.heartbeat(heartbeat, self._clock()), peer)
        self._warm_up(heartbeat.worker)
        self._on_room(heartbeat.base)

    def loop_held(self, held: messages.LoopHeld) -> None:
        """The worker's process lives, but a request blocks its event loop."""
        self._fleet.loop_held(held.worker, held.epoch, held.held_s, self._clock())

    def attach(self, attach: messages.Attach) -> None:
        self._fleet.attach(attach.worker, attach.epoch)
        self._warm_up(attach.worker)
        worker = self._fleet.get(attach.worker)
        if worker is not None:
            self._on_room(worker.heartbeat.base)

    def expire(self, now: float) -> None:
        """Removes workers whose lease has run out."""
        self._apply(self._fleet.expire(now))

    def link(self, peer: bytes, carries: bool, heard: bool) -> None:
        """See LinkEvents."""
        worker_id, epoch = messages.worker_and_epoch_of(peer)
        if heard:
            self._fleet.heard(worker_id, epoch, self._clock())
        worker = self._fleet.link(worker_id, epoch, carries)
        if worker is None:
            return
        message = "carries again" if carries else "does not carry"
        # imports and model loads hold a worker's loop while it boots and while it ends
        serving = worker.heartbeat.state is messages.WorkerState.SERVING
        level = logging.WARNING if serving else logging.DEBUG
        log.log(level, "data connection %s", message, extra={"worker": worker.id})
        if carries:
            self._on_room(worker.heartbeat.base)

    def stopped(self, last: messages.Stopped) -> None:
        """The worker's last message. It comes after all its frames."""
        lost = self._fleet.ended(last.worker, last.epoch, last.reason)
        self._apply([lost] if lost is not None else [])

    def unreachable(self, worker: WorkerView) -> None:
        """A send to this life of the worker has failed."""
        lost = self._fleet.unreachable(worker.id, worker.heartbeat.epoch)
        if lost is not None:
            self._apply([lost])

    def ended(self, worker_id: messages.WorkerId, epoch: int, reason: str, killed: bool) -> None:
        """The worker's process is gone. WorkerLost says what `killed` means."""
        lost = self._fleet.ended(worker_id, epoch, reason, killed=killed)
        if lost is not None:
            self._apply([lost])

    def suspects(self, worker: WorkerView, reason: str) -> None:
        """The worker reports that its engine makes no progress."""
        changed = self._fleet.suspects(worker.id, worker.heartbeat.epoch, reason)
        if changed is not None:
            self._apply([changed])

    def leaves(self, worker: WorkerView, reason: str) -> None:
        """The worker reports that it takes no more requests."""
        changed = self._fleet.leaves(worker.id, worker.heartbeat.epoch, reason)
        if changed is not None:
            self._apply([changed])

    def greet(self, worker: WorkerView) -> None:
        """Welcomes a worker again if its data connection never opened. The first welcome may have
        been lost.
        """
        self._outbox.welcome(worker.peer)

    def _apply(self, events: Iterable[FleetEvent], peer: bytes | None = None) -> None:
        for event in events:
            _log(event)
            if isinstance(event, WorkerJoined) and peer is not None:
                self._outbox.welcome(peer)
            elif isinstance(event, WorkerChanged) and event.now is messages.WorkerState.SERVING:
                worker = self._fleet.get(event.worker)
                if worker is not None and not worker.carries:  # not told of while it booted
                    log.warning("data connection does not carry", extra={"worker": event.worker})
            elif isinstance(event, WorkerLost):
                self._outbox.forget(messages.identity(event.worker, event.epoch))
                self._on_lost(event)

    def _warm_up(self, worker_id: messages.WorkerId) -> None:
        """Tells a new worker, once, what to load before its first request: what is wanted on every
        worker, what its predecessor had, and its share of what the others are asked for.
        """
        worker, now = self._fleet.get(worker_id), self._clock()
        if worker is None or not self._fleet.to_warm_up(worker):
            return
        wanted = [
            *self.wanted_on(worker),
            *self._fleet.predecessor(worker, now),
            *self._policy.warm_set(worker, self._fleet, now),
        ]
        adapters = tuple(dict.fromkeys(wanted))[: worker.heartbeat.slots]
        if adapters or worker.warming:  # a worker that warms up waits for the answer
            self._outbox.send(worker, messages.WarmUp(adapters))


def _log(event: FleetEvent) -> None:
    if isinstance(event, WorkerJoined):
        log.info("worker joined", extra={"worker": event.worker})
    elif isinstance(event, WorkerChanged):
        state = event.now.name.lower()
        log.info(
            "worker state",
            extra={"worker": event.worker, "state": state, "reason": event.reason},
        )
    else:
        lost = {"worker": event.worker, "reason": event.reason, "requests": len(event.streams)}
        log.warning("worker lost", extra=lost)
