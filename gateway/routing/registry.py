"""Pure. The policies that users can choose, by name.

    policy = make_policy("expected-ttft")

The name is the value of `gateway.routing_policy` and one of POLICIES.

A policy keeps state, so each gateway has its own. Policies that exist only for comparison are in
bench/routing/policies.py.
"""

from __future__ import annotations

from collections.abc import Callable

from gateway.routing.expected_ttft import ExpectedTTFT
from gateway.routing.policy import Policy
from gateway.routing.ray import Ray
from gateway.routing.residency_p2c import ResidencyP2C

POLICIES: dict[str, Callable[[], Policy]] = {
    "expected-ttft": ExpectedTTFT,
    "ray": Ray,
    "residency-p2c": ResidencyP2C,
}
DEFAULT = "expected-ttft"


def make_policy(name: str = DEFAULT) -> Policy:
    """A new policy. Raises KeyError for a name that is not in POLICIES."""
    return POLICIES[name]()
