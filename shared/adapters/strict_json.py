"""Pure. JSON that strangers wrote, read in one way only. A duplicate key is refused, because
parsers differ in which of the two values they use.
"""

from __future__ import annotations

import json
import re
from typing import Any

from shared.errors import InvalidAdapter

SHOWN_CHARACTERS = 120
PIECE_CHARACTERS = 1 << 16
"""What is parsed in one call. Python's parser gives the interpreter to no other thread before it
ends: 16 MiB held the event loop of a worker for 0.3 to 2 s, which is longer than its lease.
"""
SHORT_CHARACTERS = 256  # nearly every value of a header
MAX_ITEMS = 10_000  # of a list that is longer than a piece
MAX_VALUES = 1_200_000
"""Commas and brackets of a long text. One tensor has eight in a header; what they become in memory
is ten or twenty times as large as the text.
"""


def parse_object(
    raw: bytes, what: str, reason: str, *, if_cut: str | None = None
) -> dict[str, Any]:
    """A JSON object. `what` names the source in messages, and `reason` becomes the error's code, or
    `if_cut` where the text ends too early.

    Raises:
        InvalidAdapter: it is not one object in UTF-8, or a key is there twice (reason
            `duplicate_key`).
    """
    try:
        # Editors on Windows write a byte order mark first. It carries no meaning.
        text = raw.decode("utf-8-sig")
        value = (
            json.loads(text, object_pairs_hook=_once)
            if len(text) <= PIECE_CHARACTERS
            else _in_pieces(text)
        )
    except _DuplicateKey as exc:
        raise InvalidAdapter(
            f"The key {shown(exc.key)} is given twice in {what}.", "duplicate_key"
        ) from exc
    except RecursionError as exc:
        raise InvalidAdapter(f"In {what} values are nested too deeply.", reason) from exc
    except UnicodeDecodeError as exc:
        raise InvalidAdapter(f"There is text in {what} that is not UTF-8.", reason) from exc
    except json.JSONDecodeError as exc:
        text = exc.doc.rstrip()
        cut = exc.msg != "Extra data" and (exc.pos >= len(text) or not text.endswith("}"))
        raise InvalidAdapter(
            f"There is no valid JSON in {what}: {exc.msg} at character {exc.pos}.",
            if_cut if if_cut and cut else reason,
        ) from exc
    except ValueError as exc:  # also raised for a number with more digits than Python converts
        raise InvalidAdapter(f"There is a number in {what} that is too long.", reason) from exc
    if not isinstance(value, dict):
        raise InvalidAdapter(f"A JSON object is expected in {what}, not {shown(value)}.", reason)
    return value


def shown(value: object) -> str:
    """The value for a message: short and printable, without the contents of lists and objects."""
    if isinstance(value, str):
        text = ascii(value)[1:-1]
        return f"`{text[:SHOWN_CHARACTERS]}`" + ("..." if len(text) > SHOWN_CHARACTERS else "")
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value.bit_length() > 64:
        return "a number beyond all bounds"
    if isinstance(value, int | float):
        return str(value)
    return "a list" if isinstance(value, list | tuple) else "an object"


class _DuplicateKey(ValueError):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKey(key)
            seen.add(key)
    return value


# ---- long texts ----------------------------------------------------------------------------------

_SPACE = re.compile(r"[ \t\n\r]{0,65536}")
_DECODER = json.JSONDecoder(object_pairs_hook=_once)


def _in_pieces(text: str) -> dict[str, Any]:
    """The object, of which each member has at most PIECE_CHARACTERS, or is an object or a list of
    such. Other threads get their turn after each member. Raises as `json.loads` does.
    """
    if sum(text.count(c) for c in ",[{") > MAX_VALUES:
        raise json.JSONDecodeError(f"More than {MAX_VALUES} values", text, 0)
    value, at = _members(text, _after_space(text, 0), 1)
    at = _after_space(text, at)
    if at < len(text):
        raise json.JSONDecodeError("Extra data", text, at)
    return value


def _members(text: str, at: int, deeper: int) -> tuple[dict[str, Any], int]:
    """The object that begins there, and where it ends."""
    found: dict[str, Any] = {}
    at = _after(text, at, "{")
    if text.startswith("}", at):
        return found, at + 1
    while True:
        if not text.startswith('"', at):
            raise json.JSONDecodeError("Expecting property name in double quotes", text, at)
        key, at = _value(text, at, 0)
        if key in found:
            raise _DuplicateKey(key)
        found[key], at = _value(text, _after(text, _after_space(text, at), ":"), deeper)
        at = _after_space(text, at)
        if text.startswith("}", at):
            return found, at + 1
        at = _after(text, at, ",")


def _value(text: str, at: int, deeper: int) -> tuple[Any, int]:
    """The value that begins there, and where it ends."""
    for size in (SHORT_CHARACTERS, PIECE_CHARACTERS):
        piece, is_rest = text[at : at + size], at + size >= len(text)
        try:
            value, end = _DECODER.raw_decode(piece)
        except json.JSONDecodeError as exc:
            if is_rest:
                raise json.JSONDecodeError(exc.msg, text, at + exc.pos) from None
        else:
            if is_rest or end < len(piece):  # else it may be the begin of a number
                return value, at + end
    if deeper and text.startswith("{", at):
        return _members(text, at, deeper - 1)
    if deeper and text.startswith("[", at):
        return _items(text, at)
    raise json.JSONDecodeError("No value, or one that is too long", text, at)


def _items(text: str, at: int) -> tuple[list[Any], int]:
    """The list that begins there, and where it ends: the full names of an adapter's layers may be
    longer than a piece.
    """
    found: list[Any] = []
    at = _after(text, at, "[")
    while len(found) < MAX_ITEMS:
        item, at = _value(text, at, 0)
        found.append(item)
        at = _after_space(text, at)
        if text.startswith("]", at):
            return found, at + 1
        at = _after(text, at, ",")
    raise json.JSONDecodeError(f"More than {MAX_ITEMS} items", text, at)


def _after(text: str, at: int, mark: str) -> int:
    """Where something follows behind the mark, which must be there."""
    if not text.startswith(mark, at):
        raise json.JSONDecodeError(f"Expecting {mark!r}", text, at)
    return _after_space(text, at + 1)


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()
