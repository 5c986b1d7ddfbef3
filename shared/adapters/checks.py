"""Pure. What an adapter must be before the engine sees a byte of it: its files, its tensors, the
size of the change it makes.

Each check raises InvalidAdapter with the first failure, worded for the adapter's owner, and a
reason that makes the code (`invalid_adapter_shape`). Its config is checked in
shared/adapters/peft_config.py. vLLM 0.32 by itself loads without a word, and then serves wrong
answers from: tensors too small for their layer, a rank below the config's, other dtypes, unknown
prefixes, layers that do not exist; NaN and infinite values even spoil the answers of other tenants.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from shared.adapters.base_layers import BaseShapes, endings
from shared.adapters.identity import CONFIG_FILE, WEIGHTS_FILE
from shared.adapters.peft_config import PeftLoraConfig
from shared.adapters.safetensors import Tensor
from shared.adapters.strict_json import shown
from shared.errors import InvalidAdapter


@dataclass(frozen=True, slots=True)
class AdapterLimits:
    """`max_change`: bound of the norm of one layer's update, see check_change. A trained adapter's
    is below 100.
    """

    max_files: int = 100
    # rank 512 on all layers of a model of 70 billion parameters is below it
    max_bytes: int = 8 << 30
    max_config_bytes: int = 1 << 20
    max_header_bytes: int = 2 << 20  # about 130 bytes a tensor: room for 16,000
    max_change: float = 1e4


class FileKind(Enum):
    PLAIN = "plain"
    LINK_INSIDE = "link inside the folder"
    LINK_OUTSIDE = "link outside"
    SPECIAL = "special"  # a socket, a pipe, a device, or a link to a folder


@dataclass(frozen=True, slots=True)
class FolderFile:
    """`path` is relative to the adapter's folder."""

    path: str
    size_bytes: int
    kind: FileKind


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What a valid adapter turned out to be. `modules`: the kinds of layer that it changes
    (`q_proj`); empty where only the config was read.
    """

    rank: int
    size_bytes: int
    modules: tuple[str, ...]


# ---- files ---------------------------------------------------------------------------------------

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")


def check_files(files: Sequence[FolderFile], limits: AdapterLimits) -> int:
    """The size of all files together. Raises InvalidAdapter: missing_file, pickle, link,
    too_large.
    """
    if len(files) > limits.max_files:
        raise InvalidAdapter(f"The adapter has more than {limits.max_files} files.", "too_large")
    for f in sorted(files, key=lambda f: f.path):
        if f.kind is FileKind.LINK_OUTSIDE:
            raise InvalidAdapter(
                f"{shown(f.path)} is a link that leads out of the adapter's folder.", "link"
            )
        if f.kind is FileKind.SPECIAL:
            raise InvalidAdapter(
                f"{shown(f.path)} is neither a plain file nor a link to one.", "link"
            )
        if f.path.lower().endswith(_PICKLES):
            raise InvalidAdapter(
                f"{shown(f.path)} is a pickle file, which can run code when it is "
                "read. Save the weights as safetensors and remove it.",
                "pickle",
            )
    total = sum(f.size_bytes for f in files)
    if total > limits.max_bytes:
        raise InvalidAdapter(
            f"The adapter has {total} bytes, more than {limits.max_bytes}.", "too_large"
        )
    sizes = {f.path: f.size_bytes for f in files}
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if name not in sizes:
            raise InvalidAdapter(f"{name} is missing.", "missing_file")
    if sizes[CONFIG_FILE] > limits.max_config_bytes:
        raise InvalidAdapter(
            f"{CONFIG_FILE} has {sizes[CONFIG_FILE]} bytes, more than {limits.max_config_bytes}.",
            "too_large",
        )
    return total


# ---- tensors -------------------------------------------------------------------------------------

_NAME = re.compile(r"base_model\.model\.([A-Za-z0-9_.]{1,300})\.lora_([AB])\.weight\Z")
FLOATS = frozenset({"F32", "F16", "BF16"})
LARGEST_F16 = 65504.0


@dataclass(frozen=True, slots=True)
class Pair:
    """The two tensors of one layer: its weight changes by `scaling` x B x A."""

    module: str
    a: Tensor
    b: Tensor
    scaling: float


def check_tensors(
    tensors: Sequence[Tensor], config: PeftLoraConfig, shapes: BaseShapes | None
) -> list[Pair]:
    """The pairs, in the order of their modules' names.

    Raises:
        InvalidAdapter: empty, tensor, dtype, pair, module, shape, incomplete.
    """
    if not tensors:
        raise InvalidAdapter(f"{WEIGHTS_FILE} holds no tensors.", "empty")
    halves: dict[str, dict[str, Tensor]] = {}
    for t in sorted(tensors, key=lambda t: t.name):
        match = _NAME.match(t.name)
        if match is None:
            raise InvalidAdapter(
                f"The tensor {shown(t.name)} is not LoRA's: "
                "`base_model.model.<module>.lora_A.weight` or `lora_B.weight` is "
                "expected.",
                "tensor",
            )
        if t.dtype not in FLOATS:
            raise InvalidAdapter(
                f"The tensor {shown(t.name)} is of type {t.dtype}; "
                f"{', '.join(sorted(FLOATS))} are served.",
                "dtype",
            )
        halves.setdefault(match[1], {})[match[2]] = t
    pairs = [_pair(module, found, config, shapes) for module, found in halves.items()]
    _check_complete(halves, config, shapes)
    return pairs


def _pair(
    module: str, found: Mapping[str, Tensor], config: PeftLoraConfig, shapes: BaseShapes | None
) -> Pair:
    a, b = found.get("A"), found.get("B")
    if a is None or b is None:
        raise InvalidAdapter(
            f"The layer {shown(module)} has no lora_{'A' if a is None else 'B'}; both are needed.",
            "pair",
        )
    shape = None
    if shapes is not None:
        shape = shapes.modules.get(shapes.canonical(module))
        if shape is None:
            raise InvalidAdapter(
                f"The adapter changes {shown(module)}, which is no linear layer of the base model.",
                "module",
            )
    if config.targets is not None and not any(e in config.targets for e in endings(module)):
        raise InvalidAdapter(
            f"The adapter changes {shown(module)}, which its own `target_modules` does not name.",
            "module",
        )
    rank = config.rank_of(module)
    for tensor, at in ((a, 0), (b, 1)):
        if (
            len(tensor.shape) != 2
            or tensor.shape[at] != rank
            or (shape is not None and tensor.shape[1 - at] != shape[1 - at])
        ):
            size = "?" if shape is None else shape[1 - at]
            wanted = f"[{rank}, {size}]" if at == 0 else f"[{size}, {rank}]"
            raise InvalidAdapter(
                f"The tensor {shown(tensor.name)} has the shape {list(tensor.shape)}; "
                f"rank {rank} on this layer of the base model needs {wanted}.",
                "shape",
            )
    return Pair(module, a, b, config.scaling_of(module))


def _check_complete(
    found: Mapping[str, object], config: PeftLoraConfig, shapes: BaseShapes | None
) -> None:
    """A layer that `target_modules` names but whose tensors are not there: half an adapter, which
    would answer in half a style.
    """
    if shapes is None or config.targets is None or not config.whole:
        return
    present = {shapes.canonical(m) for m in found}
    targets = {shapes.canonical(t) for t in config.targets}
    for module in shapes.modules:
        if module not in present and any(e in targets for e in endings(module)):
            raise InvalidAdapter(
                f"The adapter lacks the layer {shown(module)}, which its `target_modules` names.",
                "incomplete",
            )


# ---- values --------------------------------------------------------------------------------------


def check_norm(tensor: Tensor, norm: float, finite: bool) -> None:
    """`norm`: root of the sum of squares of all values. Raises InvalidAdapter: nonfinite,
    magnitude.
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


def check_change(pair: Pair, norm_a: float, norm_b: float, limits: AdapterLimits) -> None:
    """Refuses finite weights that make infinite activations, which would spoil the KV cache as
    infinite weights do.

    `scaling` x |A| x |B| (Frobenius) bounds what the change can do to a vector. Through the three
    layers of an MLP, and squared by the norm after it, 1e4 stays below the largest float32 and
    bfloat16 for the usual sizes; float16 engines overflow sooner, as they do without adapters.
    Raises InvalidAdapter: magnitude.
    """
    change = pair.scaling * norm_a * norm_b
    if not (change <= limits.max_change and pair.scaling * norm_b <= LARGEST_F16):
        raise InvalidAdapter(
            f"The change to {shown(pair.module)} has a norm of up to {change:.3g}, "
            f"more than {limits.max_change:g}: "
            "its values or `lora_alpha` are broken.",
            "magnitude",
        )
