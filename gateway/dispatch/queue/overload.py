"""Pure. What there is to know of an overloaded queue: how fast it drains, how long a request will
be worked on, and whose clients do not wait.

Work that nobody waits for any more costs as much as work that counts. So a request that cannot be
answered in its time is refused when it comes, or not begun. That needs the time to be known; where
clients just leave, a queue in order of arrival serves only those that are about to. There the
newest go first, as in adaptive LIFO (Maurer, "Fail at Scale", ACM Queue 13(8), 2015): whoever is
served has hardly waited. Order of arrival is kinder to clients that do wait, so it holds until a
tenth of a tenant's requests end without an answer that somebody waited for. CoDel's sign (the
least wait of an interval) is not used: a long queue of patient clients is no fault.
"""

from __future__ import annotations

WEIGHT = 1 / 32
"""Of the newest value in a moving average: a few dozen requests are remembered."""
LEAST_SERVED = 8
"""Answers before their time on a worker is taken for known."""
LEFT_SHARE = 0.1
"""Of a tenant's requests that end in vain, from which on its newest go first: below, no more than
so much of the work is lost.
"""
FORGOTTEN_SHARE = 1e-3


class Drain:
    """The answers of one base model."""

    def __init__(self) -> None:
        self._served = 0
        self._service_s = 0.0
        self._output_tokens = 0.0

    def served(self, service_s: float, output_tokens: int) -> None:
        """A request was answered, `service_s` after it was sent to a worker."""
        self._served += 1
        weight = max(WEIGHT, 1 / self._served)
        self._service_s += weight * (service_s - self._service_s)
        self._output_tokens += weight * (output_tokens - self._output_tokens)

    def service_s(self, output_tokens: int) -> float:
        """How long a request with this limit (0: none) will be worked on; 0.0 if too little is
        known.
        """
        if self._served < LEAST_SERVED:
            return 0.0
        if 0 < output_tokens < self._output_tokens:
            return self._service_s * output_tokens / self._output_tokens
        return self._service_s

    def wait_s(self, ahead: float, places: int) -> float:
        """Until so many requests before it have been taken by so many places (Little's law); 0.0 if
        too little is known.
        """
        return ahead * self.service_s(0) / places if places else 0.0

    def stream_tokens_per_s(self) -> float:
        """Output tokens of one stream; 0.0 if too little is known."""
        return self._output_tokens / self._service_s if self.service_s(0) else 0.0


class Impatience:
    """Of each tenant, the share of its requests that ended before they were answered: because the
    client left, or its time was over.
    """

    def __init__(self) -> None:
        self._left: dict[str, float] = {}

    def ended(self, tenant: str, *, in_vain: bool) -> None:
        before = self._left.get(tenant, 0.0)
        after = before + WEIGHT * (in_vain - before)
        if after > FORGOTTEN_SHARE:
            self._left[tenant] = after
        else:
            self._left.pop(tenant, None)

    def newest_first(self, tenant: str) -> bool:
        return self._left.get(tenant, 0.0) > LEFT_SHARE
