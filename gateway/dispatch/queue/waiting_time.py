"""Pure. How long requests wait for a worker, by the measured rate. A request whose turn would come
too late is refused.
"""

from __future__ import annotations

from gateway.dispatch.queue.admission import Admission
from gateway.dispatch.queue.overload import DrainRates
from gateway.dispatch.request import InFlightRequest
from gateway.dispatch.scaling_status import ScalingState
from gateway.fleet.fleet import Fleet
from shared.errors import DeadlineExceeded, LoraplexError, Overloaded

MIN_RETRY_AFTER_S, MAX_RETRY_AFTER_S = 1.0, 60.0
NO_WORKER_RETRY_AFTER_S = 5.0
"""The Retry-After while no worker serves. It is about the time that a worker takes to come back."""


class WaitingTime:
    """The waiting times of all base models."""

    def __init__(
        self,
        fleet: Fleet,
        admission: Admission[InFlightRequest],
        drains: DrainRates,
        scaling: ScalingState,
    ) -> None:
        self._fleet, self._admission = fleet, admission
        self._drains, self._scaling = drains, scaling

    def retry_after_s(self, base: str) -> float:
        """Seconds until the present queue has been served at the measured rate, or an estimate if
        no rate is known. If no worker serves, the time that the next one takes to start.
        """
        places = self._places(base)
        if not places:
            start_s = self._scaling.start_s(base)
            return max(MIN_RETRY_AFTER_S, start_s) if start_s else NO_WORKER_RETRY_AFTER_S
        depth = self._admission.depth(base)
        guess_s = self._drains.of(base).wait_s(depth, places) or depth / places
        return max(MIN_RETRY_AFTER_S, min(MAX_RETRY_AFTER_S, guess_s))

    def refusal(self, request: InFlightRequest) -> LoraplexError | None:
        """The error for a request that would have to queue, if its turn would not come in time.
        None: it would.
        """
        base, requester = request.model.base, request.requester
        timeout_s = request.client_request.timeout_s
        drain, places = self._drains.of(base), self._places(base)
        service_s = self._service_s(request)
        ahead = self._admission.ahead(base, requester.tenant, requester.weight, requester.priority)
        wait_s = drain.wait_s(ahead, places)
        if places and wait_s > self._admission.timeout_s:
            return Overloaded(
                f"All workers are busy; about {wait_s:.0f} s of requests wait already.",
                retry_after_s=self.retry_after_s(base),
            )
        if timeout_s and wait_s + service_s > timeout_s:
            return DeadlineExceeded(
                f"The request cannot be finished within {timeout_s:g} s: others wait.",
                retry_after_s=self.retry_after_s(base),
            )
        return None

    def too_late(self, request: InFlightRequest, now: float) -> DeadlineExceeded | None:
        """The error for a request that has queued, if it can no longer finish in time. None: it
        can.
        """
        timeout_s = request.client_request.timeout_s
        if not timeout_s or request.t_head:
            return None
        if now + self._service_s(request) <= request.t_start + timeout_s:
            return None
        return DeadlineExceeded(
            f"The request could not be begun in time to finish within {timeout_s:g} s."
        )

    def _service_s(self, request: InFlightRequest) -> float:
        drain = self._drains.of_tenant(request.model.base, request.requester.tenant)
        return drain.service_s(request.client_request.output_tokens)

    def _places(self, base: str) -> int:
        return sum(w.heartbeat.capacity for w in self._fleet.routable(base))
