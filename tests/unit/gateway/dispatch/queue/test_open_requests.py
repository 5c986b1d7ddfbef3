from __future__ import annotations

from gateway.dispatch.queue.open_requests import OpenRequests


def filled(tenant: str, most: int) -> OpenRequests[object]:
    found = OpenRequests[object]()
    while not found.full(tenant, most):
        found.add(object(), tenant)
    return found


def test_one_tenant_does_not_fill_all_places() -> None:
    places = filled("a", 100)
    assert len(places) == 90 and not places.full("b", 100)


def test_the_kept_places_are_for_all_that_hold_less_than_half() -> None:
    places = filled("a", 100)
    for _ in range(10):
        assert not places.full("b", 100)
        places.add(object(), "b")
    assert places.full("b", 100) and places.full("c", 100)


def test_where_nobody_has_a_key_all_places_are_everybodys() -> None:
    assert len(filled("", 100)) == 100


def test_a_place_that_is_given_back_is_free_once() -> None:
    places = OpenRequests[str]()
    places.add("one", "a")
    places.add("two", "a")
    places.discard("one")
    places.discard("one")
    assert [*places] == ["two"] and not places.full("a", 2)
