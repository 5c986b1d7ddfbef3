"""The engine of the simulator against its table, against theory, and against a loop that takes
every step one by one.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.routing.sim.agenda import Agenda
from bench.routing.sim.engine import Sequence, TimedEngine
from bench.routing.sim.timing import Timing
from shared.link.messages import Tier

TABLE = Timing()
STEADY = Timing(
    decode=((1, 0.001), (256, 0.001)),
    prefill_tokens_per_s=1e12,
    mixed_s=0.0,
    scheduled_ahead=False,
)
"""Every step takes a millisecond, whatever is in it."""


@dataclass
class Heard:
    agenda: Agenda
    first: dict[int, float] = field(default_factory=dict)
    last: dict[int, float] = field(default_factory=dict)

    def on_step(self, first: list[Sequence], last: list[Sequence]) -> None:
        for sequence in first:
            assert sequence.number not in self.first
            self.first[sequence.number] = self.agenda.now
        for sequence in last:
            assert sequence.number not in self.last
            self.last[sequence.number] = self.agenda.now


@dataclass(frozen=True)
class Job:
    at_s: float
    prompt_tokens: int = 128
    output_tokens: int = 128


def _run(
    timing: Timing,
    jobs: list[Job],
    loads: list[tuple[float, float]] | None = None,
    aborts: dict[int, float] | None = None,
) -> Heard:
    agenda = Agenda()
    heard = Heard(agenda)
    engine = TimedEngine(timing, agenda, heard)
    for number, job in enumerate(jobs):
        sequence = Sequence(number, job.prompt_tokens, job.output_tokens)
        agenda.at(job.at_s, engine.add, sequence)
        if aborts and number in aborts:
            agenda.at(aborts[number], engine.abort, sequence)
    for at_s, seconds in loads or []:
        agenda.at(at_s, engine.load, seconds, lambda: None)
    agenda.run(lambda: True)
    assert (engine.decoding, engine.waiting, engine.tokens_held) == (0, 0, 0)
    return heard


@pytest.mark.parametrize(
    ("sequences", "step_ms"), [(1, 5.9), (64, 8.9), (256, 14.4), (160, 11.65), (0, 5.9)]
)
def test_a_step_takes_what_the_table_says_and_between_its_rows_the_line(
    sequences: int, step_ms: float
) -> None:
    assert TABLE.step_s(sequences) == pytest.approx(step_ms / 1e3)


def test_loads_and_fetches_cost_by_tier_and_bytes() -> None:
    size = TABLE.load_bytes
    assert (
        TABLE.load_from_s(Tier.DISK, size)
        == TABLE.load_from_s(Tier.REMOTE, size)
        == pytest.approx(TABLE.load_s)
    )
    assert TABLE.load_from_s(Tier.DISK, 2 * size) == pytest.approx(2 * TABLE.load_s)
    assert TABLE.load_from_s(Tier.CPU, size) == 0.004
    assert (
        TABLE.fetch_s(Tier.CPU, size)
        < TABLE.fetch_s(Tier.DISK, size)
        < TABLE.fetch_s(Tier.REMOTE, size)
    )


def test_one_request_alone_takes_its_prompt_and_one_step_per_token() -> None:
    heard = _run(TABLE, [Job(1.0)])
    first = 1.0 + TABLE.prefill_step_s(1, 128)
    assert heard.first[0] == pytest.approx(first)
    assert heard.last[0] == pytest.approx(first + 127 * TABLE.step_s(1))


def test_a_prefill_is_measured_as_what_it_adds_to_a_step() -> None:
    """The one that begins after a rest has no measurable beginning, as on vLLM."""
    agenda = Agenda()
    engine = TimedEngine(TABLE, agenda, Heard(agenda))
    engine.add(Sequence(0, 128, 100))
    agenda.at(0.1, engine.add, Sequence(1, 128, 2))
    agenda.run(lambda: agenda.now < 0.1)
    assert engine.rates.prefill_tokens_per_s == 0.0
    agenda.run(lambda: engine.decoding < 2)
    assert engine.rates.step_s == pytest.approx(TABLE.step_s(1))
    longer_s = TABLE.prefill_step_s(2, 128) - TABLE.step_s(1)
    assert engine.rates.prefill_tokens_per_s == pytest.approx(128 / longer_s)


def test_a_step_after_a_load_is_measured_with_the_load_before_it() -> None:
    agenda = Agenda()
    engine = TimedEngine(STEADY, agenda, Heard(agenda))
    engine.add(Sequence(0, 1, 100))
    agenda.at(0.0105, engine.load, 0.060, lambda: None)
    agenda.at(0.0715, engine.add, Sequence(1, 1, 1))  # so that the engine looks up
    agenda.run(lambda: agenda.now < 0.0719)
    assert engine.rates.step_s == pytest.approx(0.001 + 0.2 * 0.060)


def test_a_request_that_comes_during_a_step_is_in_the_next_but_one_as_the_next_is_scheduled() -> (
    None
):
    ahead = replace(STEADY, scheduled_ahead=True)
    heard = _run(ahead, [Job(0.0, 1, 100), Job(0.0105, 1, 1)])
    assert heard.first[1] == pytest.approx(0.013)


def test_requests_that_come_together_run_together_at_the_step_of_their_number() -> None:
    heard = _run(TABLE, [Job(0.0, 64, 100) for _ in range(17)])
    gaps = {heard.last[number] - heard.first[number] for number in range(1, 17)}
    assert max(gaps) == pytest.approx(99 * TABLE.step_s(17), rel=0.01)


def test_a_request_that_comes_during_a_step_waits_for_its_end() -> None:
    heard = _run(STEADY, [Job(0.0, 1, 100), Job(0.0105, 1, 1)])
    assert heard.first[1] == pytest.approx(0.012)  # joins at 11 ms, one step


def test_a_load_stalls_everything_for_its_time_from_the_end_of_the_running_step_on() -> None:
    calm, stalled = (
        _run(STEADY, [Job(0.0, 1, 100)]),
        _run(STEADY, [Job(0.0, 1, 100)], [(0.0105, 0.060)]),
    )
    assert stalled.last[0] == pytest.approx(calm.last[0] + 0.060)
    late = _run(STEADY, [Job(0.0, 1, 100), Job(0.020, 1, 1)], [(0.0105, 0.060)])
    assert late.first[1] == pytest.approx(0.011 + 0.060 + 0.001)


def test_between_two_loads_there_is_a_step_if_there_is_work() -> None:
    heard = _run(STEADY, [Job(0.0, 1, 5), Job(0.0015, 1, 1)], [(0.0012, 0.050), (0.0013, 0.050)])
    assert heard.first[1] == pytest.approx(0.002 + 0.050 + 0.001)


def test_no_more_than_the_maximum_runs_at_once() -> None:
    two = replace(STEADY, max_sequences=2)
    heard = _run(two, [Job(0.0, 1, 10), Job(0.0, 1, 20), Job(0.0, 1, 1)])
    assert heard.first[2] == pytest.approx(heard.last[0] + 0.001)


def test_a_long_prompt_is_read_in_chunks_between_which_others_decode() -> None:
    timing = replace(TABLE, step_tokens=100)
    heard = _run(timing, [Job(0.0, 10, 50), Job(0.05, 1000, 1)])
    assert heard.first[1] > 0.05 + 1000 / timing.prefill_tokens_per_s + 10 * timing.step_s(1)


def test_an_aborted_request_yields_nothing_more_and_leaves_the_others_faster() -> None:
    jobs = [Job(0.0), *[Job(0.0) for _ in range(15)]]
    heard = _run(TABLE, jobs, aborts=dict.fromkeys(range(1, 16), 0.3))
    assert set(heard.last) == {0}
    assert heard.last[0] < _run(TABLE, jobs).last[0]


def test_an_aborted_request_that_still_waits_never_starts() -> None:
    one = replace(STEADY, max_sequences=1)
    heard = _run(one, [Job(0.0, 1, 50), Job(0.001, 1, 5), Job(0.002, 1, 5)], aborts={1: 0.01})
    assert set(heard.first) == {0, 2}


def _step_by_step(
    timing: Timing, jobs: list[Job], loads: list[tuple[float, float]]
) -> tuple[dict[int, float], dict[int, float]]:
    """The same engine, stupidly: a loop over steps that looks at everything each time."""
    now, after_load = 0.0, False
    waiting: list[list[int]] = []  # [number, unread]
    running: dict[int, int] = {}  # number -> tokens left
    coming = sorted(range(len(jobs)), key=lambda number: (jobs[number].at_s, number))
    pending = sorted(loads)
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    scheduled = 0.0
    while coming or waiting or running or pending:
        while coming and jobs[coming[0]].at_s <= now + 1e-12:
            number = coming.pop(0)
            waiting.append([number, jobs[number].prompt_tokens])
        due = bool(pending) and pending[0][0] <= now + 1e-12
        if due and not (after_load and (waiting or running)):
            now += pending.pop(0)[1]
            after_load, scheduled = True, now
            continue
        after_load = False
        if not waiting and not running:
            now = min(
                [jobs[number].at_s for number in coming[:1]] + [at_s for at_s, _ in pending[:1]]
            )
            continue
        if not running or not timing.scheduled_ahead:
            scheduled = now
        budget, tokens = timing.step_tokens - len(running), 0
        chunks: list[list[int]] = []
        for entry in waiting:
            if len(running) + len(chunks) >= timing.max_sequences or tokens >= budget:
                break
            if jobs[entry[0]].at_s > scheduled:
                break
            chunk = min(entry[1], budget - tokens)
            chunks.append(entry)
            entry[1] -= chunk
            tokens += chunk
        scheduled = now
        now += (
            timing.prefill_step_s(len(running) + len(chunks), tokens)
            if chunks
            else timing.step_s(len(running))
        )
        for number in list(running):
            running[number] -= 1
        for entry in chunks:
            if entry[1] == 0:
                waiting.remove(entry)
                first[entry[0]] = now
                running[entry[0]] = jobs[entry[0]].output_tokens - 1
        for number in [number for number, left in running.items() if left == 0]:
            del running[number]
            last[number] = now
    return first, last


# Times that no step ends at and that no load shares with a request: where two things happen at
# once, either order is right.
_TIMES = st.integers(0, 3_000_000).map(lambda micros: micros / 1e6 + 0.000_000_3)
_LOAD_TIMES = st.integers(0, 3_000_000).map(lambda micros: micros / 1e6 + 0.000_000_7)


@given(
    st.lists(
        st.builds(Job, _TIMES, st.integers(1, 700), st.integers(1, 60)),
        min_size=1,
        max_size=25,
        unique_by=lambda job: job.at_s,
    ),
    st.lists(
        st.tuples(_LOAD_TIMES, st.sampled_from([0.004, 0.060])),
        max_size=5,
        unique_by=lambda load: load[0],
    ),
    st.sampled_from([1, 3, 8, 256]),
    st.sampled_from([300, 8192]),
    st.booleans(),
)
def test_computing_the_next_change_gives_what_taking_every_step_gives(
    jobs: list[Job],
    loads: list[tuple[float, float]],
    max_sequences: int,
    step_tokens: int,
    scheduled_ahead: bool,
) -> None:
    timing = replace(
        TABLE,
        max_sequences=max_sequences,
        step_tokens=step_tokens,
        scheduled_ahead=scheduled_ahead,
    )
    heard = _run(timing, jobs, loads)
    first, last = _step_by_step(timing, jobs, loads)
    assert heard.first == pytest.approx(first)
    assert heard.last == pytest.approx(last)


def _mean_wait_s(
    servers: int, rate_per_s: float, draw_tokens: list[int], rng: random.Random
) -> float:
    """Mean time from arrival to the first token, less the step that yields it, on `servers` places
    with steps of a millisecond.
    """
    at_s, jobs = 0.0, []
    for tokens in draw_tokens:
        at_s += rng.expovariate(rate_per_s)
        jobs.append(Job(at_s, 1, tokens))
    heard = _run(replace(STEADY, max_sequences=servers), jobs)
    waits = [heard.first[number] - job.at_s - 0.001 for number, job in enumerate(jobs)]
    return sum(waits[len(waits) // 20 :]) / len(waits[len(waits) // 20 :])


def test_constant_service_on_one_place_waits_as_pollaczek_and_khinchine_say() -> None:
    rate, service_s = 1.4, 0.5
    wait_s = _mean_wait_s(1, rate, [500] * 30_000, random.Random(1))
    load = rate * service_s
    assert wait_s == pytest.approx(load * service_s / (2 * (1 - load)), rel=0.06)


@pytest.mark.parametrize("servers", [1, 4])
def test_exponential_service_waits_as_erlang_says(servers: int) -> None:
    rng, service_s = random.Random(2), 0.5
    rate = 0.7 * servers / service_s
    wait_s = _mean_wait_s(
        servers,
        rate,
        [max(1, round(rng.expovariate(1 / service_s) * 1000)) for _ in range(40_000)],
        rng,
    )
    offered = rate * service_s
    queued = offered**servers / math.factorial(servers) / (1 - offered / servers)
    erlang_c = queued / (sum(offered**k / math.factorial(k) for k in range(servers)) + queued)
    assert wait_s == pytest.approx(erlang_c * service_s / (servers - offered), rel=0.1)
