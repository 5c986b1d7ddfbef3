from __future__ import annotations

from shared.held_bytes import HeldBytes


def test_a_tenant_that_holds_half_leaves_the_last_tenth_to_others() -> None:
    held = HeldBytes()
    held.add("a", 60)
    assert held.beyond("a", 100, 31) and not held.beyond("a", 100, 30)
    assert held.beyond("b", 100, 41) and not held.beyond("b", 100, 40)
    held.add("a", -60)
    assert held.total == 0 and not held.beyond("a", 100, 90)


def test_where_nobody_has_a_key_all_bytes_are_everybodys() -> None:
    held = HeldBytes()
    held.add("", 99)
    assert not held.beyond("", 100, 1) and held.beyond("", 100, 2)
