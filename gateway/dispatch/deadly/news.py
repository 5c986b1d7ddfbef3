"""Shell. Gateways of several machines tell each other what workers died of, by way of a worker that
lives: they have no other connection.
"""

from __future__ import annotations

from collections import deque

from gateway.dispatch.workers.outbox import WorkerOutbox
from gateway.fleet.fleet import Fleet
from shared.link import messages
from shared.link.sockets import SendResult

MAX_UNTOLD = 1024
"""As many as are remembered (see DeadlyRequests)."""


class DeathNews:
    """Tells one worker of the base model, which passes it on. While there is none, it waits."""

    def __init__(self, fleet: Fleet, outbox: WorkerOutbox) -> None:
        self._fleet = fleet
        self._outbox = outbox
        self._untold: deque[tuple[str, messages.KnownDeaths]] = deque(maxlen=MAX_UNTOLD)

    def tell(self, base: str, known: messages.KnownDeaths) -> None:
        self._untold.append((base, known))
        if len(self._untold) == 1:
            self.tell_waiting()

    def tell_waiting(self) -> None:
        """Call it a few times per second."""
        for _ in range(len(self._untold)):
            base, known = self._untold.popleft()
            if not self._told(base, known):
                self._untold.append((base, known))

    def _told(self, base: str, known: messages.KnownDeaths) -> bool:
        return any(
            self._outbox.send(worker, known) is SendResult.OK
            for worker in self._fleet.routable(base)
        )
