"""Settings of the whole folder: pure cores, and shells tested at their seams. No test opens a
socket or sleeps, and the whole folder takes seconds.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# Derandomised, so a red run is red again. No deadline per example, because machines with shared
# cores are slow at times.
settings.register_profile(
    "unit", max_examples=60, stateful_step_count=30, deadline=None, derandomize=True, database=None
)
# For a night: `pytest tests/unit --hypothesis-profile=soak -n 0`.
settings.register_profile(
    "soak",
    max_examples=3000,
    stateful_step_count=80,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("unit")
