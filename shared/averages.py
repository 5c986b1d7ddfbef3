"""Pure. Moving averages of what is measured: one place for the rule that the first measurement
counts in full.
"""

from __future__ import annotations


def blend(average: float, newest: float, weight: float) -> float:
    """The average with one more measurement, 0 standing for none so far. An average that began at 0
    would make a worker look slow (or its loads cheap) until a dozen more had come, and one that
    looks slow is not asked again.
    """
    return weight * newest + (1 - weight) * average if average else newest
