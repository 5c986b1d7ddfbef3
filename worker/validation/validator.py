"""Shell. Reads an adapter's folder for the checks of shared/adapters/checks.py: the names, the
config, the header of the weights, and every value once.

It blocks, so call it in a thread. It neither imports torch nor maps memory, and it holds one piece
of the file at a time. Afterwards the file is in the page cache, where the engine's own read finds
it. The scan takes most of the time: 0.4 ms per MiB of bfloat16, 1.4 of float16, 0.2 of float32.
"""

from __future__ import annotations

import io
import math
import os
import stat
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.adapters.base_layers import BaseShapes
from shared.adapters.checks import (
    FLOATS,
    AdapterFacts,
    AdapterLimits,
    FileKind,
    FolderFile,
    base_copy_of,
    check_change,
    check_files,
    check_index,
    check_norm,
    check_tensors,
    indexed_shards,
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
_EMBEDDING = "embed_tokens"
ROUNDING, SMALLEST = 2**-7, 1e-7
"""bfloat16 keeps 8 bits of a value, and float16 nothing below 6e-8."""
BASE_LIMITS = AdapterLimits(max_header_bytes=1 << 28)
PIECE_BYTES = 1 << 19  # half a MiB: the piece and its float32 form stay in a core's cache


class Validator:
    """Checks folders against one base model. It has no state, so threads may share it.

    `shapes` None skips the checks of shapes, and `weights` False reads no weights at all. Both
    serve the simulated engine, whose adapters need not hold any. `targets` are the modules that the
    engine adapts (None: all). `base` is the folder of the base model's own weights. Copies of them
    that an adapter brings are refused where they cannot be compared.
    """

    def __init__(
        self,
        shapes: BaseShapes | None,
        max_rank: int,
        limits: AdapterLimits | None = None,
        *,
        weights: bool = True,
        targets: Collection[str] | None = None,
        base: Path | None = None,
    ) -> None:
        self._base = base
        self._targets = None if targets is None else adaptable(targets)
        self._shapes, self._max_rank, self._limits, self._weights = (
            shapes,
            max_rank,
            limits or AdapterLimits(),
            weights,
        )

    def check(self, folder: Path) -> AdapterFacts:
        """The facts of the adapter. Raises InvalidAdapter with the first failure. Its message names
        no path outside the folder.
        """
        limits = self._limits
        files = _files(folder)
        size_bytes = check_files(files, limits)
        config = check_config(_read(folder / CONFIG_FILE, limits.max_config_bytes), self._max_rank)
        rank = max([config.rank, *(int(r) for _, r in config.ranks.pairs)])
        if not self._weights:
            return AdapterFacts(rank, size_bytes, ())
        headers = self._headers(folder, choose_weights([f.path for f in files]))
        tensors = [t for header in headers.values() for t in header.tensors]
        pairs = check_tensors(tensors, config, self._shapes)
        norms: dict[str, float] = {}
        for name, header in headers.items():
            norms |= _scan(folder / name, header)
            self._compare_copies(folder / name, header)
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

    def _headers(self, folder: Path, names: Sequence[str]) -> dict[str, _Header]:
        """The headers of the weights, by file."""
        limits = self._limits
        if WEIGHTS_INDEX_FILE not in names:
            return {name: _header(folder / name, limits) for name in names}
        index = _read(folder / WEIGHTS_INDEX_FILE, limits.max_header_bytes)
        headers = {n: _header(folder / n, limits) for n in indexed_shards(index, names)}
        check_index(index, {n: [t.name for t in h.tensors] for n, h in headers.items()})
        return headers

    def _compare_copies(self, path: Path, header: _Header) -> None:
        """The engine leaves out the base's own weights that an adapter brings, and uses those that
        it has. So they must be the same.
        """
        for copy in header.tensors:
            module = base_copy_of(copy)
            if module is None:
                continue
            own = [] if self._base is None else _base_tensors(self._base, module)
            if not own:
                raise InvalidAdapter(
                    f"The adapter brings its own {module}, and its base has no weights here to "
                    "compare them with. The engine would use the base's. Save the adapter with "
                    "PEFT's `save_embedding_layers=False`.",
                    "embedding",
                )
            if copy.shape not in [place[2].shape for place in own]:
                raise InvalidAdapter(
                    f"The adapter brings {module} of the shape {list(copy.shape)}: its base had "
                    "another vocabulary than the one served, which has "
                    f"{list(own[0][2].shape)}.",
                    "shape",
                )
            here = (path, header.begin, copy)
            rows = max(_rows_that_differ(here, o) for o in own if o[2].shape == copy.shape)
            if rows:
                raise InvalidAdapter(
                    f"The adapter brings its own {module}, and {rows} of its {copy.shape[0]} rows "
                    "are not those of the base model served. The engine would use the base's. "
                    "Train with these rows as they are, or serve the changed model as a base.",
                    "embedding",
                )


def adaptable(targets: Collection[str]) -> frozenset[str]:
    """The modules that the engine adapts if it is given these targets. Of modules that it packs
    into one layer, it adapts all or none (vllm.lora.utils.is_in_target_modules).
    """
    packed = [
        children
        for parent, children in PACKED.items()
        if parent in targets or not children.isdisjoint(targets)
    ]
    return frozenset(targets).union(*packed)


def _files(folder: Path) -> list[FolderFile]:
    """The files of the folder that belong to an adapter. Links are not followed."""
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
    """The header of one weights file. The values begin at byte `begin`."""

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
    """The norm of each tensor, by name. Raises InvalidAdapter (nonfinite, magnitude)."""
    import numpy as np  # imported here, because only weights need it

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


# ---- copies of the base's weights ----------------------------------------------------------------

_Place = tuple[Path, int, Tensor]  # a file, where its values begin, and one of its tensors


def _base_tensors(base: Path, module: str) -> list[_Place]:
    """The base's own weights of the module. A head that the base does not have is its embedding. Of
    several, those whose names have most in common with the module's. Raises OSError.
    """
    places = [
        (file, header.begin, tensor)
        for file in sorted(base.glob("*.safetensors"))
        for header in _base_headers(file)
        for tensor in header.tensors
        if tensor.dtype in FLOATS
    ]
    *above, last = module.split(".")
    for name in dict.fromkeys((last, _EMBEDDING)):
        wanted = [*above, name]
        found = [p for p in places if f".{p[2].name}".endswith(f".{name}.weight")]
        alike = [_parts_alike(p[2].name.split(".")[:-1], wanted) for p in found]
        if found:
            return [p for p, parts in zip(found, alike, strict=True) if parts == max(alike)]
    return []


def _base_headers(file: Path) -> list[_Header]:
    """None of a file that is gone or no safetensors: that is no adapter's fault."""
    try:
        return [_header(file, BASE_LIMITS)]
    except (InvalidAdapter, FileNotFoundError):
        return []


def _parts_alike(one: list[str], other: list[str]) -> int:
    """How many last parts two names have in common."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _rows_that_differ(one: _Place, other: _Place) -> int:
    """How many rows of two tensors of one shape differ by more than bfloat16 rounds."""
    import numpy as np

    columns = math.prod(one[2].shape[1:])
    at_once = max(1, PIECE_BYTES // 8 // columns)
    count = 0
    with np.errstate(all="ignore"):
        for mine, theirs in zip(_pieces(one, at_once), _pieces(other, at_once), strict=True):
            far = np.abs(mine - theirs) > np.abs(theirs) * ROUNDING + SMALLEST
            count += int(far.reshape(-1, columns).any(axis=1).sum())
    return count


def _pieces(place: _Place, rows: int) -> Iterator[np.ndarray[Any, Any]]:
    """The values as float32, so many rows at a time."""
    import numpy as np

    path, begin, tensor = place
    size = rows * math.prod(tensor.shape[1:]) * VALUE_BYTES[tensor.dtype]
    with path.open("rb", buffering=0) as f:
        f.seek(begin + tensor.begin)
        for at in range(tensor.begin, tensor.end, size):
            raw = _exactly(f, min(size, tensor.end - at))
            yield _floats(memoryview(raw), tensor.dtype, np.empty(len(raw) // 2, np.float32))
