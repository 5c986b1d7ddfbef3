"""What `loraplex adapters show` says of an adapter on a worker."""

from __future__ import annotations

from gateway.cli.adapters import _notes


def test_a_pinned_adapter_in_steady_use_is_shown_as_both() -> None:
    assert _notes({"pinned": True, "loading": False, "steady": True}) == "pinned, steady"


def test_a_gateway_of_before_that_knows_no_steady_use_is_read_all_the_same() -> None:
    assert _notes({"pinned": False, "loading": True}) == "loading"
