"""Shell. Reads the values of a weights file: the largest of each tensor, which takes one look at
its bits, and the norm of one that needs it.

As whole numbers, the bits of floats have the order of their magnitudes, and those of infinity and
NaN are above all others. So no value has to be converted. The look costs 0.1 ms per MiB of any
dtype, half of it for the read; the norm costs 0.2 of bfloat16, 0.9 of float16, 0.1 of float32.
"""

from __future__ import annotations

import io
import math
import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from shared.adapters.checks import FLOATS, AdapterLimits
from shared.adapters.safetensors import (
    LENGTH_BYTES,
    VALUE_BYTES,
    Tensor,
    header_length,
    parse_header,
)
from shared.errors import InvalidAdapter

if TYPE_CHECKING:
    import numpy as np

PIECE_BYTES = 1 << 20  # a piece stays in a core's cache
KNOWN_RECIPES = 16
"""Adapters of one training recipe differ in their values only. What their header and config say is
worked out once, for so many recipes: 5 ms of the interpreter for 256 tensors, which a busy loop
makes 15. A header of KNOWN_HEADER_BYTES takes some 3 MiB as objects.
"""
KNOWN_HEADER_BYTES = 256 << 10


class _Block(NamedTuple):
    """Up to PIECE_BYTES of values of one type. `starts`: where each of its tensors begins in it,
    and the tensor's number. All bytes are counted from the first value of the file.
    """

    begin: int
    end: int
    starts: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """One weights file of `size_bytes`, with its header. The values begin at byte `begin`. `_seen`:
    the largest of each tensor in the blocks that were looked at, by the block's number.
    """

    path: Path
    size_bytes: int
    header: bytes
    tensors: Sequence[Tensor]
    _blocks: Sequence[_Block]
    _seen: dict[int, list[float]] = field(default_factory=dict)

    @property
    def begin(self) -> int:
        return LENGTH_BYTES + len(self.header)

    def look(self, begin: int, end: int) -> None:
        """Looks at the values whose blocks lie wholly between these bytes of the file, and were not
        looked at before. Raises InvalidAdapter if the file became shorter.
        """
        piece = memoryview(bytearray(PIECE_BYTES))
        first = bisect_left(self._blocks, (begin - self.begin,))
        with self.path.open("rb", buffering=0) as f:
            for number, block in enumerate(self._blocks[first:], first):
                if self.begin + block.end > end:
                    return
                if number not in self._seen:
                    raw = piece[: block.end - block.begin]
                    f.seek(self.begin + block.begin)
                    _fill(f, raw)
                    dtype = self.tensors[block.starts[0][1]].dtype
                    starts = [begin - block.begin for begin, _ in block.starts]
                    self._seen[number] = _largest(raw, dtype, starts)

    def largest(self) -> dict[str, float]:
        """The largest magnitude of each tensor as a float32, by name. It is infinite if one of the
        tensor's values is not finite.
        """
        self.look(0, self.size_bytes)
        found = [0.0] * len(self.tensors)
        for number, block in enumerate(self._blocks):
            for (_, tensor), largest in zip(block.starts, self._seen[number], strict=True):
                found[tensor] = max(found[tensor], largest)
        return {t.name: largest for t, largest in zip(self.tensors, found, strict=True)}

    def norm(self, tensor: Tensor) -> float:
        """The root of the sum of squares of all values of the tensor."""
        import numpy as np

        squares = 0.0
        with np.errstate(all="ignore"):
            for values in self.pieces(tensor, PIECE_BYTES):
                squares += float(np.einsum("i,i->", values, values))
        return math.sqrt(squares) if squares >= 0 else math.inf

    def pieces(self, tensor: Tensor, size_bytes: int) -> Iterator[np.ndarray[Any, Any]]:
        """The values of the tensor as float32, so many bytes of the file at a time. Each piece
        takes the place of the one before.
        """
        import numpy as np

        piece = memoryview(bytearray(min(size_bytes, tensor.end - tensor.begin)))
        wide = np.empty(len(piece) // 2, np.float32)
        with self.path.open("rb", buffering=0) as f:
            f.seek(self.begin + tensor.begin)
            for at in range(tensor.begin, tensor.end, size_bytes):
                raw = piece[: tensor.end - at]
                _fill(f, raw)
                yield _floats(raw, tensor.dtype, wide)


def read_header(
    path: Path,
    limits: AdapterLimits,
    size_bytes: int | None = None,
    known: WeightsFile | None = None,
) -> WeightsFile:
    """The file with its header. `size_bytes`: the size that it will have, if it is not whole yet.
    Returns `known` if that is of the same header.

    Raises InvalidAdapter: the file is no safetensors, or has other bytes than it should.
    """
    with path.open("rb", buffering=0) as f:
        size = os.fstat(f.fileno()).st_size if size_bytes is None else size_bytes
        length = header_length(_exactly(f, min(size, LENGTH_BYTES)), size, limits.max_header_bytes)
        header = _exactly(f, length)
    if known is not None and (known.path, known.size_bytes, known.header) == (path, size, header):
        return known
    places = _known_places if length <= KNOWN_HEADER_BYTES else _places
    value_bytes = size - LENGTH_BYTES - length
    return WeightsFile(path, size, header, *places(header, value_bytes, PIECE_BYTES))


def _places(
    header: bytes, value_bytes: int, piece_bytes: int
) -> tuple[Sequence[Tensor], Sequence[_Block]]:
    tensors = parse_header(header, value_bytes)
    return tensors, _blocks_of(tensors, piece_bytes)


_known_places = lru_cache(KNOWN_RECIPES)(_places)


def _blocks_of(tensors: Sequence[Tensor], piece_bytes: int) -> list[_Block]:
    """Of tensors of floats; any other type is refused by its name."""
    blocks: list[_Block] = []
    for number, t in enumerate(tensors):
        for begin in range(t.begin, t.end if t.dtype in FLOATS else t.begin, piece_bytes):
            end = min(begin + piece_bytes, t.end)
            last = blocks[-1] if blocks else None
            if (
                last is None
                or last.end != begin  # a tensor of another type lies between
                or end - last.begin > piece_bytes
                or tensors[last.starts[0][1]].dtype != t.dtype
            ):
                blocks.append(_Block(begin, end, [(begin, number)]))
            else:
                last.starts.append((begin, number))
                blocks[-1] = last._replace(end=end)
    return blocks


def _exactly(f: io.FileIO, count: int) -> bytes:
    data = bytearray(count)
    _fill(f, memoryview(data))
    return bytes(data)


def _fill(f: io.FileIO, into: memoryview) -> None:
    while into:
        count = f.readinto(into)
        if not count:
            raise InvalidAdapter("The weights became shorter while they were read.", "header")
        into = into[count:]


def _largest(raw: memoryview, dtype: str, starts: list[int]) -> list[float]:
    """The largest magnitude from each of `starts` to the next; infinite if a value is not finite.
    As signed numbers the positive values are above all others, as unsigned ones the negative
    values, whose first bit is set. Few calls for many tensors, because each lets other threads have
    the interpreter.
    """
    import numpy as np  # imported here, because only weights need it

    size = VALUE_BYTES[dtype]
    at = [start // size for start in starts]
    signed, unsigned = (
        np.maximum.reduceat(np.frombuffer(raw, f"<{kind}{size}"), at) for kind in "iu"
    )
    magnitude = (1 << (8 * size - 1)) - 1  # all bits but the sign
    bits = np.maximum(signed, (unsigned & magnitude).astype(signed.dtype))
    with np.errstate(all="ignore"):
        values = _floats(memoryview(bits).cast("B"), dtype, np.empty(len(bits), np.float32))
    return np.where(np.isfinite(values), values, np.inf).tolist()  # type: ignore[no-any-return]


def _floats(raw: memoryview, dtype: str, wide: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The values as float32. For other dtypes they are converted into the buffer `wide`."""
    import numpy as np

    if dtype == "F32":
        return np.frombuffer(raw, "<f4")
    out = wide[: len(raw) // VALUE_BYTES[dtype]]
    if dtype == "F64":
        np.copyto(out, np.frombuffer(raw, "<f8"), casting="same_kind")
    elif dtype == "F16":
        np.copyto(out, np.frombuffer(raw, "<f2"))
    else:  # bfloat16 is the upper half of a float32
        bits = out.view(np.uint32)
        np.copyto(bits, np.frombuffer(raw, "<u2"))
        np.left_shift(bits, 16, out=bits)
    return out
