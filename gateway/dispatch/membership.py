"""Shell. What this gateway does when a worker comes, changes or goes: it logs that, welcomes the
worker, tells it what to load first, and gives back the requests of a worker that was lost.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from gateway.dispatch.outbox import WorkerOutbox
from gateway.fleet.fleet import Changed, Fleet, FleetEvent, Joined, Lost, WorkerView
from gateway.routing.policy import Policy
from shared.link import messages

log = logging.getLogger("loraplex.dispatcher")


class Membership:
    """Passes on to `fleet` what is heard of workers, and acts on what comes of it.

    Args:
        on_lost: takes back the requests of a worker whose life is over.
    """

    def __init__(
        self,
        fleet: Fleet,
        policy: Policy,
        outbox: WorkerOutbox,
        clock: Callable[[], float],
        on_lost: Callable[[Lost], None],
    ) -> None:
        self._fleet = fleet
        self._policy = policy
        self._outbox = outbox
        self._clock = clock
        self._on_lost = on_lost

    def beat(self, peer: bytes, beat: messages.Heartbeat) -> None:
        self._apply(self._fleet.beat(beat, self._clock()), peer)
        self._send_warm_set(beat.worker)

    def attach(self, attach: messages.Attach) -> None:
        self._fleet.attach(attach.worker, attach.epoch)
        self._send_warm_set(attach.worker)

    def expire(self, now: float) -> None:
        """Gives up workers that were silent for too long."""
        self._apply(self._fleet.expire(now))

    def link(self, peer: bytes, carries: bool, heard: bool) -> str | None:
        """See LinkEvents. Returns the worker's base model if it can be sent requests again."""
        worker_id, epoch = messages.life_of(peer)
        if heard:
            self._fleet.heard(worker_id, epoch, self._clock())
        worker = self._fleet.link(worker_id, epoch, carries)
        if worker is None:
            return None
        said = "carries again" if carries else "does not carry"
        log.warning("data connection %s", said, extra={"worker": worker.id})
        return worker.beat.base if carries else None

    def stopped(self, last: messages.Stopped) -> None:
        """The worker's last word, after all its frames."""
        lost = self._fleet.ended(last.worker, last.epoch, last.reason)
        self._apply([lost] if lost is not None else [])

    def unreachable(self, worker: WorkerView) -> None:
        """A send to this life of the worker has failed."""
        lost = self._fleet.unreachable(worker.id, worker.beat.epoch)
        if lost is not None:
            self._apply([lost])

    def ended(self, worker_id: messages.WorkerId, epoch: int, reason: str) -> None:
        """The worker's process is gone."""
        lost = self._fleet.ended(worker_id, epoch, reason)
        if lost is not None:
            self._apply([lost])

    def suspects(self, worker: WorkerView, reason: str) -> None:
        """The worker says that its engine makes no progress."""
        changed = self._fleet.suspects(worker.id, worker.beat.epoch, reason)
        if changed is not None:
            self._apply([changed])

    def leaves(self, worker: WorkerView, reason: str) -> None:
        """The worker says that it takes no more requests."""
        changed = self._fleet.leaves(worker.id, worker.beat.epoch, reason)
        if changed is not None:
            self._apply([changed])

    def greet(self, worker: WorkerView) -> None:
        """Welcomes a worker again whose data socket never attached: the first welcome may have been
        lost.
        """
        self._outbox.welcome(messages.identity(worker.id, worker.beat.epoch))

    def _apply(self, events: Iterable[FleetEvent], peer: bytes | None = None) -> None:
        for event in events:
            _log(event)
            if isinstance(event, Joined) and peer is not None:
                self._outbox.welcome(peer)
            elif isinstance(event, Lost):
                self._outbox.forget(messages.identity(event.worker, event.epoch))
                self._on_lost(event)

    def _send_warm_set(self, worker_id: messages.WorkerId) -> None:
        """Once per life of a worker, as soon as it takes requests: the adapters that it should load
        before the first of them.
        """
        worker = self._fleet.get(worker_id)
        if worker is not None and self._fleet.first_time_routable(worker):
            for adapter in self._policy.warm_set(worker, self._fleet, self._clock()):
                self._outbox.send(worker, messages.Prefetch(adapter))


def _log(event: FleetEvent) -> None:
    if isinstance(event, Joined):
        log.info("worker joined", extra={"worker": event.worker})
    elif isinstance(event, Changed):
        state = event.now.name.lower()
        log.info(
            "worker state",
            extra={"worker": event.worker, "state": state, "reason": event.reason},
        )
    else:
        lost = {"worker": event.worker, "reason": event.reason, "requests": len(event.streams)}
        log.warning("worker lost", extra=lost)
