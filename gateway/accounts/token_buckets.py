"""Pure. The token buckets behind an account's limits, and OpenAI's rate-limit headers.

A bucket holds as much as is allowed in one minute, and fills at a constant rate. So a client may
use a whole minute's worth at once; after that it is let in at the rate at which the bucket fills.

All that is kept of a bucket is in how many seconds it will be full. Time takes seconds away, and
what is taken adds as many as it needs to flow in again. There is room for up to a minute of them.
"""

from __future__ import annotations

from math import ceil, inf

MINUTE_S = 60.0
ROUNDING_S = 1e-6
"""More than the errors of such sums come to."""
FULL_S = MINUTE_S + ROUNDING_S
"""A bucket that is full later than this would be below empty."""


def each_s(per_minute: int | None) -> float:
    """The seconds in which one flows in. 0.0: there is no limit. Infinity: none ever does."""
    if per_minute is None:
        return 0.0
    return MINUTE_S / per_minute if per_minute else inf


def level(until_full_s: float, per_minute: int) -> float:
    """What is in a bucket. 0.0 if it is below empty."""
    return min(max(0.0, (FULL_S - until_full_s) * per_minute / MINUTE_S), per_minute)


def rate_lines(what: str, per_minute: int | None) -> bytes:
    """Header lines of `what` (requests or tokens), to be filled with what is left of them, and with
    the time until the bucket is full. None if there is no limit.
    """
    if per_minute is None:
        return b""
    name = f"x-ratelimit-%s-{what}: "
    lines = f"{name % 'limit'}{per_minute}\r\n{name % 'remaining'}%d\r\n{name % 'reset'}%b\r\n"
    return lines.encode()


MS_PER_S = 1000
_BELOW_A_SECOND = (*(b"%dms" % ms for ms in range(MS_PER_S)), b"1s")
_ROUNDING_MS = ROUNDING_S * MS_PER_S


def duration(seconds: float) -> bytes:
    """The time in OpenAI's form: 120ms, 6s, 1m30s. It is not negative."""
    if seconds < 1.0:
        return _BELOW_A_SECOND[ceil(seconds * MS_PER_S - _ROUNDING_MS)]
    minutes, rest = divmod(ceil(seconds - ROUNDING_S), 60)
    return b"%dm%ds" % (minutes, rest) if minutes else b"%ds" % rest
