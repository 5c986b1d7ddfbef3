"""Pure. The numbers that options of the command take. What is none is told in words."""

from __future__ import annotations

import argparse
import math


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
    if not 0 < given <= 1:
        raise argparse.ArgumentTypeError(f"a share between 0 and 1 is needed, got {text}")
    return given


def count(text: str) -> int:
    """A whole number from 1 on."""
    given = _number(text)
    if not 1 <= given < math.inf or not given.is_integer():
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 is needed, got {text}")
    return int(given)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a number is needed, got {text}") from None
