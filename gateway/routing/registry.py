"""Pure. The policies that users choose between, by name.

    policy = make_policy("expected-ttft")

The name is one of POLICIES, in the config `gateway.routing_policy`.

A policy keeps state: one per gateway, never shared. Policies that are there to compare with are in
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
