"""Pure. Formulas of queueing theory that size a cache and a pool of servers.

Che's approximation (Che, Tung and Wang, "Hierarchical Web Caching Systems", 2002; why it is so
good: Fricker, Robert and Roberts, 2012). An LRU cache of C places keeps an item for about the same
time T after each use. Item i, asked for at random at the rate r_i, is there with probability
1 - exp(-r_i T), and T is where these probabilities sum to C.

Erlang C (Erlang, 1917). With c servers and an offered load of a busy servers, a new customer waits
with probability C(c, a), and then for an exponential time with mean service / (c - a). That holds
for exponential service times. For others Allen and Cunneen (1978) correct the mean by (1 + v) / 2,
where v is the squared coefficient of variation of the service time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gateway.advisor.times import Points

HALVINGS = 40
"""Of an interval: it is then known to a millionth of a millionth."""
NOBODY = 1e-12
"""Of all customers: that so few wait is as good as that none does."""
HALVINGS_OF_A_TIME = 24
"""A second is then known to less than a microsecond."""


@dataclass(frozen=True, slots=True)
class Alike:
    """So many more items, each asked for at the same rate. With ever more items and ever smaller
    rates each comes once and never again.
    """

    count: float = 0.0
    rate_per_s: float = 0.0

    @property
    def total_per_s(self) -> float:
        return self.count * self.rate_per_s


def characteristic_time_s(
    rates_per_s: Sequence[float], places: float, more: Alike = Alike()
) -> float:
    """How long an LRU cache of so many places keeps an item after its last use. Infinite if all
    items fit.
    """
    wanted = [rate for rate in rates_per_s if rate > 0]
    if places >= len(wanted) + more.count:
        return math.inf
    if places <= 0:
        return 0.0

    def kept(time_s: float) -> float:
        some = more.count * math.expm1(-more.rate_per_s * time_s)
        return -some - sum(math.expm1(-rate * time_s) for rate in wanted)

    high = 1.0
    while kept(high) < places:
        high *= 2.0
    low = 0.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle) < places else (low, middle)
    return high


def miss_rate(rates_per_s: Sequence[float], places: float, more: Alike = Alike()) -> float:
    """The share of requests whose item is not in an LRU cache of so many places."""
    total = sum(rates_per_s) + more.total_per_s
    time_s = characteristic_time_s(rates_per_s, places, more)
    if not total or math.isinf(time_s):
        return 0.0
    missed = sum(rate * math.exp(-rate * time_s) for rate in rates_per_s)
    return (missed + more.total_per_s * math.exp(-more.rate_per_s * time_s)) / total


def wait_probability(servers: int, offered: float) -> float:
    """Erlang C: the probability that a customer waits. 1 if the servers cannot keep up."""
    if offered <= 0:
        return 0.0
    if servers <= offered:
        return 1.0
    blocked = 1.0  # Erlang B, by its recursion over the number of servers
    for n in range(1, servers + 1):
        blocked = offered * blocked / (n + offered * blocked)
        if blocked < NOBODY:
            return 0.0
    return blocked / (1 - offered / servers * (1 - blocked))


@dataclass(frozen=True, slots=True)
class Wait:
    """A wait in a queue: nobody waits with `1 - probability`, the others wait exponentially long.
    `mean_s` is theirs.
    """

    probability: float = 0.0
    mean_s: float = 0.0

    def longer_than(self, time_s: float) -> float:
        """The share of customers that wait for longer."""
        if time_s < 0:
            return 1.0
        if not self.probability or not self.mean_s:
            return 0.0
        return self.probability * math.exp(-time_s / self.mean_s)


def wait_of(servers: int, offered: float, service_s: float, variation: float) -> Wait | None:
    """The wait of M/G/c: that of M/M/c, as much shorter as service times vary less (Allen and
    Cunneen). `variation` is their squared coefficient of variation. None: the servers cannot keep
    up.
    """
    if offered <= 0:
        return Wait()
    if servers <= offered:
        return None
    mean_s = service_s / (servers - offered) * (1 + variation) / 2
    return Wait(wait_probability(servers, offered), mean_s)


def quantile_s(share: float, times: Points, extra: Points, of_extra: float, wait: Wait) -> float:
    """The time that this share of requests does not exceed: one of `times`, for the share
    `of_extra` one of `extra` on top, and the wait. All are independent.
    """
    both = [(a + b, p * q * of_extra) for a, p in times for b, q in extra] if of_extra else []
    parts = [*((a, p * (1 - of_extra)) for a, p in times), *both]
    low, high = 0.0, max(a for a, _ in parts)
    if wait.probability:
        high += wait.mean_s * math.log(max(1.0, wait.probability / (1 - share)) * 2)
    for _ in range(HALVINGS_OF_A_TIME):
        middle = (low + high) / 2
        longer = sum(p * wait.longer_than(middle - a) for a, p in parts)
        low, high = (middle, high) if longer > 1 - share else (low, middle)
    return high


def least(holds: Callable[[int], bool], most: int) -> int | None:
    """The smallest number from 1 to `most` for which `holds`; it holds for all larger ones too.
    None if it holds for none.
    """
    if not holds(most):
        return None
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
