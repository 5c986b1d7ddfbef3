"""The journal: what clients have seen of each answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.dispatch.streams.journal import (
    NO_MEMORY,
    SWITCHED_OFF,
    TOO_LONG,
    JournalBounds,
    StreamJournal,
    keep_within,
)
from shared.link.token_ids import BYTES_PER_TOKEN, pack, pack_choice, unpack

token = st.integers(0, (1 << 31) - 1)
choice = st.integers(0, 1000)


def of_length(tokens: int) -> StreamJournal:
    journal = StreamJournal()
    journal.tokens += pack(range(tokens))
    return journal


@given(st.lists(token))
def test_the_tokens_of_one_choice_come_back_in_their_order(ids: list[int]) -> None:
    assert unpack(pack(ids)) == ({0: ids} if ids else {})
    assert len(pack(ids)) == BYTES_PER_TOKEN * len(ids)


@given(st.lists(st.tuples(choice, st.lists(token, min_size=1))))
def test_frames_of_several_choices_can_be_joined(frames: list[tuple[int, list[int]]]) -> None:
    due: dict[int, list[int]] = {}
    for number, ids in frames:
        due.setdefault(number, []).extend(ids)
    assert unpack(b"".join(pack_choice(number, ids) for number, ids in frames)) == due


def test_half_a_word_is_refused() -> None:
    with pytest.raises(ValueError, match="5 bytes"):
        unpack(b"12345")


def test_what_a_client_has_seen_is_where_another_worker_goes_on() -> None:
    assert unpack(of_length(3).seen) == {0: [0, 1, 2]}


def test_a_stream_that_cannot_move_says_the_first_reason_and_keeps_nothing() -> None:
    journal = StreamJournal(obstacle=SWITCHED_OFF)
    journal.tokens += pack([1, 2])
    journal.give_up(TOO_LONG)
    assert (journal.obstacle, journal.seen, len(journal.tokens)) == (SWITCHED_OFF, b"", 0)


def test_a_stream_over_its_bound_is_given_up_and_the_others_are_kept() -> None:
    journals = [of_length(10), of_length(11), of_length(9)]
    keep_within(journals, JournalBounds(10, 1 << 20))
    assert [j.obstacle for j in journals] == ["", TOO_LONG, ""]


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(0, 500))
def test_all_journals_together_stay_within_the_bound_and_the_longest_are_given_up(
    lengths: list[int], bound: int
) -> None:
    journals = [of_length(n) for n in lengths]
    keep_within(journals, JournalBounds(50, bound * BYTES_PER_TOKEN))
    kept = [n for n, j in zip(lengths, journals, strict=True) if not j.obstacle]
    given_up = [n for n, j in zip(lengths, journals, strict=True) if j.obstacle == NO_MEMORY]
    assert sum(kept) <= bound
    assert not given_up or min(given_up) >= max(kept, default=0)
    assert not given_up or sum(kept) + min(given_up) > bound, "more was given up than had to be"


def test_what_arrives_for_a_stream_that_was_given_up_does_not_pile_up() -> None:
    journal = of_length(11)
    bounds = JournalBounds(10, 1 << 20)
    for _ in range(5):
        journal.tokens += pack(range(5))
        keep_within([journal], bounds)
        assert len(journal.tokens) == 0
