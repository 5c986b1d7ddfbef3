"""The states of a request, and which events lead from one to the next."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.dispatch.lifecycle import (
    DEADLY,
    MAX_ATTEMPTS,
    NEXT,
    OVER,
    RETRIES_AT_ONCE,
    RETRIES_PER_S,
    RequestEvent,
    RequestLifecycle,
    RequestPhase,
    RetryBudget,
)
from shared.link.messages import SUSPECTED

# The table is written down a second time on purpose, because it is the contract.
ALLOWED = {
    RequestPhase.QUEUED: {
        RequestEvent.DISPATCHED: RequestPhase.SENT,
        RequestEvent.FAIL: RequestPhase.FAILED,
        RequestEvent.CANCEL: RequestPhase.ABORTED,
    },
    RequestPhase.SENT: {
        RequestEvent.HEAD: RequestPhase.STREAMING,
        RequestEvent.ANSWERED: RequestPhase.STREAMING,
        RequestEvent.RETRY: RequestPhase.QUEUED,
        RequestEvent.FAIL: RequestPhase.FAILED,
        RequestEvent.CANCEL: RequestPhase.ABORTED,
    },
    RequestPhase.STREAMING: {
        RequestEvent.END: RequestPhase.FINISHED,
        RequestEvent.RETRY: RequestPhase.QUEUED,
        RequestEvent.FAIL: RequestPhase.FAILED,
        RequestEvent.CANCEL: RequestPhase.ABORTED,
    },
}


def at(phase: RequestPhase) -> RequestLifecycle:
    life = RequestLifecycle()
    life.phase = phase
    return life


@pytest.mark.parametrize(("phase", "event"), list(itertools.product(RequestPhase, RequestEvent)))
def test_every_pair_leads_where_the_contract_says_or_raises(
    phase: RequestPhase, event: RequestEvent
) -> None:
    expected = ALLOWED.get(phase, {}).get(event)
    life = at(phase)
    if expected is None:
        with pytest.raises(AssertionError):
            life.on(event)
        assert life.phase is phase and life.history == []
    else:
        assert life.on(event) is expected
        assert life.phase is expected and life.history == [event]


def test_nothing_leads_out_of_an_end() -> None:
    assert not [pair for pair in NEXT if pair[0] in OVER]
    assert {phase for phase in RequestPhase if at(phase).over} == OVER


def test_a_bug_is_raised_with_the_history() -> None:
    life = RequestLifecycle()
    life.on(RequestEvent.DISPATCHED)
    with pytest.raises(AssertionError, match="DISPATCHED"):
        life.on(RequestEvent.END)


@given(st.lists(st.sampled_from(list(RequestEvent)), max_size=40))
def test_whatever_happens_a_request_ends_at_most_once(events: list[RequestEvent]) -> None:
    life = RequestLifecycle()
    ends = 0
    for event in events:
        before = life.phase
        try:
            life.on(event)
        except AssertionError:
            assert (before, event) not in NEXT
            continue
        ends += life.over
    assert ends <= 1
    assert life.over == (ends == 1)
    assert life.attempts == life.history.count(RequestEvent.DISPATCHED)


def test_a_loss_before_the_first_frame_is_tried_again_until_the_attempts_are_used_up() -> None:
    life = RequestLifecycle()
    for attempt in range(1, MAX_ATTEMPTS + 1):
        life.on(RequestEvent.DISPATCHED)
        assert life.attempts == attempt
        expected = RequestPhase.QUEUED if attempt < MAX_ATTEMPTS else RequestPhase.FAILED
        assert life.on_loss(retryable=True) is expected
    assert life.over


def test_a_loss_that_cannot_be_retried_fails_at_once() -> None:
    life = RequestLifecycle()
    life.on(RequestEvent.DISPATCHED)
    assert life.on_loss(retryable=False) is RequestPhase.FAILED


def test_a_worker_that_begins_to_answer_gives_the_request_all_its_attempts_again() -> None:
    life = RequestLifecycle()
    for _ in range(5):
        for _ in range(MAX_ATTEMPTS - 1):
            life.on(RequestEvent.DISPATCHED)
            assert life.on_loss(retryable=True) is RequestPhase.QUEUED
        life.on(RequestEvent.DISPATCHED)
        life.on(RequestEvent.HEAD)
        assert life.on_loss(retryable=True) is RequestPhase.QUEUED
    assert life.attempts == 5 * MAX_ATTEMPTS


def test_tokens_of_an_answer_that_is_sent_whole_give_it_all_its_attempts_again() -> None:
    life = RequestLifecycle()
    for _ in range(3 * MAX_ATTEMPTS):
        life.on(RequestEvent.DISPATCHED)
        life.progressed()
        assert life.on_loss(retryable=True, died=True) is RequestPhase.QUEUED


def test_a_worker_that_had_made_tokens_of_a_request_did_not_die_before_it_answered() -> None:
    life = RequestLifecycle()
    life.on(RequestEvent.DISPATCHED)
    life.progressed()
    for _ in range(2):
        assert died(life) is RequestPhase.QUEUED
    assert died(life) is RequestPhase.FAILED


def test_workers_that_leave_and_hand_a_request_back_use_up_none_of_its_attempts() -> None:
    life = RequestLifecycle()
    for _ in range(3 * MAX_ATTEMPTS):
        life.on(RequestEvent.DISPATCHED)
        assert life.on_loss(retryable=True, handed_back=True) is RequestPhase.QUEUED
    for attempt in range(1, MAX_ATTEMPTS + 1):
        life.on(RequestEvent.DISPATCHED)
        expected = RequestPhase.QUEUED if attempt < MAX_ATTEMPTS else RequestPhase.FAILED
        assert life.on_loss(retryable=True) is expected


def died(life: RequestLifecycle, *, alone: bool = False) -> RequestPhase:
    """One more worker that had it has died of it, perhaps."""
    if life.phase is RequestPhase.QUEUED:
        life.on(RequestEvent.DISPATCHED)
        life.taken = True
    return life.on_loss(retryable=True, died=True, alone=alone)


def test_the_second_death_in_a_row_is_the_last_one_if_no_other_can_be_the_cause() -> None:
    life = RequestLifecycle()
    assert died(life, alone=True) is RequestPhase.QUEUED
    assert died(life, alone=True) is RequestPhase.FAILED and life.deaths == DEADLY


def test_the_third_death_in_a_row_is_the_last_one_whoever_was_there() -> None:
    life = RequestLifecycle()
    assert [died(life) for _ in range(SUSPECTED)] == [RequestPhase.QUEUED] * SUSPECTED
    assert died(life) is RequestPhase.FAILED and life.deaths == DEADLY


def test_workers_that_die_before_they_have_taken_a_request_did_not_die_of_it() -> None:
    life = RequestLifecycle()
    died(life)
    for _ in range(MAX_ATTEMPTS):
        life.on(RequestEvent.DISPATCHED)
        assert life.on_loss(retryable=True, died=True) is RequestPhase.QUEUED
    assert life.deaths == 1
    assert [died(life), died(life)] == [RequestPhase.QUEUED, RequestPhase.FAILED]


def test_a_request_that_no_worker_is_said_to_take_is_not_tried_for_ever() -> None:
    life = RequestLifecycle()
    died(life)
    tried = 1
    while not life.over:
        life.on(RequestEvent.DISPATCHED)
        life.on_loss(retryable=True, died=True)
        tried += 1
    assert tried == 2 * MAX_ATTEMPTS


def test_what_a_worker_did_not_begin_is_as_if_it_had_not_been_sent() -> None:
    life = RequestLifecycle()
    died(life)
    before = (life.attempts, life.in_vain, life.deaths, [*life.history])
    for _ in range(100):
        life.on(RequestEvent.DISPATCHED)
        life.not_begun()
    assert (life.attempts, life.in_vain, life.deaths, life.history) == before


def test_a_request_goes_on_where_the_same_one_has_ended() -> None:
    life = RequestLifecycle(deaths=1)
    life.goes_on_from(2, True)
    assert life.deaths == 2 and life.to_its_end
    life.goes_on_from(1, False)
    assert life.deaths == 2 and life.to_its_end


def test_a_request_of_which_a_copy_was_deadly_is_given_to_no_other_worker() -> None:
    life = RequestLifecycle()
    life.on(RequestEvent.DISPATCHED)
    assert life.on_loss(retryable=True, known_deadly=True) is RequestPhase.FAILED
    assert life.deaths == DEADLY


def test_a_stream_that_two_workers_died_of_at_the_same_place_is_given_to_no_third() -> None:
    life = RequestLifecycle()
    life.on(RequestEvent.DISPATCHED)
    life.on(RequestEvent.HEAD)
    assert died(life, alone=True) is RequestPhase.QUEUED
    assert died(life, alone=True) is RequestPhase.FAILED


def test_workers_that_die_each_at_another_place_of_an_answer_are_not_the_requests_doing() -> None:
    life = RequestLifecycle()
    for _ in range(10):
        life.on(RequestEvent.DISPATCHED)
        life.on(RequestEvent.HEAD)
        assert died(life, alone=True) is RequestPhase.QUEUED


def test_progress_proves_nothing_after_a_death_in_the_middle_of_an_earlier_answer() -> None:
    life = RequestLifecycle(deaths=1, to_its_end=True)
    life.on(RequestEvent.DISPATCHED)
    life.on(RequestEvent.HEAD)
    assert died(life, alone=True) is RequestPhase.QUEUED, "that it was alone proves nothing either"
    life.on(RequestEvent.DISPATCHED)
    life.on(RequestEvent.HEAD)
    assert died(life) is RequestPhase.FAILED


def test_all_streams_may_lose_some_workers_at_once_but_not_over_and_over() -> None:
    budget = RetryBudget()
    assert RETRIES_AT_ONCE >= 2, "two of three workers may die together, each with everything on it"
    assert all(budget.take(1000, 50.0) for _ in range(1000 * RETRIES_AT_ONCE))
    assert not budget.take(1000, 50.0)
    taken = sum(budget.take(1000, 50.0 + tick / 100) for tick in range(2000) for _ in range(10))
    assert taken == pytest.approx(20 * RETRIES_PER_S * 1000, rel=0.01)
