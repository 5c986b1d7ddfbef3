"""Which requests of which workers died may be on one worker together."""

from __future__ import annotations

import itertools

import pytest

from shared.link.messages import SUSPECTED
from worker.requests.trials import OpenTrials


@pytest.mark.parametrize("deaths", range(SUSPECTED + 2))
@pytest.mark.parametrize("there", range(1, SUSPECTED + 2))
def test_a_suspected_request_is_with_no_other_one_of_which_any_died(
    deaths: int, there: int
) -> None:
    trials = OpenTrials()
    assert trials.admits("this", deaths)
    trials.begin(1, "other", there, False)
    together = not deaths or max(deaths, there) < SUSPECTED
    assert trials.admits("this", deaths) is together


@pytest.mark.parametrize("to_its_end", [False, True])
def test_progress_ends_a_trial_unless_it_is_to_the_end_of_the_request(to_its_end: bool) -> None:
    trials = OpenTrials()
    trial = trials.begin(1, "other", SUSPECTED, to_its_end)
    trial.progressed()
    assert trials.admits("this", SUSPECTED) is not to_its_end
    trials.end(1)
    trials.end(1)
    assert trials.admits("this", SUSPECTED)


def test_one_that_has_ended_leaves_the_others_where_they_are() -> None:
    for ended in itertools.permutations(range(3), 2):
        trials = OpenTrials()
        for number in range(3):
            trials.begin(number, number, 1, False)
        for number in ended:
            trials.end(number)
        assert not trials.admits("this", SUSPECTED) and trials.admits("this", 1)


@pytest.mark.parametrize("deaths", range(SUSPECTED + 2))
@pytest.mark.parametrize("there", range(1, SUSPECTED + 2))
def test_copies_may_be_together_for_it_is_one_of_them_then(deaths: int, there: int) -> None:
    trials = OpenTrials()
    trials.begin(1, "this", there, False)
    assert trials.admits("this", deaths)
