"""Log lines: their form, their bounds, and what never appears in them."""

from __future__ import annotations

import json
import logging

from shared.runtime.log import MAX_LINE_CHARACTERS, JSONLines, ShortLines, place_of

SECRET = "sk-a-key-that-nobody-may-see"


def record(text: str, **extra: object) -> logging.LogRecord:
    made = logging.makeLogRecord({"msg": text, "levelno": logging.INFO, "levelname": "INFO"})
    for key, value in extra.items():
        setattr(made, key, value)
    return made


def test_a_line_is_bounded_whatever_a_client_called_its_model() -> None:
    long = record("x" * 100_000, model="y" * 100_000)
    assert len(JSONLines("g0").format(long)) < MAX_LINE_CHARACTERS
    assert len(ShortLines("g0").format(long)) < MAX_LINE_CHARACTERS + 10
    json.loads(JSONLines("g0").format(long))


def test_a_name_with_line_ends_writes_no_lines_of_its_own() -> None:
    made = ShortLines("g0").format(record("request", model="a\n12:00:00 g0 all is well\x1b[2J"))
    assert "\n" not in made and "\x1b" not in made


def test_the_place_of_an_error_says_where_and_never_what_was_quoted() -> None:
    try:
        raise ValueError(f"bad header: {SECRET}")
    except ValueError as exc:
        place = place_of(exc)
    assert place.startswith("ValueError < test_log.py:") and SECRET not in place
