"""Settings of the whole folder: pure cores and shells on their seams, no socket, no sleep, all of
it in seconds.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# Derandomised, so that a red run is red again; machines that share their cores are slow at times,
# so no deadline per example.
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
