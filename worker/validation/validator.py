"""Shell. Reads an adapter's folder for the checks of shared/adapters/checks.py: names, config, the
weights' header, and every value once.

Blocking: call it in a thread. It neither imports torch nor maps memory, holds one piece of the file
at a time, and leaves the file in the page cache, where the engine's own read then finds it. The
time goes into the scan: 0.4 ms per MiB of bfloat16, 1.4 of float16, 0.2 of float32.
"""

from __future__ import annotations

import io
import math
import os
import stat
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.adapters.base_layers import BaseShapes
from shared.adapters.checks import (
    AdapterFacts,
    AdapterLimits,
    FileKind,
    FolderFile,
    check_change,
    check_files,
    check_index,
    check_norm,
    check_tensors,
)
from shared.adapters.identity import (
    CONFIG_FILE,
    WEIGHTS_INDEX_FILE,
    choose_weights,
    may_be_part,
)
from shared.adapters.peft_config import check_config
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

PACKED = {"qkv_proj": {"q_proj", "k_proj", "v_proj"}, "gate_up_proj": {"gate_proj", "up_proj"}}
PIECE_BYTES = 1 << 19  # half a MiB: the piece and its float32 form stay in a core's cache


class Validator:
    """Checks folders against one base model. `shapes` None skips what needs them; `weights` False
    reads no weights at all.

    Both are for the simulated engine, whose adapters need not hold any. Stateless: threads may
    share one.
    """

    def __init__(
        self,
        shapes: BaseShapes | None,
        max_rank: int,
        limits: AdapterLimits | None = None,
        *,
        weights: bool = True,
        targets: Collection[str] | None = None,
    ) -> None:
        self._targets = None if targets is None else adaptable(targets)
        self._shapes, self._max_rank, self._limits, self._weights = (
            shapes,
            max_rank,
            limits or AdapterLimits(),
            weights,
        )

    def check(self, folder: Path) -> AdapterFacts:
        """Raises InvalidAdapter with the first failure; its message names no path outside the
        folder.
        """
        limits = self._limits
        files = _files(folder)
        size_bytes = check_files(files, limits)
        config = check_config(_read(folder / CONFIG_FILE, limits.max_config_bytes), self._max_rank)
        rank = max([config.rank, *(int(r) for _, r in config.ranks.pairs)])
        if not self._weights:
            return AdapterFacts(rank, size_bytes, ())
        names = choose_weights([f.path for f in files])
        headers = {n: _header(folder / n, limits) for n in names if n != WEIGHTS_INDEX_FILE}
        tensors = [t for header in headers.values() for t in header.tensors]
        if WEIGHTS_INDEX_FILE in names:
            index = _read(folder / WEIGHTS_INDEX_FILE, limits.max_header_bytes)
            check_index(index, {n: [t.name for t in h.tensors] for n, h in headers.items()})
        pairs = check_tensors(tensors, config, self._shapes)
        norms: dict[str, float] = {}
        for name, header in headers.items():
            norms |= _scan(folder / name, header)
        for pair in pairs:
            check_change(pair, norms[pair.a.name], norms[pair.b.name], limits)
        modules = sorted({p.layer.removesuffix(".base_layer").rpartition(".")[2] for p in pairs})
        if self._targets is not None and not self._targets.issuperset(modules):
            beyond = ", ".join(m for m in modules if m not in self._targets)
            raise InvalidAdapter(
                f"The adapter changes {beyond}, which this server leaves out "
                "(engine_kwargs.lora_target_modules).",
                "target_modules",
            )
        return AdapterFacts(rank, size_bytes, tuple(modules))


def adaptable(targets: Collection[str]) -> frozenset[str]:
    """The modules that the engine adapts if told so; of those that it packs into one layer, all or
    none (vllm.lora.utils.is_in_target_modules).
    """
    packed = [
        children
        for parent, children in PACKED.items()
        if parent in targets or not children.isdisjoint(targets)
    ]
    return frozenset(targets).union(*packed)


def _files(folder: Path) -> list[FolderFile]:
    """Those of the folder that say anything of an adapter; links are not followed."""
    inside = os.path.realpath(folder) + os.sep
    with os.scandir(folder) as entries:
        return [
            FolderFile(entry.name, *_size_and_kind(entry, inside))
            for entry in entries
            if may_be_part(entry.name)
        ]


def _size_and_kind(entry: os.DirEntry[str], inside: str) -> tuple[int, FileKind]:
    status = entry.stat(follow_symlinks=False)
    if stat.S_ISREG(status.st_mode):
        return status.st_size, FileKind.PLAIN
    if not stat.S_ISLNK(status.st_mode):
        return 0, FileKind.SPECIAL
    target = os.path.realpath(entry.path)
    if not (target + os.sep).startswith(inside):
        return 0, FileKind.LINK_OUTSIDE
    if not os.path.isfile(target):
        return 0, FileKind.SPECIAL
    return os.path.getsize(target), FileKind.LINK_INSIDE


def _read(path: Path, at_most: int) -> bytes:
    with path.open("rb") as f:
        return f.read(at_most)


@dataclass(frozen=True, slots=True)
class _Header:
    """Of one weights file; the values begin at byte `begin`."""

    begin: int
    tensors: list[Tensor]


def _header(path: Path, limits: AdapterLimits) -> _Header:
    with path.open("rb", buffering=0) as f:
        size = os.fstat(f.fileno()).st_size
        length = header_length(_exactly(f, min(size, LENGTH_BYTES)), size, limits.max_header_bytes)
        begin = LENGTH_BYTES + length
        return _Header(begin, parse_header(_exactly(f, length), size - begin))


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


def _scan(path: Path, header: _Header) -> dict[str, float]:
    """The norm of each tensor, by name. Raises InvalidAdapter: nonfinite, magnitude."""
    import numpy as np  # here: only who reads weights needs it

    piece = bytearray(PIECE_BYTES)
    wide = np.empty(PIECE_BYTES // 2, np.float32)
    norms = {}
    with path.open("rb", buffering=0) as f, np.errstate(all="ignore"):
        f.seek(header.begin)
        for t in header.tensors:
            squares, finite = 0.0, True
            for begin in range(t.begin, t.end, PIECE_BYTES):
                count = min(PIECE_BYTES, t.end - begin)
                _fill(f, memoryview(piece)[:count])
                values = _floats(memoryview(piece)[:count], t.dtype, wide)
                part = float(np.einsum("i,i->", values, values))
                squares += part
                if not math.isfinite(part) and not np.isfinite(values).all():
                    finite = False
                    break
            norms[t.name] = math.sqrt(squares) if squares >= 0 else math.inf
            check_norm(t, norms[t.name], finite)
    return norms


def _floats(raw: memoryview, dtype: str, wide: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The values as float32; of other types in the buffer `wide`."""
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
