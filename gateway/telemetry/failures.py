"""Shell. What is said when code of ours raises while it handles one request: that request alone
ends, with an error, and every such failure is counted.
"""

from __future__ import annotations

import logging

from gateway.telemetry.prometheus import Metrics
from shared.errors import InternalError
from shared.runtime.log import place_of

log = logging.getLogger("loraplex.gateway")

MAX_PLACES = 100
"""Places in the code of which a failure is logged; each is logged once, and every one is counted.
A client that can make us raise must not be able to fill the disk as well.
"""


class Failures:
    """Counts what broke, and logs each place in the code once, without what the error quotes."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._places: set[str] = set()

    def note(self, exc: Exception, request: str = "") -> InternalError:
        """What the client of that request is told."""
        self._metrics.internal_error()
        place = place_of(exc)
        if place not in self._places and len(self._places) < MAX_PLACES:
            self._places.add(place)
            log.error(
                "a request failed inside the gateway", extra={"request": request, "at": place}
            )
        return InternalError("The gateway failed on this request; other requests are not affected.")
