"""Aliases: which adapter a user gets, and how shares are kept."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.adapters.aliases import (
    Alias,
    AliasShare,
    AliasState,
    RollbackRecord,
    from_config,
    in_force,
    pick,
    with_alias,
    with_rollback,
    without_alias,
)
from shared.config.aliases import AliasConfig, RollbackConfig, plain_alias
from shared.config.llm_sections import LoraConfig
from shared.config.section import read_section
from shared.errors import ConfigError

USERS = [hashlib.sha256(str(i).encode()).digest() for i in range(4000)]
SHARES = st.lists(
    st.builds(AliasShare, st.sampled_from(["v1", "v2", "v3", "v4", "v5"]), st.floats(0.1, 100)),
    min_size=1,
    max_size=5,
    unique_by=lambda s: s.adapter,
).map(tuple)
TRIP = RollbackRecord("too many errors", 1.0)


def shares(**weights: float) -> tuple[AliasShare, ...]:
    return tuple(AliasShare(adapter, weight) for adapter, weight in weights.items())


def who(alias: str, parts: tuple[AliasShare, ...]) -> dict[bytes, str]:
    return {user: pick(alias, parts, user).adapter for user in USERS}


def moved(before: dict[bytes, str], after: dict[bytes, str]) -> Counter[tuple[str, str]]:
    return Counter((before[u], after[u]) for u in USERS if before[u] != after[u])


# ---- whose share ---------------------------------------------------------------------------------


@given(parts=SHARES, user=st.binary(max_size=40))
def test_a_user_stays_with_one_share_in_whatever_order_they_stand_and_however_weights_are_scaled(
    parts: tuple[AliasShare, ...], user: bytes
) -> None:
    chosen = pick("prod", parts, user).adapter
    assert pick("prod", parts[::-1], user).adapter == chosen
    assert (
        pick("prod", tuple(AliasShare(s.adapter, s.weight * 8) for s in parts), user).adapter
        == chosen
    )


def test_users_are_shared_out_by_weight() -> None:
    counts = Counter(who("prod", shares(v7=70, v8=20, v9=10)).values())
    for adapter, share in (("v7", 0.7), ("v8", 0.2), ("v9", 0.1)):
        assert counts[adapter] / len(USERS) == pytest.approx(share, abs=0.03)


def test_a_canary_that_grows_only_wins_users_and_as_few_as_it_must() -> None:
    before, after = who("prod", shares(v7=90, v8=10)), who("prod", shares(v7=70, v8=30))
    found = moved(before, after)
    assert set(found) == {("v7", "v8")}
    assert found["v7", "v8"] / len(USERS) == pytest.approx(0.2, abs=0.03)


def test_a_share_that_is_rolled_back_moves_its_own_users_and_nobody_else() -> None:
    before, after = who("prod", shares(v7=50, v8=30, v9=20)), who("prod", shares(v7=50, v9=20))
    assert {old for old, _ in moved(before, after)} == {"v8"}


@given(parts=SHARES.filter(lambda p: len(p) > 1), factor=st.floats(1.1, 10))
def test_a_weight_that_grows_moves_users_only_to_it(
    parts: tuple[AliasShare, ...], factor: float
) -> None:
    grown = (AliasShare(parts[0].adapter, parts[0].weight * factor), *parts[1:])
    for user in USERS[:200]:
        before, after = pick("prod", parts, user), pick("prod", grown, user)
        assert after.adapter in (before.adapter, grown[0].adapter)


def test_two_aliases_share_their_users_out_independently() -> None:
    one, two = who("one", shares(v7=50, v8=50)), who("two", shares(v7=50, v8=50))
    assert sum(one[u] == two[u] for u in USERS) / len(USERS) == pytest.approx(0.5, abs=0.03)


# ---- what is in force ----------------------------------------------------------------------------

CONFIG = {"prod": Alias(shares(v7=90, v8=10), RollbackConfig())}


def force(state: AliasState) -> dict[str, tuple[str, list[str]]]:
    return {
        n: (f.source, [s.adapter for s in f.live])
        for n, f in in_force(CONFIG, state.bases.get("tiny", {})).items()
    }


def test_an_operators_alias_holds_over_the_configs_until_it_is_deleted() -> None:
    state = with_alias(AliasState(), "tiny", "prod", Alias(shares(v9=1)))
    state = with_alias(state, "tiny", "next", Alias(shares(v8=1)))
    assert force(state) == {"next": ("runtime", ["v8"]), "prod": ("runtime", ["v9"])}
    assert force(without_alias(without_alias(state, "tiny", "prod"), "tiny", "next")) == {
        "prod": ("config", ["v7", "v8"])
    }


def test_a_share_of_weight_nothing_gets_nobody() -> None:
    assert force(with_alias(AliasState(), "tiny", "prod", Alias(shares(v7=1, v8=0))))["prod"] == (
        "runtime",
        ["v7"],
    )


def test_a_rollback_holds_for_everybody_until_an_operator_changes_the_alias() -> None:
    found = in_force(CONFIG, {})["prod"]
    state = with_rollback(AliasState(), "tiny", found, "v8", TRIP)
    assert force(state)["prod"] == ("config", ["v7"])
    again = with_alias(state, "tiny", "prod", CONFIG["prod"])
    assert force(again)["prod"] == ("runtime", ["v7", "v8"]), (
        "the same shares anew are an operator's word too"
    )


def test_a_rollback_is_history_once_the_config_has_other_shares() -> None:
    state = with_rollback(AliasState(), "tiny", in_force(CONFIG, {})["prod"], "v8", TRIP)
    after = in_force({"prod": Alias(shares(v7=50, v8=50))}, state.bases["tiny"])["prod"]
    assert [s.adapter for s in after.live] == ["v7", "v8"] and not after.rollbacks


def test_a_rollback_that_comes_after_the_operators_change_has_no_effect() -> None:
    found = in_force(CONFIG, {})["prod"]
    state = with_alias(AliasState(), "tiny", "prod", Alias(shares(v8=1, v9=1)))
    assert with_rollback(state, "tiny", found, "v8", TRIP) is state


def test_two_gateways_that_roll_back_different_shares_leave_one() -> None:
    found = in_force(CONFIG, {})["prod"]
    state = with_rollback(AliasState(), "tiny", found, "v8", TRIP)
    assert with_rollback(state, "tiny", found, "v7", TRIP) is state


# ---- the config ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("v7", shares(v7=1)),
        ({"adapter": "v7"}, shares(v7=1)),
        ([{"adapter": "v7", "weight": 90}, {"adapter": "v8", "weight": 10}], shares(v7=90, v8=10)),
        (
            {"shares": [{"adapter": "team/v7@0123abcd", "weight": 0.5}]},
            (AliasShare("team/v7@0123abcd", 0.5),),
        ),
    ],
)
def test_an_alias_may_be_written_short_or_long(
    raw: object, expected: tuple[AliasShare, ...]
) -> None:
    section, findings = read_section(AliasConfig, plain_alias(raw), ())
    assert section is not None and not findings
    assert from_config(section) == Alias(expected, RollbackConfig())
    assert from_config(
        LoraConfig(dynamic_lora_loading_path="/x", aliases={"prod": raw}).alias_configs["prod"]
    ) == Alias(expected, RollbackConfig())


def test_no_rollback_can_be_asked_for() -> None:
    config = LoraConfig(
        dynamic_lora_loading_path="/x", aliases={"prod": {"adapter": "v7", "rollback": None}}
    )
    assert config.alias_configs["prod"].rollback is None


@pytest.mark.parametrize(
    ("aliases", "place"),
    [
        ({"a@b": "v7"}, "aliases.a@b"),
        ({"a@b": "v7"}, "aliases.a@b"),
        ({"prod": 5}, "aliases.prod"),
        ({"prod": []}, "aliases.prod.shares"),
        ({"prod": "../etc"}, "aliases.prod.shares[0].adapter"),
        ({"prod": "v7@12"}, "aliases.prod.shares[0].adapter"),
        ({"prod": [{"adapter": "v7", "wieght": 1}]}, "aliases.prod.shares[0].wieght"),
        ({"prod": [{"adapter": "v7", "weight": -1}]}, "aliases.prod.shares[0].weight"),
        ({"prod": [{"adapter": "v7", "weight": 0}]}, "aliases.prod.shares"),
        ({"prod": [{"adapter": "v7"}, {"adapter": "v7"}]}, "aliases.prod.shares"),
        (
            {"prod": {"adapter": "v7", "rollback": {"error_rate": 5}}},
            "aliases.prod.rollback.error_rate",
        ),
        ({"prod": [{"adapter": f"v{i}"} for i in range(17)]}, "aliases.prod.shares"),
    ],
)
def test_a_wrong_alias_is_refused_with_its_place(aliases: object, place: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LoraConfig(dynamic_lora_loading_path="/x", aliases=aliases)  # type: ignore[arg-type]
    assert f": {place}: " in caught.value.message


def test_aliases_without_a_place_of_adapters_are_refused() -> None:
    with pytest.raises(ConfigError, match="aliases"):
        LoraConfig(aliases={"prod": "v7"})
