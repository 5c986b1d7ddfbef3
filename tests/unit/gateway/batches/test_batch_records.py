"""Lists of files and batches, page by page."""

from __future__ import annotations

import pytest

from gateway.batches.records import shown_list

ITEMS = [{"id": name, "created_at": at} for at, name in enumerate("abcd")]


def ids(after: str | None = None, limit: int = 10, newest_first: bool = True) -> str:
    return "".join(x["id"] for x in shown_list(ITEMS, after, limit, newest_first)["data"])


@pytest.mark.parametrize("after", [None, ""])
def test_a_list_begins_with_the_newest_unless_the_oldest_is_asked_for(after: str | None) -> None:
    assert (ids(after), ids(after, newest_first=False)) == ("dcba", "abcd")


def test_a_page_begins_after_the_item_that_is_named_in_either_order() -> None:
    assert (ids("c", 1), ids("c", 1, newest_first=False)) == ("b", "d")
