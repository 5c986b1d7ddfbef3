"""Pure. The rows of the page at /ui."""

from __future__ import annotations

from gateway.admin.live_feed_views import held
from shared.link.messages import AdapterState, Tier


def test_the_version_in_the_better_tier_is_the_last_of_its_name() -> None:
    old = AdapterState("a", "old", Tier.GPU, in_flight=2)
    new = AdapterState("a", "new", Tier.REMOTE, True)
    for states in ((old, new), (new, old)):
        assert [(tier, in_flight) for _, tier, _, _, in_flight, _ in held(states)] == [
            ("remote", 0),
            ("gpu", 2),
        ]
