"""Pure. Every policy by its name, and the simple ones: what people use today, to compare with and
to fall back on.

    policy = make_policy("expected-ttft")          # names: POLICIES; in the config:
    gateway.routing_policy

A policy keeps state: one per gateway, never shared.
"""

from __future__ import annotations

from collections.abc import Callable

from gateway.routing.baselines import Blind, ResidencyP2C, RoundRobin, two_choices
from gateway.routing.expected_ttft import ExpectedTTFT
from gateway.routing.policy import Policy
from gateway.routing.ray import Ray, RayStrict

POLICIES: dict[str, Callable[[], Policy]] = {
    "round-robin": RoundRobin,
    "random": lambda: Blind("random", lambda able, rng: rng.choice(able)),
    "least-loaded": lambda: Blind(
        "least-loaded", lambda able, rng: min(able, key=lambda w: (w.load, rng.random()))
    ),
    "p2c": lambda: Blind("p2c", two_choices),
    "residency-p2c": ResidencyP2C,
    "ray-strict": RayStrict,
    "ray": Ray,
    "expected-ttft": ExpectedTTFT,
}
DEFAULT = "expected-ttft"


def make_policy(name: str = DEFAULT) -> Policy:
    """A new policy. Raises KeyError for a name that is not in POLICIES."""
    return POLICIES[name]()
