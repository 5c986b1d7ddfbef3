"""Shell. Writes large answers as JSON in pieces.

Python's encoder and pydantic's `model_dump` are each one call in C. A thread that makes one keeps
the interpreter until it ends, so two million numbers would stop the event loop for 1.2 s. Here one
such call writes some thousand values, and the loop runs between them. The bytes are those of
`JSONResponse(content=model.model_dump())`.
"""

from __future__ import annotations

import dataclasses
import json
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pydantic import BaseModel

PIECE = 4000
"""The most values of one call, about 3 ms of it. Characters of texts count as a hundredth."""
CHUNK_BYTES = 256 << 10
"""The most that is sent at once of a large answer."""


class Raw:
    """JSON that is written already, as a value of a larger one."""

    def __init__(self, chunks: deque[bytes]) -> None:
        self.chunks = chunks


def encode_list(slices: Iterable[list[Any]]) -> Raw:
    """One list of the items of all slices. No slice is kept, so they are never in memory at
    once.
    """
    chunks, before = deque[bytes](), b"["
    for some in slices:
        if some:
            first, *more = encode(some)
            chunks.append(before + first[1:])
            chunks.extend(more)
            chunks[-1] = chunks[-1][:-1]
            before = b","
    chunks.append(b"]" if chunks else b"[]")
    return Raw(chunks)


def encode(value: Any, **dump: Any) -> deque[bytes]:
    """The JSON of a pydantic model, or of lists and dictionaries in which models may be, in chunks
    of about CHUNK_BYTES. `dump`: the arguments of `model_dump`. Raises ValueError for numbers that
    JSON does not have.
    """
    chunks: deque[bytes] = deque()
    chunk = bytearray()

    def put(piece: bytes) -> None:
        chunk.extend(piece)
        if len(chunk) >= CHUNK_BYTES:
            chunks.append(bytes(chunk))
            chunk.clear()

    _Writer(put, dump).add(value)
    if chunk:
        chunks.append(bytes(chunk))
    return chunks


def give_up(value: Any) -> None:
    """Frees a large value row by row. Nobody else may use its lists. Freeing millions of objects
    with the last reference to all of them is one call, too.
    """
    if isinstance(value, BaseModel):
        value = vars(value)
    slots = value.items() if isinstance(value, dict) else enumerate(value)
    for slot, it in [*slots]:
        if isinstance(it, list | dict | BaseModel):
            if not (isinstance(it, list) and it and type(it[0]) in (float, int)):
                give_up(it)
            value[slot] = None


class _Writer:
    def __init__(self, put: Callable[[bytes], None], dump: dict[str, Any]) -> None:
        self._put, self._dump = put, dump
        encoder = json.JSONEncoder(
            ensure_ascii=False,
            allow_nan=False,
            separators=(",", ":"),
            default=self._dumped,
        )
        self._encode = encoder.encode

    def add(self, value: Any) -> None:
        if _left(value, PIECE) >= 0:
            self._put(self._encode(value).encode())
        elif isinstance(value, Raw):
            for chunk in value.chunks:
                self._put(chunk)
        elif isinstance(value, BaseModel):
            self._members(self._shallow(value))
        elif isinstance(value, dict):
            self._members(value)
        elif isinstance(value, list | tuple):
            self._items(value)
        else:  # one text
            self._put(self._encode(value).encode())

    def _dumped(self, model: Any) -> Any:
        if isinstance(model, BaseModel):
            return BaseModel.model_dump(model, **self._dump)
        if dataclasses.is_dataclass(model) and not isinstance(model, type):
            return vars(model)
        raise TypeError(f"{type(model).__name__} has no JSON")

    def _shallow(self, model: BaseModel) -> dict[str, Any]:
        """The model's members as `model_dump` has them, but large ones as they are."""
        fields = type(model).model_fields
        large = {
            name: it
            for name, it in vars(model).items()
            if _left(it, PIECE) < 0 and name in fields and fields[name].alias is None
        }
        empty: dict[str, Any] = {
            name: [] if isinstance(it, list) else None for name, it in large.items()
        }
        dump = {**self._dump, "warnings": False}
        return BaseModel.model_dump(model.model_copy(update=empty), **dump) | large

    def _members(self, members: dict[Any, Any]) -> None:
        before = b"{"
        for name, value in members.items():
            before += self._encode(str(name)).encode() + b":"
            if _left(value, PIECE) >= 0:  # a name and its value are found in one chunk
                self._put(before + self._encode(value).encode())
            else:
                self._put(before)
                self.add(value)
            before = b","
        self._put(b"{}" if before == b"{" else b"}")

    def _items(self, items: Sequence[Any]) -> None:
        """As many items in one call as make a piece together."""
        first, left, before = 0, PIECE, b"["
        for at, item in enumerate(items):
            left = _left(item, left)
            if left >= 0:
                continue
            if first < at:
                self._run(before, items, first, at)
                before = b","
            first, left = at, _left(item, PIECE)
            if left < 0:
                self._put(before)
                self.add(item)
                first, left, before = at + 1, PIECE, b","
        if first < len(items):
            self._run(before, items, first, len(items))
        self._put(b"]")

    def _run(self, before: bytes, items: Sequence[Any], first: int, end: int) -> None:
        self._put(before + self._encode(items[first:end])[1:-1].encode())


def _left(value: Any, room: int) -> int:
    """What is left of `room` beside the value. Below 0: it is larger. It ends as soon as that is
    known.
    """
    kind = type(value)
    if kind is float or kind is int or value is None or kind is bool:
        return room - 1
    if kind is str:
        return room - 1 - len(value) // 100
    if kind is Raw:
        return -1  # it is put as it is
    if isinstance(value, BaseModel):
        value = vars(value)
    if isinstance(value, dict):
        children: Any = value.values()
        room -= len(value)
    elif isinstance(value, list | tuple):
        children = value
        if value and type(value[0]) in (float, int) and type(value[-1]) in (float, int):
            return room - 1 - len(value)  # numbers, unless they are mixed: a guess is enough
    else:
        return room - 1
    room -= 1
    for child in children:
        if room < 0:
            break
        room = _left(child, room)
    return room
