"""Pure. What is known of an overloaded queue: how fast it drains, how long a request will take, and
whose clients do not wait for their answers.

Work that nobody waits for costs as much as work that counts. So a request that cannot be answered
in its time is refused when it comes, or not begun. That needs its deadline to be known. If clients
just leave, a queue in order of arrival serves only those that are about to leave. For such tenants
the newest request goes first, as in adaptive LIFO (Maurer, "Fail at Scale", ACM Queue 13(8), 2015):
its client has hardly waited.

Order of arrival is kinder to clients that do wait. So it holds until a tenth of a tenant's requests
end without an answer that somebody waited for. CoDel's signal (the least wait of an interval) is
not used, since a long queue of patient clients is no fault.
"""

from __future__ import annotations

from collections import defaultdict, deque

REMEMBERED = 64
"""Requests of which means are taken."""
WEIGHT = 2 / REMEMBERED
"""The weight of the newest value in a moving average that is as steady as such a mean."""
LEAST_SERVED = 8
"""After so many answers, the time that they take counts as known."""
LEFT_SHARE = 0.1
"""If more than this share of a tenant's requests end in vain, its newest go first. Below it, no
more than this share of the work is lost.
"""
FORGOTTEN_SHARE = 1e-3


class DrainRate:
    """How fast requests are answered. It is told of every one, and asked for few. So the means are
    taken when it is asked.
    """

    def __init__(self) -> None:
        self._newest: deque[tuple[float, int]] = deque(maxlen=REMEMBERED)
        self._means: tuple[float, float] | None = None

    def served(self, service_s: float, output_tokens: int) -> None:
        """A request was answered, `service_s` after it was sent to a worker."""
        self._newest.append((service_s, output_tokens))
        self._means = None

    def service_s(self, output_tokens: int) -> float:
        """How long a request with this token limit (0: none) will take. 0.0: too little is
        known.
        """
        usual_s, usual_tokens = self._usual()
        if 0 < output_tokens < usual_tokens:
            return usual_s * output_tokens / usual_tokens
        return usual_s

    def _usual(self) -> tuple[float, float]:
        """Seconds and output tokens of a request. Zeros: too little is known."""
        newest = self._newest
        if len(newest) < LEAST_SERVED:
            return 0.0, 0.0
        if self._means is None:
            seconds, tokens = zip(*newest, strict=True)
            self._means = sum(seconds) / len(newest), sum(tokens) / len(newest)
        return self._means

    def wait_s(self, ahead: float, places: int) -> float:
        """Seconds until `ahead` requests have been taken by `places` places (Little's law). 0.0:
        too little is known.
        """
        return ahead * self.service_s(0) / places if places else 0.0

    def stream_tokens_per_s(self) -> float:
        """The output tokens per second of one stream. 0.0: too little is known."""
        usual_s, usual_tokens = self._usual()
        return usual_tokens / usual_s if usual_s else 0.0


class DrainRates:
    """How fast requests are answered, by base model and by tenant. How long a queue takes is a
    matter of all who wait in it. How long a request takes once it is sent is a matter of its own
    tenant's requests: another one's may be a hundred times as long.
    """

    def __init__(self) -> None:
        self._of_base: defaultdict[str, DrainRate] = defaultdict(DrainRate)
        self._of_tenant: defaultdict[tuple[str, str], DrainRate] = defaultdict(DrainRate)

    def of(self, base: str) -> DrainRate:
        return self._of_base[base]

    def of_tenant(self, base: str, tenant: str) -> DrainRate:
        """Without keys everybody is the tenant ""."""
        return self._of_tenant[base, tenant] if tenant else self._of_base[base]

    def served(self, base: str, tenant: str, service_s: float, output_tokens: int) -> None:
        self._of_base[base].served(service_s, output_tokens)
        if tenant:
            self._of_tenant[base, tenant].served(service_s, output_tokens)


class AbandonmentRate:
    """For each tenant, the share of its requests that ended before they were answered. Either the
    client left, or the time was over.
    """

    def __init__(self) -> None:
        self._left: dict[str, float] = {}

    def ended(self, tenant: str, *, in_vain: bool) -> None:
        if not in_vain and tenant not in self._left:
            return
        before = self._left.get(tenant, 0.0)
        after = before + WEIGHT * (in_vain - before)
        if after > FORGOTTEN_SHARE:
            self._left[tenant] = after
        else:
            self._left.pop(tenant, None)

    def newest_first(self, tenant: str) -> bool:
        return self._left.get(tenant, 0.0) > LEFT_SHARE
