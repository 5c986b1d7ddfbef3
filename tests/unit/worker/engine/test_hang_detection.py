"""Pure. When an engine is suspect, when it hangs for good, and what is only slow."""

from __future__ import annotations

import pytest

from worker.engine.hang_detection import (
    LOOK_S,
    PREFILL_FACTOR,
    EngineSigns,
    EngineVerdict,
    Healthy,
    Hung,
    ProgressWatch,
    Suspect,
)

SUSPECT_S, KILL_S = 5.0, 20.0


class Watched:
    """An engine that is looked at every LOOK_S. `answers`: its loop turns."""

    def __init__(self) -> None:
        self.now = 100.0
        self.watch = ProgressWatch(SUSPECT_S, KILL_S, self.now)
        self.signs = EngineSigns()
        self.answers = True
        self._pinged = False

    def run(self, seconds: float, steps_per_look: int = 0, **signs: float) -> EngineVerdict:
        verdict: EngineVerdict = Healthy()
        steps = self.signs.steps
        for _ in range(round(seconds / LOOK_S)):
            self.now += LOOK_S
            steps += steps_per_look
            self.signs = EngineSigns(steps, **signs)  # type: ignore[arg-type]
            if self.answers:
                self.watch.answered()
                self._pinged = False
            if not self._pinged:
                self.watch.pinged(self.now)
                self._pinged = True
            verdict = self.watch.look(self.signs, self.now)
        return verdict


@pytest.fixture
def engine() -> Watched:
    return Watched()


def test_an_engine_that_steps_is_healthy_however_long(engine: Watched) -> None:
    assert engine.run(1000, 1, running=8) == Healthy()


def test_an_idle_engine_that_answers_is_healthy(engine: Watched) -> None:
    assert engine.run(1000) == Healthy()


def test_running_requests_without_a_step_make_it_suspect_then_hung(engine: Watched) -> None:
    engine.run(10, 1, running=8)
    assert engine.run(SUSPECT_S - LOOK_S, running=8) == Healthy()
    assert isinstance(engine.run(2 * LOOK_S, running=8), Suspect)
    assert isinstance(engine.run(KILL_S - 1, running=8), Suspect)
    assert isinstance(engine.run(2, running=8), Hung)


def test_a_loop_that_does_not_answer_is_noticed_while_idle_too(engine: Watched) -> None:
    engine.run(10)
    engine.answers = False
    assert engine.run(SUSPECT_S - LOOK_S) == Healthy()
    assert isinstance(engine.run(1), Suspect)
    assert isinstance(engine.run(KILL_S + 1), Hung)


def test_an_answer_or_a_step_ends_the_doubt(engine: Watched) -> None:
    engine.answers = False
    assert isinstance(engine.run(SUSPECT_S + 1, running=8), Suspect)
    engine.answers = True
    assert engine.run(1, 1, running=8) == Healthy()


def test_requests_that_were_taken_away_are_no_step(engine: Watched) -> None:
    """The loop answers, but the batch makes no step. The doubt stays when the batch is empty."""
    engine.run(10, 1, running=8)
    assert isinstance(engine.run(SUSPECT_S + 1, running=8), Suspect)
    assert isinstance(engine.run(KILL_S - 2, running=0), Suspect)
    assert isinstance(engine.run(2, running=0), Hung)


def test_a_stopped_loop_that_goes_on_is_healthy_though_its_requests_were_taken_away(
    engine: Watched,
) -> None:
    engine.answers = False
    assert isinstance(engine.run(SUSPECT_S + 1, running=0), Suspect)
    engine.answers = True
    assert engine.run(1, running=0) == Healthy()


def test_a_loop_that_stopped_between_a_step_and_a_ping_is_silent_not_stepping_in_vain(
    engine: Watched,
) -> None:
    engine.run(10, 1, running=8)
    engine.run(1, running=8)  # it answers once more after its last step
    engine.answers = False
    assert isinstance(engine.run(SUSPECT_S - 0.5, running=8), Suspect)
    engine.answers = True
    assert engine.run(1, running=0) == Healthy()


def test_a_long_prefill_is_waited_for_as_long_as_its_speed_says(engine: Watched) -> None:
    engine.run(10, 1, running=8)
    engine.answers = False
    prompt = {"prefill_tokens": 4000, "prefill_tokens_per_s": 100.0}
    bound_s = SUSPECT_S + PREFILL_FACTOR * 40
    assert engine.run(bound_s - 1, running=8, **prompt) == Healthy()
    assert isinstance(engine.run(2, running=8, **prompt), Suspect)


def test_a_process_that_stood_still_itself_blames_nobody(engine: Watched) -> None:
    engine.run(10, 1, running=8)
    engine.answers = False
    engine.run(1, running=8)
    engine.now += 3600
    assert engine.run(SUSPECT_S - 2, running=8) == Healthy()
    assert isinstance(engine.run(3, running=8), Suspect)
