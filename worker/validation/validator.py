"""Shell. Reads an adapter's folder for the checks of shared/adapters/checks.py: the names, the
config, the header of the weights, and every value once.

It blocks, so call it in a thread. It neither imports torch nor maps memory, and it holds one piece
of the file at a time. Afterwards the file is in the page cache, where the engine's own read finds
it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import os
import stat
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from itertools import takewhile
from pathlib import Path

from shared.adapters import strict_json
from shared.adapters.base_layers import BaseShapes
from shared.adapters.checks import (
    FLOATS,
    AdapterFacts,
    AdapterLimits,
    FileKind,
    FolderFile,
    LoraPair,
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
    WEIGHTS_FILE,
    WEIGHTS_INDEX_FILE,
    choose_weights,
    may_be_part,
)
from shared.adapters.peft_config import PeftLoraConfig, check_config
from shared.adapters.safetensors import VALUE_BYTES, Tensor
from shared.errors import InvalidAdapter
from shared.stores.transfer import PARTS_PER_ADAPTER, FilePart
from worker.validation.values import (
    KNOWN_HEADER_BYTES,
    KNOWN_RECIPES,
    PIECE_BYTES,
    WeightsFile,
    read_header,
)

PACKED = {"qkv_proj": {"q_proj", "k_proj", "v_proj"}, "gate_up_proj": {"gate_proj", "up_proj"}}
_EMBEDDING = "embed_tokens"
ROUNDING, SMALLEST = 2**-7, 1e-7
"""bfloat16 keeps 8 bits of a value, and float16 nothing below 6e-8."""
BASE_LIMITS = AdapterLimits(max_header_bytes=1 << 28)
# Enough for 8,000 tensors. Each adapter that is being downloaded may hold so much.
EARLY_LIMITS = AdapterLimits(max_header_bytes=1 << 20)
_CODE = sorted(
    path
    for folder in (Path(__file__).parent, Path(strict_json.__file__).parent)
    for path in folder.glob("*.py")
)


class Validator:
    """Checks folders against one base model. Threads may share it.

    `shapes` None skips the checks of shapes, and `weights` False reads no weights at all. Both
    serve the simulated engine, whose adapters need not hold any. `targets` are the modules that the
    engine adapts (None: all). `base` is the folder of the base model's own weights. Copies of them
    that an adapter brings are refused where they cannot be compared. Validators with equal `rules`
    say the same of the same files.
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
        self.rules = self._rules()
        self._known_pairs = lru_cache(KNOWN_RECIPES)(self._pairs)

    def check(self, folder: Path) -> AdapterFacts:
        """The facts of the adapter. Raises InvalidAdapter with the first failure. Its message names
        no path outside the folder.
        """
        return self._check(folder, None)

    def begin(self, folder: Path) -> FolderValidation:
        """The check of a folder whose files may still be on their way."""
        return FolderValidation(self._check, folder / WEIGHTS_FILE, looks=self._weights)

    def _check(self, folder: Path, early: WeightsFile | None) -> AdapterFacts:
        """`early`: what was looked at before the folder was whole."""
        limits = self._limits
        files = _files(folder)
        size_bytes = check_files(files, limits)
        config = check_config(_read(folder / CONFIG_FILE, limits.max_config_bytes), self._max_rank)
        rank = max([config.rank, *(int(r) for _, r in config.ranks.pairs)])
        if not self._weights:
            return AdapterFacts(rank, size_bytes, ())
        found = self._headers(folder, choose_weights([f.path for f in files]), early)
        small = sum(len(file.header) for file in found) <= KNOWN_HEADER_BYTES
        check = self._known_pairs if small else self._pairs
        pairs = check(tuple(t for file in found for t in file.tensors), config)
        self._check_values(found, pairs)
        modules = sorted({p.layer.removesuffix(".base_layer").rpartition(".")[2] for p in pairs})
        if self._targets is not None and not self._targets.issuperset(modules):
            beyond = ", ".join(m for m in modules if m not in self._targets)
            raise InvalidAdapter(
                f"The adapter changes {beyond}, which this server leaves out "
                "(engine_kwargs.lora_target_modules).",
                "target_modules",
            )
        return AdapterFacts(rank, size_bytes, tuple(modules))

    def _rules(self) -> str:
        """A hash of all that the verdict on given files depends on, and of the code itself."""
        shapes, base = self._shapes, self._base
        parts = [
            *(path.read_bytes() for path in _CODE),
            # its version stands for `rename`, which is the model class's
            _version("vllm"),
            (self._max_rank, self._limits, self._weights),
            None if self._targets is None else sorted(self._targets),
            shapes
            and (
                sorted(shapes.modules.items()),
                sorted(shapes.refused.items()),
                sorted(shapes.experts.items()),
                sorted(shapes.embeddings),
                shapes.ignored,
            ),
            base
            and [
                (path.name, path.stat().st_size, path.stat().st_mtime_ns)
                for path in sorted(base.glob("*.safetensors"))
                if path.is_file()
            ],
        ]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _pairs(self, tensors: tuple[Tensor, ...], config: PeftLoraConfig) -> Sequence[LoraPair]:
        return check_tensors(tensors, config, self._shapes)

    def _headers(
        self, folder: Path, names: Sequence[str], early: WeightsFile | None
    ) -> list[WeightsFile]:
        """The files of the weights, with their headers."""
        limits = self._limits
        if WEIGHTS_INDEX_FILE not in names:
            return [read_header(folder / name, limits, known=early) for name in names]
        index = _read(folder / WEIGHTS_INDEX_FILE, limits.max_header_bytes)
        shards: dict[str, WeightsFile] = {}
        for name in indexed_shards(index, names):
            # all headers are held together, and 250 of them would take many times their 4 GiB
            held = sum(len(shard.header) for shard in shards.values())
            left = replace(limits, max_header_bytes=limits.max_header_bytes - held)
            shards[name] = read_header(folder / name, left)
        check_index(index, {n: [t.name for t in shard.tensors] for n, shard in shards.items()})
        return list(shards.values())

    def _check_values(self, files: Collection[WeightsFile], pairs: Sequence[LoraPair]) -> None:
        """A norm is at most the largest magnitude times the root of the number of values. Where
        that bound passes, the norm itself, which costs more, is not needed.
        """
        bounds: dict[str, float] = {}
        file_of: dict[str, WeightsFile] = {}
        for file in files:
            largest = file.largest()
            for t in file.tensors:
                bounds[t.name] = largest[t.name] * math.sqrt(math.prod(t.shape))
                file_of[t.name] = file
                finite = math.isfinite(largest[t.name])
                try:
                    check_norm(t, bounds[t.name], finite)
                except InvalidAdapter:
                    check_norm(t, file.norm(t), finite)
            self._compare_copies(file)
        for pair in pairs:
            a, b = pair.a, pair.b
            try:
                check_change(pair, bounds[a.name], bounds[b.name], self._limits)
            except InvalidAdapter:
                norms = file_of[a.name].norm(a), file_of[b.name].norm(b)
                check_change(pair, *norms, self._limits)

    def _compare_copies(self, file: WeightsFile) -> None:
        """The engine leaves out the base's own weights that an adapter brings, and uses those that
        it has. So they must be the same.
        """
        for copy in file.tensors:
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
            if copy.shape not in [tensor.shape for _, tensor in own]:
                raise InvalidAdapter(
                    f"The adapter brings {module} of the shape {list(copy.shape)}: its base had "
                    "another vocabulary than the one served, which has "
                    f"{list(own[0][1].shape)}.",
                    "shape",
                )
            rows = max(_rows_that_differ((file, copy), o) for o in own if o[1].shape == copy.shape)
            if rows:
                raise InvalidAdapter(
                    f"The adapter brings its own {module}, and {rows} of its {copy.shape[0]} rows "
                    "are not those of the base model served. The engine would use the base's. "
                    "Train with these rows as they are, or serve the changed model as a base.",
                    "embedding",
                )


class FolderValidation:
    """The check of one folder. Values can be looked at as they come; `facts` looks at the others
    and gives the verdict. The parts that are looked at must not change any more.
    """

    def __init__(
        self, check: Callable[[Path, WeightsFile | None], AdapterFacts], weights: Path, looks: bool
    ) -> None:
        self._check, self._path = check, weights
        self._early: WeightsFile | None = None
        self._tries = PARTS_PER_ADAPTER if looks else 0
        self._lock = threading.Lock()

    def look(self, part: FilePart) -> None:
        """Looks at the values of a part that has come; called in a thread. It refuses nothing."""
        if part.file.path != WEIGHTS_FILE:
            return  # shards are looked at afterwards, so that only one header is held
        with suppress(Exception):  # whatever is wrong with it, `facts` finds it again and says so
            early = self._header(part.file.size_bytes)
            if early is not None:
                early.look(part.offset, part.offset + part.size_bytes)

    def facts(self) -> AdapterFacts:
        """The files are complete. The same as `Validator.check`."""
        return self._check(self._path.parent, self._early)

    def _header(self, size_bytes: int) -> WeightsFile | None:
        """The header, if it has come. What is read too early, or changes later, is no harm: `facts`
        compares it with the header of the whole file.
        """
        with self._lock:
            if self._early is None and self._tries:
                self._tries -= 1  # one that is broken is not parsed again for each part
                self._early = read_header(self._path, EARLY_LIMITS, size_bytes)
            return self._early


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


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


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


# ---- copies of the base's weights ----------------------------------------------------------------

_Place = tuple[WeightsFile, Tensor]


def _base_tensors(base: Path, module: str) -> list[_Place]:
    """The base's own weights of the module. A head that the base does not have is its embedding. Of
    several, those whose names have most in common with the module's. Raises OSError.
    """
    places = [
        (file, tensor)
        for path in sorted(base.glob("*.safetensors"))
        for file in _base_headers(path)
        for tensor in file.tensors
        if tensor.dtype in FLOATS
    ]
    *above, last = module.split(".")
    for name in dict.fromkeys((last, _EMBEDDING)):
        wanted = [*above, name]
        found = [p for p in places if f".{p[1].name}".endswith(f".{name}.weight")]
        alike = [_parts_alike(p[1].name.split(".")[:-1], wanted) for p in found]
        if found:
            return [p for p, parts in zip(found, alike, strict=True) if parts == max(alike)]
    return []


def _base_headers(path: Path) -> list[WeightsFile]:
    """None of a file that is gone or no safetensors: that is no adapter's fault."""
    try:
        return [read_header(path, BASE_LIMITS)]
    except (InvalidAdapter, FileNotFoundError):
        return []


def _parts_alike(one: list[str], other: list[str]) -> int:
    """How many last parts two names have in common."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _rows_that_differ(one: _Place, other: _Place) -> int:
    """How many rows of two tensors of one shape differ by more than bfloat16 rounds."""
    import numpy as np

    columns = math.prod(one[1].shape[1:])
    rows = max(1, PIECE_BYTES // 8 // columns)
    pieces = (
        file.pieces(tensor, rows * columns * VALUE_BYTES[tensor.dtype])
        for file, tensor in (one, other)
    )
    count = 0
    with np.errstate(all="ignore"):
        for mine, theirs in zip(*pieces, strict=True):
            far = np.abs(mine - theirs) > np.abs(theirs) * ROUNDING + SMALLEST
            count += int(far.reshape(-1, columns).any(axis=1).sum())
    return count
