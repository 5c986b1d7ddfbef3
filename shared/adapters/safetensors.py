"""Pure. Reads the header of a safetensors file. It is stricter than the format's own library: every
byte of the file must be accounted for.

A file begins with 8 bytes, the length N of the header (little-endian). N bytes of JSON follow:
`{name: {"dtype", "shape", "data_offsets": [begin, end]}}`, with offsets from the end of the header.
The values come last. Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shared.adapters.strict_json import parse_object, shown
from shared.errors import InvalidAdapter

LENGTH_BYTES = 8
METADATA = "__metadata__"
VALUE_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
MAX_DIMENSIONS = 8
MAX_METADATA = 10_000
"""Nobody here reads them, but the engine's library makes objects of all at once, between steps."""
_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a file. `begin` and `end` are bytes from the first value."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def header_length(prefix: bytes, file_bytes: int, max_bytes: int) -> int:
    """The length of the header, from the first 8 bytes of a file. Raises InvalidAdapter if no file
    of this size can begin like that.
    """
    if len(prefix) < LENGTH_BYTES:
        raise _broken(f"the file is cut off: it has {file_bytes} bytes")
    length = int.from_bytes(prefix, "little")
    if length > max_bytes:
        raise _broken(
            f"its header would have {length} bytes, more than {max_bytes}; this is not "
            "a safetensors file or its start is damaged"
        )
    if LENGTH_BYTES + length > file_bytes:
        raise _broken(
            f"the file is cut off: its header has {length} bytes, the whole file {file_bytes}"
        )
    return length


def parse_header(raw: bytes, data_bytes: int) -> list[Tensor]:
    """The tensors, in the order of their values in the file. The values must fill the file without
    a hole or an overlap.

    Raises:
        InvalidAdapter: it is no such header, or its offsets do not fit `data_bytes` of values.
    """
    if not raw.startswith(b"{"):
        raise _broken("its header does not begin with `{`")
    header = parse_object(raw, "the header of the weights file", "header")
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _broken(f"`{METADATA}` must map text to text")
    if len(metadata) > MAX_METADATA:
        raise _broken(f"`{METADATA}` has more than {MAX_METADATA} entries")
    tensors = sorted(
        # the order of their begins; of those that begin together, the empty ones come first
        (_tensor(name, value) for name, value in header.items()),
        key=lambda t: t.begin + t.end,
    )
    at = 0
    for t in tensors:
        if t.begin != at:
            what = (
                "overlaps the one before it"
                if t.begin < at
                else f"leaves a hole of {t.begin - at} bytes before it"
            )
            raise _broken(f"the tensor {shown(t.name)} {what}")
        at = t.end
    if at > data_bytes:
        raise _broken(f"the file is cut off: its tensors need {at} bytes, it has {data_bytes}")
    if at < data_bytes:
        raise _broken(f"{data_bytes - at} bytes at its end belong to no tensor")
    return tensors


def _tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, dict) or value.keys() != _KEYS:
        raise _broken(f"the entry of {shown(name)} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if (
        not isinstance(dtype, str)
        or not _is_sizes(shape)
        or not _is_sizes(offsets)
        or len(offsets) != 2
        or len(shape) > MAX_DIMENSIONS
    ):
        raise _broken(f"the entry of {shown(name)} is malformed")
    if dtype not in VALUE_BYTES:
        raise InvalidAdapter(
            f"The tensor {shown(name)} has the unknown type {shown(dtype)}.", "dtype"
        )
    begin, end = offsets
    need = math.prod(shape) * VALUE_BYTES[dtype]
    if end - begin != need:
        raise _broken(
            f"the tensor {shown(name)} does not fill its offsets: its shape "
            f"{list(shape)} and type {dtype} do not make {end - begin} bytes"
        )
    return Tensor(name, dtype, tuple(shape), begin, end)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in value)


def _broken(what: str) -> InvalidAdapter:
    return InvalidAdapter(f"The weights file is not valid: {what}.", "header")
