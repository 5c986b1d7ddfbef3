"""Pure. What an adapter must be before the engine reads it: its files, its tensors, and the size of
the change that it makes.

Each check raises InvalidAdapter with the first failure. The message is written for the adapter's
owner, and the reason becomes the error's code (`invalid_adapter_shape`). The config is checked in
shared/adapters/peft_config.py.

vLLM 0.32 by itself loads bad adapters silently and then serves wrong answers. It accepts tensors
that are too small for their layer, a rank below the config's, other dtypes, unknown prefixes, and
layers that do not exist. NaN and infinite values even spoil the answers of other tenants.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from shared.adapters.base_layers import BaseShapes
from shared.adapters.identity import (
    CONFIG_FILE,
    PICKLED_WEIGHTS,
    WEIGHTS_FILE,
    WEIGHTS_INDEX_FILE,
    choose_weights,
    has_all_weights,
)
from shared.adapters.peft_config import EMBEDDING, HEAD, PeftLoraConfig
from shared.adapters.safetensors import Tensor
from shared.adapters.strict_json import parse_object, shown
from shared.errors import InvalidAdapter


@dataclass(frozen=True, slots=True)
class AdapterLimits:
    """Bounds for one adapter. `max_change` bounds the norm of one layer's update (see
    check_change); a trained adapter's is below 100.
    """

    # an adapter of rank 512 on all layers of a 70-billion-parameter model fits
    max_bytes: int = 8 << 30
    max_config_bytes: int = 1 << 20
    # of all files together; about 130 bytes per tensor: enough for every one of 256 experts
    max_header_bytes: int = 16 << 20
    max_change: float = 1e4


class FileKind(Enum):
    PLAIN = "plain"
    LINK_INSIDE = "link inside the folder"
    LINK_OUTSIDE = "link outside"
    SPECIAL = "special"  # a socket, a pipe, a device, or a link to a folder


@dataclass(frozen=True, slots=True)
class FolderFile:
    """One file of an adapter's folder. `path` is relative to that folder."""

    path: str
    size_bytes: int
    kind: FileKind


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What a check has found out of a valid adapter. `modules`: the kinds of layers that it changes
    (`q_proj`); empty if only the config was read.
    """

    rank: int
    size_bytes: int
    modules: tuple[str, ...]


# ---- files ---------------------------------------------------------------------------------------


def check_files(files: Sequence[FolderFile], limits: AdapterLimits) -> int:
    """Returns the size in bytes of the config and the weights together. Other files are ignored.
    Raises InvalidAdapter (missing_file, incomplete, pickle, link, too_large).
    """
    by_name = {f.path: f for f in files}
    if CONFIG_FILE not in by_name:
        raise InvalidAdapter(f"{CONFIG_FILE} is missing.", "missing_file")
    weights = choose_weights(by_name)
    if not weights:
        _refuse_pickles(by_name)
        raise InvalidAdapter(f"{WEIGHTS_FILE} is missing.", "missing_file")
    if not has_all_weights(by_name):
        raise InvalidAdapter(
            "Some of the files that the weights are in are missing: the upload is not complete.",
            "incomplete",
        )
    read = [by_name[name] for name in (CONFIG_FILE, *weights)]
    for f in read:
        if f.kind is FileKind.LINK_OUTSIDE:
            raise InvalidAdapter(
                f"{shown(f.path)} is a link that leads out of the adapter's folder.", "link"
            )
        if f.kind is FileKind.SPECIAL:
            raise InvalidAdapter(
                f"{shown(f.path)} is neither a plain file nor a link to one.", "link"
            )
    return check_sizes({f.path: f.size_bytes for f in read}, limits)


def check_sizes(sizes: Mapping[str, int], limits: AdapterLimits) -> int:
    """Returns the sum. `sizes`: file -> bytes, in a folder or as a store lists it. Raises
    InvalidAdapter (too_large).
    """
    for path, size in sizes.items():
        limit = (
            limits.max_config_bytes
            if path == CONFIG_FILE
            else limits.max_header_bytes
            if path == WEIGHTS_INDEX_FILE
            else limits.max_bytes
        )
        if size > limit:
            raise InvalidAdapter(f"{shown(path)} has {size} bytes, more than {limit}.", "too_large")
    total = sum(sizes.values())
    if total > limits.max_bytes:
        raise InvalidAdapter(
            f"The adapter has {total} bytes, more than {limits.max_bytes}.", "too_large"
        )
    return total


def indexed_shards(raw: bytes, names: Sequence[str]) -> list[str]:
    """Those files of `names` that the index names. Others are left from an earlier upload with
    another number of shards. Raises InvalidAdapter (config, incomplete).
    """
    wanted = {file for file in _weight_map(raw).values() if isinstance(file, str)}
    return [name for name in names if name in wanted]


def check_index(raw: bytes, found: Mapping[str, Sequence[str]]) -> None:
    """Every tensor that the index names must be in the file that it names, and in no other.
    `found`: file -> the names of its tensors. Raises InvalidAdapter (config, incomplete).
    """
    where = _weight_map(raw)
    held = {(name, file) for file, names in found.items() for name in names}
    for name, file in where.items():
        if not isinstance(file, str) or (name, file) not in held:
            raise InvalidAdapter(
                f"{shown(name)} should be in {shown(file)} and is not there: the upload is not "
                "complete, or the index is of another one.",
                "incomplete",
            )
    if len(held) != len(where):
        raise InvalidAdapter(
            f"The files hold {len(held)} tensors, {WEIGHTS_INDEX_FILE} names {len(where)}.",
            "incomplete",
        )


def _weight_map(raw: bytes) -> dict[str, object]:
    index = parse_object(raw, WEIGHTS_INDEX_FILE, "config", if_cut="incomplete")
    where = index.get("weight_map")
    if not isinstance(where, dict):
        raise InvalidAdapter(f"{WEIGHTS_INDEX_FILE} has no `weight_map`.", "config")
    return where


def _refuse_pickles(names: Collection[str]) -> None:
    for name in PICKLED_WEIGHTS:
        if name in names:
            raise InvalidAdapter(
                f"The weights are a pickle ({name}), which can run code when it is read. "
                "`loraplex adapters convert FOLDER` makes safetensors of them without running any.",
                "pickle",
            )


# ---- tensors -------------------------------------------------------------------------------------

_NAME = re.compile(
    r"base_model\.model\.([A-Za-z0-9_.]{1,300})\.lora_(?:([AB])\.weight|embedding_([AB]))\Z"
)
# PEFT saves the base's own embedding beside an adapter of it (`base_layer`), or beside any adapter
# (`save_embedding_layers=True`). The engine leaves that copy out.
_BASE_COPY = re.compile(
    r"base_model\.model\.((?:[A-Za-z0-9_]+\.){0,8}(?:embed_tokens|lm_head))"
    r"(?:\.base_layer)?\.weight\Z"
)
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
LARGEST_F16 = 65504.0
MAX_NAMED = 3  # layers that one message names
MAX_BASE_COPIES = 4
"""The embedding and the head, perhaps under two names. Each is compared with the base's, row by
row.
"""


@dataclass(frozen=True, slots=True)
class LoraPair:
    """The two tensors of one layer, whose weight changes by `scaling` x B x A. `layer` is the
    engine's name for `module`.
    """

    module: str
    layer: str
    a: Tensor
    b: Tensor
    scaling: float


def check_tensors(
    tensors: Sequence[Tensor], config: PeftLoraConfig, shapes: BaseShapes | None
) -> list[LoraPair]:
    """The pairs of A and B in the order of their modules' names. The engine applies exactly these.

    Raises:
        InvalidAdapter: empty, tensor, dtype, pair, module, pattern, shape, experts.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    copies = 0
    for t in sorted(tensors, key=lambda t: t.name):
        if t.dtype not in FLOATS:
            raise InvalidAdapter(
                f"The tensor {shown(t.name)} is of type {t.dtype}; "
                f"{', '.join(sorted(FLOATS))} are served.",
                "dtype",
            )
        copied = base_copy_of(t)
        if copied is not None:
            _check_copy(t, copied, shapes)
            copies += 1
            continue
        match = _NAME.match(t.name)
        if match is None:
            raise InvalidAdapter(
                f"The tensor {shown(t.name)} is not LoRA's: "
                "`base_model.model.<module>.lora_A.weight` or `lora_B.weight` is "
                "expected.",
                "tensor",
            )
        if shapes is None or not shapes.ignores(match[1]):
            embedding = "" if match[2] else "embedding_"
            halves.setdefault(match[1], {})[embedding + (match[2] or match[3])] = t
    if copies > MAX_BASE_COPIES:
        raise InvalidAdapter(
            f"The adapter brings {copies} copies of the base's embedding or head; there are at "
            f"most {MAX_BASE_COPIES}.",
            "embedding",
        )
    if not halves:
        raise InvalidAdapter(f"{WEIGHTS_FILE} holds no tensors.", "empty")
    if config.tied:
        _check_tied(halves)
    if shapes is not None:
        _check_layers(halves, shapes)
    return [_pair(module, found, config, shapes) for module, found in halves.items()]


def base_copy_of(tensor: Tensor) -> str | None:
    """The module of which the adapter brings the base's own weight. None: the tensor is no copy."""
    found = _BASE_COPY.match(tensor.name)
    return None if found is None else found[1]


def _check_copy(tensor: Tensor, module: str, shapes: BaseShapes | None) -> None:
    shape = None if shapes is None else shapes.modules.get(shapes.rename(module))
    if shape is not None and sorted(tensor.shape) != sorted(shape):
        raise InvalidAdapter(
            f"The adapter brings {shown(module)} of the shape {list(tensor.shape)}: its base had "
            f"another vocabulary than the one served, which has {list(shape)}.",
            "shape",
        )


def _check_tied(modules: Collection[str]) -> None:
    """On a base whose head is its embedding, PEFT gives both the one adapter (and saves it for
    both). The engine applies what is there.
    """
    found = {module.rpartition(".")[2] for module in modules} & {HEAD, EMBEDDING}
    if len(found) == 1:
        raise InvalidAdapter(
            f"By its config (`ensure_weight_tying`) the adapter changes {shown(EMBEDDING)} and "
            f"{shown(HEAD)} alike, and it has weights only for {shown(found.pop())}.",
            "pair",
        )


def _check_layers(modules: Collection[str], shapes: BaseShapes) -> None:
    """Every layer must be one that the engine adapts, because it silently leaves out the others."""
    missing = []
    at: dict[str, str] = {}
    for module in modules:
        layer = shapes.rename(module)
        if layer in shapes.refused:
            raise InvalidAdapter(
                f"The adapter changes {shown(module)}. {shapes.refused[layer]}", "module"
            )
        if layer not in shapes.modules:
            missing.append(module)
        elif layer in at:
            raise InvalidAdapter(
                f"{shown(at[layer])} and {shown(module)} are two names of one layer.", "module"
            )
        at[layer] = module
    if missing:
        more = f" and {len(missing) - MAX_NAMED} more" if len(missing) > MAX_NAMED else ""
        raise InvalidAdapter(
            f"The adapter changes {', '.join(map(shown, missing[:MAX_NAMED]))}{more} "
            f"({len(missing)} of its {len(modules)} layers), for which the engine has no LoRA "
            "layer in this base model; it would leave them out.",
            "module",
        )
    for layer in at:
        other = layer.removesuffix(".base_layer")
        pair = layer + ".base_layer" if other == layer else other
        if layer in shapes.experts and pair in shapes.modules and pair not in at:
            raise InvalidAdapter(
                f"The adapter changes only one of the two weights of the experts in "
                f"{shown(at[layer])}; the engine serves gate_up_proj and down_proj together.",
                "experts",
            )


def _pair(
    module: str, found: Mapping[str, Tensor], config: PeftLoraConfig, shapes: BaseShapes | None
) -> LoraPair:
    layer = module if shapes is None else shapes.rename(module)
    embedding = (
        any(half.startswith("embedding") for half in found)
        if shapes is None
        else layer in shapes.embeddings
    )
    begin = "embedding_" if embedding else ""
    a, b = found.get(begin + "A"), found.get(begin + "B")
    if a is None or b is None or len(found) != 2:
        missing = "B" if b is None else "A" if a is None else ""
        raise InvalidAdapter(
            f"The layer {shown(module)} has no lora_{begin}{missing}; both are needed."
            if missing
            else f"The layer {shown(module)} has tensors of two kinds.",
            "pair",
        )
    if not config.covers(module):
        raise InvalidAdapter(
            f"The adapter changes {shown(module)}, which its own config leaves out "
            "(`target_modules`, `exclude_modules`, `layers_to_transform`), as PEFT would.",
            "module",
        )
    if not config.is_read_alike(module):
        raise InvalidAdapter(
            f"For {shown(module)}, which is adapted as a parameter (`target_parameters`), "
            "`rank_pattern` or `alpha_pattern` say one thing to PEFT and another to the engine.",
            "pattern",
        )
    shape = None if shapes is None else shapes.modules[layer]
    experts = 1 if shapes is None else shapes.experts.get(layer, 1)
    rank = config.rank_of(module)
    for tensor, at in ((a, 0), (b, 1)):
        if (
            len(tensor.shape) != 2
            or tensor.shape[at] != rank * experts
            or (shape is not None and tensor.shape[1 - at] != shape[1 - at])
        ):
            size: object = "?" if shape is None else shape[1 - at]
            lows = rank if experts == 1 else f"{rank} x {experts} experts"
            wanted = f"[{lows}, {size}]" if at == 0 else f"[{size}, {lows}]"
            raise InvalidAdapter(
                f"The tensor {shown(tensor.name)} has the shape {list(tensor.shape)}; "
                f"rank {rank} on this layer of the base model needs {wanted}.",
                "shape",
            )
    return LoraPair(module, layer, a, b, config.scaling_of(module))


# ---- values --------------------------------------------------------------------------------------


def check_norm(tensor: Tensor, norm: float, finite: bool) -> None:
    """`norm` is the root of the sum of squares of all values. Raises InvalidAdapter (nonfinite,
    magnitude).
    """
    if not finite:
        raise InvalidAdapter(
            f"The tensor {shown(tensor.name)} holds NaN or infinite values.", "nonfinite"
        )
    if not norm <= LARGEST_F16:
        raise InvalidAdapter(
            f"The values of the tensor {shown(tensor.name)} are beyond all measure "
            f"(norm {norm:.3g}).",
            "magnitude",
        )


def check_change(pair: LoraPair, norm_a: float, norm_b: float, limits: AdapterLimits) -> None:
    """Refuses finite weights that lead to infinite activations. These would spoil the KV cache, as
    infinite weights do.

    `scaling` x |A| x |B| (Frobenius) bounds what the change can do to a vector. The vector goes
    through the three layers of an MLP, and the norm after them squares it. With 1e4 it stays below
    the largest float32 and bfloat16 for the usual sizes. Engines in float16 overflow sooner, as
    they do without adapters. Raises InvalidAdapter (magnitude).
    """
    change = pair.scaling * norm_a * norm_b
    if not (change <= limits.max_change and pair.scaling * norm_b <= LARGEST_F16):
        raise InvalidAdapter(
            f"The change to {shown(pair.module)} has a norm of up to {change:.3g}, "
            f"more than {limits.max_change:g}: "
            "its values or `lora_alpha` are broken.",
            "magnitude",
        )
