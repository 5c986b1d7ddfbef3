"""Pure. Token buckets of an account's limits, and what OpenAI's headers say of them.

A bucket holds as much as is allowed in a minute and fills evenly. So a client may use its minute at
once, and is then let in as the bucket fills.
"""

from __future__ import annotations

import math

MINUTE_S = 60.0


def filled(level: float, per_minute: int, since_s: float) -> float:
    return min(float(per_minute), level + per_minute / MINUTE_S * max(0.0, since_s))


def wait_s(level: float, needed: float, per_minute: int) -> float:
    """Until the bucket holds so much (at most: until it is full)."""
    return max(0.0, min(needed, per_minute) - level) * MINUTE_S / per_minute


def rate_headers(what: str, level: float, per_minute: int) -> dict[str, str]:
    """`what`: requests or tokens."""
    return {
        f"x-ratelimit-limit-{what}": str(per_minute),
        f"x-ratelimit-remaining-{what}": str(max(0, math.floor(level))),
        f"x-ratelimit-reset-{what}": duration(wait_s(level, per_minute, per_minute)),
    }


def duration(seconds: float) -> str:
    """As OpenAI writes it: 120ms, 6s, 1m30s."""
    if seconds < 1.0:
        return f"{math.ceil(seconds * 1e3)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
