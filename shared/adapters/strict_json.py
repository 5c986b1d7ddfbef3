"""Pure. JSON that strangers wrote, read in one way only. A duplicate key is refused, because
parsers differ in which of the two values they use.
"""

from __future__ import annotations

import json
from typing import Any

from shared.errors import InvalidAdapter

SHOWN_CHARACTERS = 120


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
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_once)
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
