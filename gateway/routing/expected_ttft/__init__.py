"""Pure. The default policy: policy.py chooses, price.py says what a choice costs in seconds.
docs/ROUTING.md explains both.
"""

from gateway.routing.expected_ttft.policy import ExpectedTTFT

__all__ = ["ExpectedTTFT"]
