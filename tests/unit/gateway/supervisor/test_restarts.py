"""Pure. When what has ended is started again, and which models cannot start."""

from __future__ import annotations

import random
import signal

import pytest

from gateway.supervisor.health import START_SILENCE_S, ProcessHealth, Trial, verdicts
from gateway.supervisor.restarts import (
    HOPELESS_TRIES,
    MAX_WAIT_S,
    PROVEN_KILLED_S,
    PROVEN_S,
    End,
    RestartHistory,
)

KILLED, FAILED = 128 + signal.SIGKILL, 1


def rng() -> random.Random:
    return random.Random(7)


@pytest.mark.parametrize(
    "end",
    [
        End(KILLED, PROVEN_KILLED_S),
        End(128 + signal.SIGTERM, 1e6),
        End(FAILED, PROVEN_S),
        End(0, 0.1),
    ],
)
def test_a_process_that_had_served_starts_again_without_a_wait_every_time(end: End) -> None:
    history, chance = RestartHistory(), rng()
    assert [history.wait_s(end, chance) for _ in range(50)] == [0.0] * 50


@pytest.mark.parametrize(
    "end",
    [
        End(FAILED, 0.0),
        End(0, 0.0),
        End(2, 0.0),
        End(KILLED, PROVEN_KILLED_S - 0.1),
        End(FAILED, PROVEN_S - 1),
    ],
)
def test_one_that_never_gets_going_waits_longer_each_time_up_to_a_bound(end: End) -> None:
    history, chance = RestartHistory(), rng()
    waits = [history.wait_s(end, chance) for _ in range(2000)]
    assert all(wait > 0 for wait in waits)
    assert waits[0] <= 1 and max(waits) <= MAX_WAIT_S
    assert sum(waits[8:]) / len(waits[8:]) > MAX_WAIT_S / 2


def test_processes_that_fail_together_do_not_start_again_in_step() -> None:
    chance = rng()
    waits = {RestartHistory().wait_s(End(FAILED, 0.0), chance) for _ in range(20)}
    assert len(waits) == 20


def test_a_life_that_proved_itself_ends_the_loop() -> None:
    history, chance = RestartHistory(), rng()
    for _ in range(5):
        history.wait_s(End(FAILED, 0.0), chance)
    history.wait_s(End(KILLED, 60.0), chance)
    assert history.failures == 0 and history.wait_s(End(FAILED, 0.0), chance) <= 1


def test_a_process_hangs_once_it_is_silent_too_long_and_one_that_starts_may_be_silent_longer() -> (
    None
):
    health = ProcessHealth("w0", 1, heard_at=0.0)
    assert not health.hangs(5.0, START_SILENCE_S) and health.hangs(5.0, START_SILENCE_S + 1)
    health.pulse(True, "", 100.0)
    assert not health.hangs(5.0, 105.0) and health.hangs(5.0, 105.1)
    health.pulse(False, "", 105.1)
    assert not health.hangs(5.0, 110.0)


def test_how_long_it_has_served_counts_from_its_first_healthy_pulse() -> None:
    health = ProcessHealth("w0", 1, heard_at=0.0)
    assert health.healthy_s(50.0) == 0
    for now in (10.0, 11.0, 12.0):
        health.pulse(True, "", now)
    assert health.healthy_s(15.0) == 5.0


def failing(model: str, reason: str = "no weights") -> Trial:
    return Trial(model, False, HOPELESS_TRIES, reason)


def test_a_model_cannot_start_once_all_its_workers_have_failed_often_enough() -> None:
    assert verdicts([failing("bad")]) == {"bad": "no weights"}
    assert verdicts([failing("bad"), failing("bad", "later")]) == {"bad": "no weights"}
    assert verdicts([Trial("bad", False, HOPELESS_TRIES - 1, "no weights")]) == {}


def test_no_model_is_condemned_while_one_of_its_workers_serves_or_has_not_been_tried() -> None:
    assert verdicts([failing("m"), Trial("m", True, 0, "")]) == {}
    assert verdicts([failing("m"), Trial("m", False, 0, "")]) == {}


def test_one_model_says_nothing_of_another() -> None:
    found = verdicts([failing("bad"), Trial("good", True, 0, ""), Trial("new", False, 0, "")])
    assert set(found) == {"bad"}
