"""Pure. Numbers in the options of commands, each as the `type` of an argparse option. What is no
such number is told in one sentence.
"""

from __future__ import annotations

import argparse
import math


def number(text: str) -> float:
    given = _number(text)
    if not math.isfinite(given):
        raise argparse.ArgumentTypeError(f"a number is needed, got {text}")
    return given


def positive(text: str) -> float:
    given = _number(text)
    if not 0 < given < math.inf:
        raise argparse.ArgumentTypeError(f"a number above 0 is needed, got {text}")
    return given


def seconds(text: str) -> float:
    """A time above 0."""
    given = _number(text)
    if not 0 < given < math.inf:
        raise argparse.ArgumentTypeError(f"a time of more than 0 seconds is needed, got {text}")
    return given


def seconds_or_none(text: str) -> float:
    """A time of 0 or more."""
    given = _number(text)
    if not 0 <= given < math.inf:
        raise argparse.ArgumentTypeError(f"a time of 0 seconds or more is needed, got {text}")
    return given


def share(text: str) -> float:
    given = _number(text)
    if not 0 <= given <= 1:
        raise argparse.ArgumentTypeError(f"a share between 0 and 1 is needed, got {text}")
    return given


def some_share(text: str) -> float:
    """A share above 0."""
    given = share(text)
    if not given:
        raise argparse.ArgumentTypeError(f"a share above 0 is needed, got {text}")
    return given


def count(text: str) -> int:
    """A whole number from 1 on."""
    return _whole(text, 1)


def natural(text: str) -> int:
    """A whole number from 0 on."""
    return _whole(text, 0)


def port(text: str) -> int:
    """A TCP port. The event loop would take a larger one for its last 16 bits."""
    given = count(text)
    if given > 65535:
        raise argparse.ArgumentTypeError(f"a port from 1 to 65535 is needed, got {text}")
    return given


def _whole(text: str, least: int) -> int:
    try:
        given = int(text)
    except ValueError:
        given = least - 1
    if given < least:
        raise argparse.ArgumentTypeError(
            f"a whole number of at least {least} is needed, got {text}"
        )
    return given


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a number is needed, got {text}") from None
