"""Pure. When what has ended is started again, and which models cannot start."""

from __future__ import annotations

import random
import signal

import pytest

from gateway.supervisor.health import (
    START_SILENCE_S,
    ProcessHealth,
    WorkerHealth,
    models_that_cannot_start,
)
from gateway.supervisor.restarts import (
    FAILED_STARTS_LIMIT,
    MAX_WAIT_S,
    PROVEN_KILLED_S,
    PROVEN_S,
    ProcessExit,
    RestartHistory,
)

KILLED, FAILED = 128 + signal.SIGKILL, 1


def rng() -> random.Random:
    return random.Random(7)


@pytest.mark.parametrize(
    "end",
    [
        ProcessExit(KILLED, PROVEN_KILLED_S),
        ProcessExit(128 + signal.SIGTERM, 1e6),
        ProcessExit(FAILED, PROVEN_S),
        ProcessExit(0, 0.1),
    ],
)
def test_a_process_that_had_served_starts_again_without_a_wait_every_time(end: ProcessExit) -> None:
    history, chance = RestartHistory(), rng()
    assert [history.wait_s(end, chance) for _ in range(50)] == [0.0] * 50


@pytest.mark.parametrize(
    "end",
    [
        ProcessExit(FAILED, 0.0),
        ProcessExit(0, 0.0),
        ProcessExit(2, 0.0),
        ProcessExit(KILLED, PROVEN_KILLED_S - 0.1),
        ProcessExit(FAILED, PROVEN_S - 1),
    ],
)
def test_one_that_never_gets_going_waits_longer_each_time_up_to_a_bound(end: ProcessExit) -> None:
    history, chance = RestartHistory(), rng()
    waits = [history.wait_s(end, chance) for _ in range(2000)]
    assert all(wait > 0 for wait in waits)
    assert waits[0] <= 1 and max(waits) <= MAX_WAIT_S
    assert sum(waits[8:]) / len(waits[8:]) > MAX_WAIT_S / 2


def test_processes_that_fail_together_do_not_start_again_in_step() -> None:
    chance = rng()
    waits = {RestartHistory().wait_s(ProcessExit(FAILED, 0.0), chance) for _ in range(20)}
    assert len(waits) == 20


def test_what_somebody_kills_waits_as_long_but_has_not_failed_to_start() -> None:
    history, chance = RestartHistory(), rng()
    for _ in range(3):
        assert history.wait_s(ProcessExit(KILLED, 0.0, from_outside=True), chance) > 0
    assert (history.failures, history.failed_starts) == (3, 0)
    history.wait_s(ProcessExit(FAILED, 0.0), chance)
    assert history.failed_starts == 1


def test_a_life_that_proved_itself_ends_the_loop() -> None:
    history, chance = RestartHistory(), rng()
    for _ in range(5):
        history.wait_s(ProcessExit(FAILED, 0.0), chance)
    history.wait_s(ProcessExit(KILLED, 60.0), chance)
    assert history.failures == 0 and history.wait_s(ProcessExit(FAILED, 0.0), chance) <= 1


def test_a_process_hangs_once_it_is_silent_too_long_and_one_that_starts_may_be_silent_longer() -> (
    None
):
    health = ProcessHealth("w0", 1, last_sign_at=0.0)
    assert not health.hangs(5.0, START_SILENCE_S) and health.hangs(5.0, START_SILENCE_S + 1)
    health.pulse(True, "", 100.0)
    assert not health.hangs(5.0, 105.0) and health.hangs(5.0, 105.1)
    health.pulse(False, "", 105.1)
    assert not health.hangs(5.0, 110.0)


def test_how_long_it_has_served_counts_from_its_first_healthy_pulse() -> None:
    health = ProcessHealth("w0", 1, last_sign_at=0.0)
    assert health.healthy_s(50.0) == 0
    for now in (10.0, 11.0, 12.0):
        health.pulse(True, "", now)
    assert health.healthy_s(15.0) == 5.0


def failing(model: str, reason: str = "no weights") -> WorkerHealth:
    return WorkerHealth(model, False, FAILED_STARTS_LIMIT, reason)


def test_a_model_cannot_start_once_all_its_workers_have_failed_often_enough() -> None:
    assert models_that_cannot_start([failing("bad")]) == {"bad": "no weights"}
    assert models_that_cannot_start([failing("bad"), failing("bad", "later")]) == {
        "bad": "no weights"
    }
    assert (
        models_that_cannot_start(
            [WorkerHealth("bad", False, FAILED_STARTS_LIMIT - 1, "no weights")]
        )
        == {}
    )


def test_no_model_is_condemned_while_one_of_its_workers_serves_or_has_not_been_tried() -> None:
    assert models_that_cannot_start([failing("m"), WorkerHealth("m", True, 0, "")]) == {}
    assert models_that_cannot_start([failing("m"), WorkerHealth("m", False, 0, "")]) == {}


def test_one_model_says_nothing_of_another() -> None:
    found = models_that_cannot_start(
        [failing("bad"), WorkerHealth("good", True, 0, ""), WorkerHealth("new", False, 0, "")]
    )
    assert set(found) == {"bad"}
