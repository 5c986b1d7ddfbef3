"""Pure. What a person reads while `serve` starts."""

from __future__ import annotations

from gateway.supervisor.start_progress import IMPORTING, QUIET_S, Starting, StartProgress


def test_a_line_is_said_at_once_when_something_changes_and_else_when_it_was_quiet_for_long() -> (
    None
):
    progress, importing = (
        StartProgress(10.0, 0.0),
        [Starting(name, IMPORTING) for name in ("w0", "w1")],
    )
    assert progress.line(importing, 10.0) == "w0 w1: importing vLLM; 0 s so far"
    assert progress.line(importing, 10.1) is None
    assert progress.line(importing, 10.0 + QUIET_S) == "w0 w1: importing vLLM; 3 s so far"
    loading = [Starting("w1", "loading the model"), Starting("w0", IMPORTING)]
    said = progress.line(loading, 10.1 + QUIET_S)
    assert said is not None and "w0: importing vLLM, w1: loading the model" in said
    assert progress.line(loading[:1], 10.2 + QUIET_S) is not None


def test_nothing_is_said_of_workers_that_serve() -> None:
    assert StartProgress(0.0, 0.0).line([], 100.0) is None


def test_a_line_says_what_the_last_start_took_and_does_not_name_dozens() -> None:
    said = StartProgress(0.0, 17.4).line([Starting(f"w{n:02}", IMPORTING) for n in range(30)], 1.0)
    assert said == "w00 and 29 others: importing vLLM; 1 s so far (the last start took 17 s)"
