"""Pure. What a model's traffic needs: slots, adapters in host memory, workers and pins for a wanted
share of misses and a wanted time to the first token.

Slots are servers too: an adapter holds one as long as a request for it runs. With requests at the
rate r that hold a place for s seconds, an adapter is in flight with probability 1 - exp(-r s). The
sum over all adapters is the offered load of Erlang C for slots. How far this is from the simulator
is in docs/SCALING.md (`python -m bench.advise`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import msgspec

from gateway.advisor import closed_forms
from gateway.advisor.traffic import Traffic
from gateway.advisor.unseen import unseen

TAIL = 0.99
"""The quantile of the times that are advised on."""
MAX_PINNED_SHARE = 0.5
"""Of the slots: the rest must follow what is asked for now."""
WORTH_PINNING = 0.005
"""Of all requests: fewer misses saved are not worth a pin, which somebody must remember."""
MOST_OF_THE_GAIN = 0.9
USUAL_LOAD_S = 0.1
"""For a load, where none has been seen yet."""
MAX_WORKERS = 4096


class FleetSize(msgspec.Struct, frozen=True):
    """What serves now. `capacity` are requests that one worker runs at once. `load_s` is what the
    load of an adapter takes once a slot is free, as the workers measure it (0: nobody said).
    """

    workers: int
    slots: int
    capacity: int
    load_s: float = 0.0

    @property
    def all_slots(self) -> int:
        return self.workers * self.slots

    def times(self, workers: int) -> FleetSize:
        return msgspec.structs.replace(self, workers=workers)


class Goal(msgspec.Struct, frozen=True):
    """`miss_rate`: the share of requests that may find their adapter in no slot. `ttft_p99_s`: the
    time to the first token that 99 % of requests keep to (None: none is wanted).
    """

    miss_rate: float = 0.05
    ttft_p99_s: float | None = None


class Expectation(msgspec.Struct, frozen=True):
    """What the closed forms expect of a fleet. None: it cannot keep up, and waits grow for ever."""

    miss_rate: float
    slot_wait_probability: float
    ttft_p99_s: float | None


class Advice(msgspec.Struct, frozen=True, kw_only=True):
    """For one base model. `slots` are those of all workers together; `host_adapters` are adapters
    in host memory beside the slots there are; `in_flight` is the mean number of adapters in flight.
    None: no number of them reaches the goal.
    """

    requests: int
    span_s: float
    adapters: int
    in_flight: float
    fleet: FleetSize
    now: Expectation | None
    slots: int | None
    host_adapters: int
    workers: int | None
    then: Expectation | None
    pins: tuple[str, ...]
    oversubscribed: bool
    words: tuple[str, ...]


class _Demand:
    """A model's traffic as rates and times, as the fleet `seen` served it."""

    def __init__(self, traffic: Traffic, seen: FleetSize) -> None:
        span_s = max(traffic.span_s, 1e-9)
        counted = sorted(traffic.counts.items(), key=lambda item: (-item[1], item[0]))
        self.names = [name for name, _ in counted]
        new = unseen(traffic.counts.values())
        self.rates = [(count - new.discount) / span_s for _, count in counted]
        self.unseen = closed_forms.Alike(
            new.adapters, new.requests / span_s / new.adapters if new.adapters else 0.0
        )
        self.total_per_s = traffic.requests / span_s
        self.held_s = traffic.held.mean_s()
        self.variation = traffic.held.variation
        self.warm = traffic.warm.points()
        self.in_flight = -sum(math.expm1(-rate * self.held_s) for rate in self.rates)
        self.in_flight -= new.adapters * math.expm1(-self.unseen.rate_per_s * self.held_s)
        self.loads = traffic.loads.points(USUAL_LOAD_S)
        pressed = closed_forms.wait_probability(seen.all_slots, self.in_flight) > 1 - TAIL
        if pressed and seen.workers and seen.load_s:
            # what was seen is mostly the wait for a slot, which another fleet would not have
            self.loads = [(seen.load_s, 1.0)]

    def copies(self, capacity: int) -> int:
        """Slots that adapters take beyond one each, because one worker is too small for them."""
        return sum(
            max(0, math.ceil(rate * self.held_s / max(1, capacity)) - 1) for rate in self.rates
        )

    def expect(self, fleet: FleetSize) -> Expectation:
        slots = max(0, fleet.all_slots - self.copies(fleet.capacity))
        misses = self._misses(slots)
        slot_wait = closed_forms.wait_of(slots, self.in_flight, self.held_s, self.variation)
        places, busy = fleet.workers * fleet.capacity, self.total_per_s * self.held_s
        place_wait = closed_forms.wait_of(places, busy, self.held_s, self.variation)
        ttft_s = None
        if slot_wait is not None and place_wait is not None:
            wait = max(slot_wait, place_wait, key=lambda w: w.probability * w.mean_s)
            ttft_s = closed_forms.quantile_s(TAIL, self.warm, self.loads, misses, wait)
        return Expectation(misses, closed_forms.wait_probability(slots, self.in_flight), ttft_s)

    def _misses(self, slots: int, pinned: int = 0) -> float:
        """Of all requests, with so many of the hottest adapters pinned. Requests for the base model
        never miss, and neither do those for a pinned adapter.
        """
        if not self.total_per_s:
            return 0.0
        rest = self.rates[pinned:]
        share = (sum(rest) + self.unseen.total_per_s) / self.total_per_s
        return closed_forms.miss_rate(rest, slots - pinned, self.unseen) * share

    def slots_for(self, miss_rate: float) -> int | None:
        most = max(1, len(self.rates) + math.ceil(self.unseen.count))
        return closed_forms.least(lambda slots: self._misses(slots) <= miss_rate, most)

    def pins(self, slots: int) -> tuple[str, ...]:
        """The smallest set of the hottest adapters that gives most of what pinning can give."""
        limit = min(int(slots * MAX_PINNED_SHARE), len(self.names))
        if slots >= len(self.rates) or limit < 1:
            return ()  # all fit, or there is no room
        tried = sorted({0, *(limit * n // 16 for n in range(1, 17)), limit})
        missing = {n: self._misses(slots, n) for n in tried}
        gain = missing[0] - min(missing.values())
        if gain < WORTH_PINNING:
            return ()
        enough = (n for n in tried if missing[0] - missing[n] >= MOST_OF_THE_GAIN * gain)
        return tuple(self.names[: next(enough)])


def expect(traffic: Traffic, seen: FleetSize, fleet: FleetSize) -> Expectation:
    """What a fleet would do with the traffic that another one has served."""
    return _Demand(traffic, seen).expect(fleet)


def load_s_of(traffic: Traffic, fleet: FleetSize) -> float:
    """What a load takes on average once a slot is free."""
    return sum(seconds * share for seconds, share in _Demand(traffic, fleet).loads)


def advise(traffic: Traffic, fleet: FleetSize, goal: Goal) -> Advice:
    """What this traffic needs, seen from this fleet (of one worker's size, if none serves)."""
    demand = _Demand(traffic, fleet)
    slots = demand.slots_for(goal.miss_rate) if demand.rates else 0
    one = fleet.times(1)

    def enough(workers: int) -> bool:
        expected = demand.expect(one.times(workers))
        ttft_s = math.inf if expected.ttft_p99_s is None else expected.ttft_p99_s
        wanted_s = sys.float_info.max if goal.ttft_p99_s is None else goal.ttft_p99_s
        return ttft_s <= wanted_s and expected.miss_rate <= goal.miss_rate

    workers = closed_forms.least(enough, MAX_WORKERS) if traffic.requests else None
    advice = Advice(
        requests=traffic.requests,
        span_s=traffic.span_s,
        adapters=len(demand.rates),
        in_flight=demand.in_flight,
        fleet=fleet,
        now=demand.expect(fleet) if fleet.workers and traffic.requests else None,
        slots=slots,
        host_adapters=max(0, (slots or 0) - fleet.all_slots),
        workers=workers,
        then=None if workers is None else demand.expect(one.times(workers)),
        pins=demand.pins(fleet.all_slots),
        oversubscribed=bool(fleet.workers) and demand.in_flight > fleet.all_slots,
        words=(),
    )
    words = [*_words(advice, goal)]
    if traffic.requests and not traffic.warm.count:
        words.append(
            "No streamed answer with its adapter in a slot has been seen: times to the first token "
            "here are waits alone."
        )
    return msgspec.structs.replace(advice, words=tuple(words))


def _words(advice: Advice, goal: Goal) -> Sequence[str]:
    """For operators, the most important first."""
    fleet, now = advice.fleet, advice.now
    if not advice.requests:
        return ["No requests have been seen yet."]
    reasons = []
    if advice.oversubscribed:
        reasons.append(
            f"Oversubscribed: {advice.in_flight:.1f} adapters are in flight on average, and there "
            f"are {fleet.all_slots} slots. Requests wait for slots; this is where long times to "
            "the first token come from."
        )
    if now is not None:
        reasons.append(
            f"With {fleet.workers} worker(s) of {fleet.slots} slots, {now.miss_rate:.1%} of "
            "requests find their adapter in no slot, and "
            f"{now.slot_wait_probability:.1%} wait for one."
        )
    if advice.workers is None:
        reasons.append(
            f"No number of workers reaches the goal: {goal.miss_rate:.1%} misses"
            + ("" if goal.ttft_p99_s is None else f", {goal.ttft_p99_s:g} s to the first token")
            + "."
        )
    else:
        reasons.append(
            f"At most {goal.miss_rate:.1%} misses take {advice.slots} slots in all: "
            f"{advice.workers} worker(s) of {fleet.slots}."
        )
    if advice.host_adapters:
        reasons.append(
            f"Room for {advice.host_adapters} more adapters in host memory (max_cpu_loras, over "
            "all workers) would keep most misses off the disk."
        )
    if advice.pins:
        reasons.append(
            f"Worth pinning: {', '.join(advice.pins[:10])}"
            + (f" and {len(advice.pins) - 10} more." if len(advice.pins) > 10 else ".")
        )
    return reasons


class Oversubscription:
    """Notices that more adapters are in flight or waited for than there are slots, for so long that
    it is no burst.
    """

    LASTS_S = 30.0
    AGAIN_S = 600.0

    def __init__(self) -> None:
        self._since: float | None = None
        self._warned_at = -math.inf

    def look(self, adapters: int, slots: int, now: float) -> bool:
        """Whether it is time to say so."""
        if not slots or adapters <= slots:
            self._since = None
            return False
        self._since = now if self._since is None else self._since
        if now - self._since < self.LASTS_S or now - self._warned_at < self.AGAIN_S:
            return False
        self._warned_at = now
        return True
