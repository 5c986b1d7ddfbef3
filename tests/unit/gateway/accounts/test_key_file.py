"""The keys file: what each line means, and what is refused."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.accounts import key_file
from gateway.accounts.key_file import KeyEntry, LimitsEntry, read_entries, to_text
from shared.errors import ConfigError

DIGEST = hashlib.sha256(b"k").hexdigest()


def test_a_file_becomes_accounts_by_digest() -> None:
    text = f"""
keys:
  - name: team-a
    sha256: {DIGEST}
    expires: 2027-01-31
    adapters: ["team-a-*"]
    priority: [-5, 5]
    weight: 2
    limits:
      requests_per_minute: 600
      n: 4
"""
    [(digest, account)] = key_file.accounts(read_entries(text, "keys.yaml")).items()
    assert digest.hex() == DIGEST and account.name == "team-a" and account.weight == 2.0
    assert account.adapters == ("team-a-*",) and account.priority == (-5, 5)
    assert account.limits.requests_per_minute == 600 and account.limits.n == 4
    assert account.limits.tokens_per_minute is None
    assert account.expires == 1801353600.0  # midnight, UTC


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("{name: a, sha256: sk-my-secret}", "keys.yaml:2: keys[0].sha256"),
        ("{name: a b, sha256: %s}", "keys[0].name"),
        ("{name: a, sha256: %s, wieght: 2}", "keys[0].wieght"),
        ("{name: a, sha256: %s, weight: 0}", "keys[0].weight"),
        ("{name: a, sha256: %s, priority: [5, -5]}", "keys[0].priority"),
        ("{name: a, sha256: %s, expires: soon}", "keys[0].expires"),
        ("{name: a, sha256: %s, limits: {requests: 5}}", "keys[0].limits.requests"),
        ("{name: a, sha256: %s, limits: {n: 0}}", "keys[0].limits.n"),
        ("{name: a}", "keys[0].sha256"),
    ],
)
def test_what_is_wrong_is_said_with_its_place_and_never_with_the_key(entry: str, said: str) -> None:
    text = "keys:\n  - " + (entry % DIGEST if "%s" in entry else entry)
    with pytest.raises(ConfigError) as caught:
        read_entries(text, "keys.yaml")
    assert said in caught.value.message and "sk-my-secret" not in caught.value.message


def test_names_and_digests_are_there_once() -> None:
    entry = f"  - {{name: a, sha256: {DIGEST}}}\n"
    with pytest.raises(ConfigError) as caught:
        read_entries("keys:\n" + entry + entry, "keys.yaml")
    assert "name" in caught.value.message and "sha256" in caught.value.message


@given(st.text(max_size=200))
def test_a_file_that_is_no_keys_file_is_refused_and_never_half_read(text: str) -> None:
    try:
        assert read_entries(text, "keys.yaml") == []
    except ConfigError as exc:
        assert "keys.yaml" in exc.message


@given(
    names=st.lists(st.from_regex(key_file.NAME, fullmatch=True), unique=True, max_size=4),
    adapters=st.lists(st.text(min_size=1, max_size=8).filter(lambda t: t.isprintable())),
    limit=st.none() | st.integers(1, 10**9),
    priority=st.tuples(st.integers(-9, 0), st.integers(0, 9)),
)
def test_what_is_written_reads_as_it_was(
    names: list[str], adapters: list[str], limit: int | None, priority: tuple[int, int]
) -> None:
    entries = [
        KeyEntry(
            name=name,
            sha256=hashlib.sha256(name.encode()).hexdigest(),
            adapters=tuple(adapters),
            priority=priority,
            limits=LimitsEntry(tokens_per_minute=limit),
        )
        for name in names
    ]
    assert read_entries(to_text(entries), "keys.yaml") == entries
