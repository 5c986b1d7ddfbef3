"""Shell. Handles errors that the gateway's own code should never raise. The request at hand ends
with an error; other requests are not affected. Every such error is counted.
"""

from __future__ import annotations

import logging

from gateway.telemetry.prometheus import Metrics
from shared.errors import InternalError
from shared.runtime.log import place_of

log = logging.getLogger("loraplex.gateway")

MAX_PLACES = 100
"""Errors are logged from at most so many places in the code, once per place. Otherwise a client
that can trigger an error could fill the disk with log lines.
"""


class UnexpectedErrors:
    """Counts unexpected errors, and logs the place in the code where each kind occurred. The log
    line does not repeat the error's text, which may quote a prompt.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._places: set[str] = set()

    def note(self, exc: Exception, request: str = "") -> InternalError:
        """Counts `exc` and returns the error for the client of the request."""
        self._metrics.internal_error()
        place = place_of(exc)
        if place not in self._places and len(self._places) < MAX_PLACES:
            self._places.add(place)
            log.error(
                "a request failed inside the gateway", extra={"request": request, "at": place}
            )
        return InternalError("The gateway failed on this request; other requests are not affected.")
