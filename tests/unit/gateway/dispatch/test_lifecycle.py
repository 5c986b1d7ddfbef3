from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.dispatch.lifecycle import MAX_ATTEMPTS, NEXT, OVER, Event, Lifecycle, Phase

# Written down a second time on purpose: the table is the contract.
ALLOWED = {
    Phase.QUEUED: {Event.DISPATCHED: Phase.SENT, Event.FAIL: Phase.FAILED, Event.CANCEL: Phase.ABORTED},
    Phase.SENT: {Event.HEAD: Phase.STREAMING, Event.RETRY: Phase.QUEUED, Event.FAIL: Phase.FAILED, Event.CANCEL: Phase.ABORTED},
    Phase.STREAMING: {Event.END: Phase.FINISHED, Event.FAIL: Phase.FAILED, Event.CANCEL: Phase.ABORTED},
}


def at(phase: Phase) -> Lifecycle:
    life = Lifecycle()
    life.phase = phase
    return life


@pytest.mark.parametrize(("phase", "event"), list(itertools.product(Phase, Event)))
def test_every_pair_leads_where_the_contract_says_or_raises(phase: Phase, event: Event) -> None:
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
    assert {phase for phase in Phase if at(phase).over} == OVER


def test_a_bug_is_raised_with_the_history() -> None:
    life = Lifecycle()
    life.on(Event.DISPATCHED)
    with pytest.raises(AssertionError, match="DISPATCHED"):
        life.on(Event.END)


@given(st.lists(st.sampled_from(list(Event)), max_size=40))
def test_whatever_happens_a_request_ends_at_most_once(events: list[Event]) -> None:
    life = Lifecycle()
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
    assert life.attempts == life.history.count(Event.DISPATCHED)


def test_a_loss_before_the_first_frame_is_tried_again_until_the_attempts_are_used_up() -> None:
    life = Lifecycle()
    for attempt in range(1, MAX_ATTEMPTS + 1):
        life.on(Event.DISPATCHED)
        assert life.attempts == attempt
        expected = Phase.QUEUED if attempt < MAX_ATTEMPTS else Phase.FAILED
        assert life.on_loss(retryable=True) is expected
    assert life.over


def test_a_loss_that_cannot_be_retried_fails_at_once() -> None:
    life = Lifecycle()
    life.on(Event.DISPATCHED)
    assert life.on_loss(retryable=False) is Phase.FAILED


@pytest.mark.parametrize("retryable", [True, False])
def test_a_loss_after_the_first_frame_is_never_retried(retryable: bool) -> None:
    life = Lifecycle()
    life.on(Event.DISPATCHED)
    life.on(Event.HEAD)
    assert life.on_loss(retryable=retryable) is Phase.FAILED
