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


def test_one_tenants_bodies_leave_room_for_those_of_others() -> None:
    places = OpenRequests[str]()
    places.add("large", "a", 60)
    assert places.too_large("a", 31, 100) and not places.too_large("a", 30, 100)
    assert places.too_large("b", 41, 100) and not places.too_large("b", 40, 100)


def test_the_bytes_of_a_request_that_has_ended_are_free() -> None:
    places = OpenRequests[str]()
    places.add("large", "", 100)
    assert places.too_large("", 1, 100)
    places.discard("large")
    places.discard("large")
    assert not places.too_large("", 100, 100)
