"""Pure. What a load is: when requests arrive, which adapter each one asks for, how long prompts and
answers are, and the words of the prompts.

Everything comes from one seed. Each concern draws from a `random.Random` of its own. So a change of
one (the Zipf exponent, for example) leaves the others (the arrival times) as they were. Two runs
that differ in one flag differ in that one thing.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias, assert_never

# Short, common English words: one token each (with the leading space) in the usual byte-pair
# vocabularies, so that "128 tokens" is close to 128.
_COMMON_WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this "
    "have from or had an they which one you were all "
    "her she there would their we him been has when who will no more if out so up said "
    "what its about than into them can only other "
    "time new some could these two may first then do any like my now over such our man "
    "me even most made after also did many off "
    "before must well back through years where much your way down should because long "
    "each just state those people too little good "
    "world make very year still see work life day get here both between never house "
    "under same right last think own while home great "
    "men small part found place high old water sea tree light green blue river road "
    "town city train table chair paper word story "
    "song voice music game team ball fish bird horse dog cat rain snow wind fire stone gold"
)
WORDS = tuple(_COMMON_WORDS.split())
_WORD_OF_BYTE = tuple(WORDS[byte % len(WORDS)] for byte in range(256))
"""Prompts are made while the load runs: a table by random byte costs a fifth of `random.choices`,
and that some words are twice as likely as others matters to nobody.
"""

MAX_SAMPLED_TOKENS = 1 << 20
"""Cap of a log-normal draw that names no cap of its own: no model reads more."""


@dataclass(frozen=True, slots=True)
class Poisson:
    """Independent users: exponential gaps."""

    rate_per_s: float


@dataclass(frozen=True, slots=True)
class Gamma:
    """Gamma-distributed gaps; `cv` is their coefficient of variation: 1 is Poisson, above is
    burstier, below is more regular.
    """

    rate_per_s: float
    cv: float


@dataclass(frozen=True, slots=True)
class Constant:
    rate_per_s: float


@dataclass(frozen=True, slots=True)
class Bursts:
    """`burst_requests` at the same instant, evenly spaced so that the mean rate is `rate_per_s`."""

    rate_per_s: float
    burst_requests: int


@dataclass(frozen=True, slots=True)
class AtOnce:
    """Everything at time zero."""


@dataclass(frozen=True, slots=True)
class FlashCrowd:
    """A Poisson process that goes from `rate_per_s` (0 is none) to `peak_per_s` within `ramp_s`
    from `at_s` on, stays there for `hold_s` and goes back as fast. The only arrivals that end: a
    crowd that came out of nothing leaves nothing behind.
    """

    rate_per_s: float
    peak_per_s: float
    at_s: float
    ramp_s: float = 1.0
    hold_s: float = math.inf


ArrivalProcess: TypeAlias = Poisson | Gamma | Constant | Bursts | AtOnce | FlashCrowd


@dataclass(frozen=True, slots=True)
class BaseOnly:
    """No adapter at all."""


@dataclass(frozen=True, slots=True)
class Distinct:
    """Each request asks for another adapter than the one before, in turn: the worst case for a
    cache smaller than the number of adapters.
    """


@dataclass(frozen=True, slots=True)
class Uniform:
    pass


@dataclass(frozen=True, slots=True)
class Zipf:
    """Adapter k (from 1) is asked for in proportion to k ** -alpha, so the first adapter is the
    hottest.
    """

    alpha: float


@dataclass(frozen=True, slots=True)
class Identical:
    """Every request asks for the first adapter."""


Mix: TypeAlias = BaseOnly | Distinct | Uniform | Zipf | Identical


@dataclass(frozen=True, slots=True)
class Fixed:
    tokens: int


@dataclass(frozen=True, slots=True)
class UniformLength:
    least_tokens: int
    most_tokens: int


@dataclass(frozen=True, slots=True)
class LogNormal:
    """`sigma` is the standard deviation of the logarithm; draws are cut off at `most_tokens`."""

    median_tokens: float
    sigma: float
    most_tokens: int = MAX_SAMPLED_TOKENS


Length: TypeAlias = Fixed | UniformLength | LogNormal


@dataclass(frozen=True, slots=True)
class Workload:
    """`prefixes` shared prefixes of `prefix_tokens` words each stand before the prompt's own words,
    one drawn per request (0: none).
    """

    arrival: ArrivalProcess
    mix: Mix
    adapters: int
    prompt: Length
    output: Length
    seed: int
    base_share: float = 0.0
    prefixes: int = 0
    prefix_tokens: int = 0


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """`adapter` is an index from 0, None for the base model; `prompt_tokens` leaves the shared
    prefix out.
    """

    index: int
    at_s: float
    adapter: int | None
    prefix: int | None
    prompt_tokens: int
    output_tokens: int


def requests(workload: Workload) -> Iterator[PlannedRequest]:
    """The load's requests in order of arrival, without end: the caller cuts by number or by `at_s`.

    Raises: ValueError if the workload makes no sense (no adapters for a mix that needs them, a rate
    of 0).
    """
    arrivals = arrival_times_s(workload.arrival, _rng(workload, "arrivals"))
    adapters = adapter_indices(workload.mix, workload.adapters, _rng(workload, "adapters"))
    base, prefixes, prompts, outputs = (
        _rng(workload, concern) for concern in ("base", "prefixes", "prompts", "outputs")
    )
    for index, (at_s, adapter) in enumerate(zip(arrivals, adapters, strict=False)):
        yield PlannedRequest(
            index=index,
            at_s=at_s,
            adapter=None if base.random() < workload.base_share else adapter,
            prefix=prefixes.randrange(workload.prefixes) if workload.prefixes else None,
            prompt_tokens=draw_tokens(workload.prompt, prompts),
            output_tokens=draw_tokens(workload.output, outputs),
        )


def _rng(workload: Workload, concern: str) -> random.Random:
    return random.Random(f"{workload.seed}/{concern}")


def arrival_times_s(arrival: ArrivalProcess, rng: random.Random) -> Iterator[float]:
    """Seconds since the start of the load, never falling, without end (but for a FlashCrowd out of
    nothing).

    Raises: ValueError for a rate, cv, burst or time that makes no sense.
    """
    match arrival:
        case AtOnce():
            while True:
                yield 0.0
        case Bursts(rate_per_s, burst_requests):
            _above_zero("rate", rate_per_s)
            _above_zero("burst size", burst_requests)
            for request in _naturals():
                yield (request // burst_requests) * burst_requests / rate_per_s
        case Constant(rate_per_s):
            _above_zero("rate", rate_per_s)
            for request in _naturals():
                yield request / rate_per_s
        case Poisson(rate_per_s):
            yield from arrival_times_s(Gamma(rate_per_s, cv=1.0), rng)
        case Gamma(rate_per_s, cv):
            _above_zero("rate", rate_per_s)
            _above_zero("cv", cv)
            shape = 1.0 / (cv * cv)
            at_s = 0.0
            while True:
                at_s += rng.gammavariate(shape, 1.0 / (shape * rate_per_s))
                yield at_s
        case FlashCrowd():
            yield from _flash_crowd_s(arrival, rng)
        case _:
            assert_never(arrival)


def _flash_crowd_s(arrival: FlashCrowd, rng: random.Random) -> Iterator[float]:
    base_per_s, peak_per_s, ramp_s = arrival.rate_per_s, arrival.peak_per_s, arrival.ramp_s
    _above_zero("peak rate", peak_per_s)
    _above_zero("ramp", ramp_s)
    if not 0 <= base_per_s <= peak_per_s or arrival.at_s < 0 or not arrival.hold_s >= 0:
        raise ValueError(
            "a flash crowd goes up from a rate of 0 or more, at a time of 0 or more, "
            "and holds for 0 seconds or more"
        )
    over_s = arrival.at_s + arrival.hold_s + 2 * ramp_s
    for at_s in arrival_times_s(Poisson(peak_per_s), rng):
        if at_s >= over_s and base_per_s == 0:
            return
        up, down = (at_s - arrival.at_s) / ramp_s, (over_s - at_s) / ramp_s
        crowd = max(0.0, min(1.0, up, down))
        if rng.random() * peak_per_s < base_per_s + crowd * (peak_per_s - base_per_s):
            yield at_s


def _naturals() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1


def _above_zero(what: str, number: float) -> None:
    if not number > 0 or math.isinf(number):
        raise ValueError(f"the {what} must be above 0, not {number}")


def adapter_indices(mix: Mix, adapters: int, rng: random.Random) -> Iterator[int | None]:
    """Which adapter each request asks for, without end. Raises: ValueError if the mix needs
    adapters and there are none.
    """
    if adapters < 1 and not isinstance(mix, BaseOnly):
        raise ValueError(f"the mix {type(mix).__name__.lower()} needs at least one adapter")
    match mix:
        case BaseOnly():
            while True:
                yield None
        case Identical():
            while True:
                yield 0
        case Distinct():
            for request in _naturals():
                yield request % adapters
        case Uniform():
            while True:
                yield rng.randrange(adapters)
        case Zipf(alpha):
            up_to = list(accumulate(rank**-alpha for rank in range(1, adapters + 1)))
            while True:
                yield min(bisect_left(up_to, rng.random() * up_to[-1]), adapters - 1)
        case _:
            assert_never(mix)


def draw_tokens(length: Length, rng: random.Random) -> int:
    """One length in tokens, at least 1."""
    match length:
        case Fixed(tokens):
            return tokens
        case UniformLength(least_tokens, most_tokens):
            return rng.randint(least_tokens, most_tokens)
        case LogNormal(median_tokens, sigma, most_tokens):
            return max(
                1, min(most_tokens, round(rng.lognormvariate(math.log(median_tokens), sigma)))
            )
        case _:
            assert_never(length)


def parse_length(text: str) -> Length:
    """Reads `128`, `uniform:16:256` or `lognormal:MEDIAN:SIGMA[:MOST]`. Raises: ValueError with
    what is wrong.
    """
    match text.split(":"):
        case [tokens]:
            return Fixed(_tokens(tokens))
        case ["fixed", tokens]:
            return Fixed(_tokens(tokens))
        case ["uniform", least, most]:
            if _tokens(least) > _tokens(most):
                raise ValueError(f"{text!r}: the least is above the most")
            return UniformLength(_tokens(least), _tokens(most))
        case ["lognormal", median, sigma, *most] if len(most) < 2:
            if not float(sigma) >= 0:
                raise ValueError(f"{text!r}: sigma is below 0")
            return LogNormal(
                _tokens(median), float(sigma), _tokens(most[0]) if most else MAX_SAMPLED_TOKENS
            )
    raise ValueError(
        f"{text!r} is no length: give 128, uniform:16:256 or lognormal:MEDIAN:SIGMA[:MOST]"
    )


def _tokens(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ValueError(f"{text!r} is no number of tokens (a whole number from 1)")
    return int(text)


def prompt_text(workload: Workload, request: PlannedRequest) -> str:
    """The words of a request's prompt: the same for the same seed and index, and a shared prefix
    first if the workload has any.
    """
    own = _words(f"{workload.seed}/prompt/{request.index}", request.prompt_tokens)
    if request.prefix is None or workload.prefix_tokens < 1:
        return own
    return f"{_words(f'{workload.seed}/prefix/{request.prefix}', workload.prefix_tokens)} {own}"


def _words(seed: str, count: int) -> str:
    return " ".join([_WORD_OF_BYTE[byte] for byte in random.Random(seed).randbytes(count)])
