"""Pure. Moving averages of measurements. The one rule here: the first measurement counts
in full.
"""

from __future__ import annotations


def blend(average: float, newest: float, weight: float) -> float:
    """The average with one more measurement. `average` is 0 if there was none so far.

    An average that began at 0 would stay too low until a dozen measurements had come. A worker
    would look slow, or its loads cheap, and a worker that looks slow is not asked again.
    """
    return weight * newest + (1 - weight) * average if average else newest
