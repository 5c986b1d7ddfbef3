"""Shell. Reading adapters. vLLM's way of reading one is recorded once per template, and repeated
for other adapters in a few calls.

The adapters of one training recipe differ in their values only. Their files have the same header,
and each tensor goes to the same place. vLLM works that out again for each adapter, in some thousand
Python calls. For an 8B model these take 100 ms of an interpreter that the step loop needs as well.

A `FileTemplate` says how to read such files: where the tensors lie in the file, which of them are
scaled, and how vLLM arranges them. It is learned from what vLLM itself has made, and kept only if
it yields the same bits. Adapters without a template are read by vLLM each time: those with experts,
with classification heads, with weights that are left out, or with files of several dtypes.
"""

from __future__ import annotations

import json
import math
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights, PackedLoRALayerWeights
from vllm.lora.peft_helper import PEFTHelper
from vllm.utils.torch_utils import PIN_MEMORY

from shared.adapters.strict_json import parse_object
from shared.errors import InvalidAdapter
from worker.engine.vllm.lora.files import brings_base_copies, parsed_config, read_tensors

MAX_TEMPLATES = 16
"""Templates that are remembered. Each costs its header and some hundred bytes per tensor."""
HEADER_BYTES = 16 << 20
ALIGN_BYTES = 512
FILE = "adapter_model.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CONFIG = {f.name for f in fields(PEFTHelper)}

TemplateKey = tuple[bytes, bytes]
"""The header of a file, and the fields of its config that vLLM reads."""


class TracedLoRAModel(LoRAModel):  # type: ignore[misc]
    """What vLLM makes of a file, with the name of the tensor that each weight came from."""

    names: dict[int, str] | None = None  # by address of the weight; None: not traced
    scales: dict[int, float]  # scaling of the B matrices, by address

    @classmethod
    def from_lora_tensors(
        cls,
        *,
        tensors: dict[str, torch.Tensor],
        dtype: torch.dtype,
        peft_helper: PEFTHelper,
        **more: Any,
    ) -> LoRAModel:
        more |= {"dtype": dtype, "peft_helper": peft_helper}
        if peft_helper.modules_to_save:  # their tensors keep their dtype
            return super().from_lora_tensors(tensors=tensors, **more)
        cast = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        made = super().from_lora_tensors(tensors=cast, **more)
        made.names = {tensor.data_ptr(): name for name, tensor in cast.items()}
        made.scales = {
            w.lora_b.data_ptr(): w.scaling for w in made.loras.values() if w.lora_b is not None
        }
        return made

    @classmethod
    def from_local_checkpoint(
        cls,
        lora_dir: str,
        expected_lora_modules: set[str],
        peft_helper: PEFTHelper,
        *,
        moe_ep_spec: Any = None,
        **more: Any,
    ) -> LoRAModel:
        more["peft_helper"] = peft_helper
        file = Path(lora_dir) / FILE
        if file.is_file() and (moe_ep_spec is not None or not brings_base_copies(file)):
            return super().from_local_checkpoint(
                lora_dir, expected_lora_modules, moe_ep_spec=moe_ep_spec, **more
            )
        # vLLM cannot read an adapter of several files, and it reads copies of the base's weights
        # before it leaves them out. What vLLM would check here was checked already.
        return cls.from_lora_tensors(tensors=read_tensors(Path(lora_dir)), **more)


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """One tensor of the block: its first element, and its shape."""

    at: int
    shape: tuple[int, ...]

    def of(self, block: torch.Tensor) -> torch.Tensor:
        """The tensor, as a view of the block."""
        strides = [1]
        for size in reversed(self.shape[1:]):
            strides.append(strides[-1] * size)
        return block.as_strided(self.shape, strides[::-1], self.at)


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """The places of one layer's weights. `a` and `b` have one entry per sub-module if vLLM packs
    several of them into one layer, else a single entry.
    """

    name: str
    a: tuple[TensorPlace | None, ...]
    b: tuple[TensorPlace | None, ...]
    like: LoRALayerWeights = field(compare=False)  # vLLM's own object, without its weights

    def weights(self, block: torch.Tensor) -> LoRALayerWeights:
        """The layer's weights, as views of the block."""
        a, b = ([part and part.of(block) for part in parts] for parts in (self.a, self.b))
        made = copy(self.like)
        made.lora_a, made.lora_b = (
            (a, b) if isinstance(made, PackedLoRALayerWeights) else (a[0], b[0])
        )
        return made


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Where every tensor lies in the block. Adapters share a layout even if they differ in scaling
    or in the dtype of their files.
    """

    elements: int
    layers: tuple[LayerLayout, ...]


EMPTY_LAYOUT = BlockLayout(0, ())


@dataclass(frozen=True, slots=True)
class FileTemplate:
    """How to read files that differ in their values only. The values begin at byte `begin`."""

    rank: int
    begin: int
    stored: torch.dtype
    dtype: torch.dtype
    scaled: dict[float, list[TensorPlace]]
    layout: BlockLayout

    def read(self, file: Path, int_id: int) -> LoRAModel:
        """What vLLM would make of the file. All its weights are in one block, which is pinned if
        the platform can. Raises OSError or RuntimeError.
        """
        elements = self.layout.elements
        block = torch.empty(elements, dtype=self.dtype, pin_memory=PIN_MEMORY)
        if self.stored is self.dtype:
            _fill(block, file, self.begin)
        else:
            values = torch.empty(elements, dtype=self.stored)
            _fill(values, file, self.begin)
            block.copy_(values)
        for scale, parts in self.scaled.items():
            for part in parts:
                part.of(block).mul_(scale)  # _foreach_mul_ would round differently
        made = LoRAModel(
            int_id,
            self.rank,
            {layer.name: layer.weights(block) for layer in self.layout.layers},
        )
        made.layout, made.block = self.layout, block
        return made


def _fill(tensor: torch.Tensor, file: Path, begin: int) -> None:
    """Reads the bytes from `begin` on. A mapping of the file would cost a fault for each of its
    pages, and the process if the file became shorter.
    """
    rest = memoryview(tensor.view(torch.uint8).numpy())
    with file.open("rb", buffering=0) as f:
        f.seek(begin)
        while rest:
            count = f.readinto(rest)
            if not count:
                raise RuntimeError("The file is shorter than its header says.")
            rest = rest[count:]


class FileTemplates:
    """The templates that were used last."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._lock = threading.Lock()
        self._known: OrderedDict[TemplateKey, FileTemplate] = OrderedDict()

    def read(self, folder: Path, int_id: int, load_by_vllm: Callable[[], Any]) -> Any:
        """The LoRAModel of the folder. `load_by_vllm` has vLLM read it, if there is no template.
        Raises OSError and what vLLM raises.
        """
        key, file = template_key(folder), folder / FILE
        known = self._read_by(key, file, int_id)
        if known is not None:
            return known
        made = load_by_vllm()
        template = _template(key, made, self._dtype) if key else None
        if key is not None and template is not None:
            template = self._with_known_layout(template)
            again = template.read(file, int_id)
            if _equal(made, again):
                self._keep(key, template)
                return again
        gather_into_block(made)
        return made

    def read_known(self, folder: Path, int_id: int) -> Any | None:
        """Like `read`, but None if there is no template. Raises OSError or RuntimeError."""
        return self._read_by(template_key(folder), folder / FILE, int_id)

    def _read_by(self, key: TemplateKey | None, file: Path, int_id: int) -> Any | None:
        template = self._find(key) if key else None
        return template.read(file, int_id) if template else None

    def _find(self, key: TemplateKey) -> FileTemplate | None:
        with self._lock:
            template = self._known.get(key)
            if template is not None:
                self._known.move_to_end(key)
            return template

    def _with_known_layout(self, template: FileTemplate) -> FileTemplate:
        """The template, but with the layout object of an equal template. A slot's copies are found
        by the identity of the layout.
        """
        with self._lock:
            known = next(
                (k.layout for k in self._known.values() if k.layout == template.layout),
                template.layout,
            )
        return replace(template, layout=known)

    def _keep(self, key: TemplateKey, template: FileTemplate) -> None:
        with self._lock:
            self._known[key] = template
            if len(self._known) > MAX_TEMPLATES:
                self._known.popitem(last=False)


def template_key(folder: Path) -> TemplateKey | None:
    """The key of the folder. None if only vLLM can read it."""
    try:
        with (folder / FILE).open("rb") as f:
            (size,) = struct.unpack("<Q", f.read(8))
            header = f.read(size) if size <= HEADER_BYTES else b""
        config = parsed_config(folder)
        read = {name: value for name, value in config.items() if name in CONFIG}
        if isinstance(modules := read.get("target_modules"), list):
            read["target_modules"] = sorted(modules)  # PEFT keeps a set and writes it in any order
        return (header, json.dumps(sorted(read.items())).encode()) if len(header) == size else None
    except (OSError, ValueError, TypeError, struct.error, InvalidAdapter):
        return None  # vLLM reports what is wrong with it


def _template(key: TemplateKey, made: Any, dtype: torch.dtype) -> FileTemplate | None:
    names: dict[int, str] | None = getattr(made, "names", None)
    if names is None:
        return None
    header = parse_object(key[0], FILE, "header")  # in pieces: the steps need the interpreter
    header.pop("__metadata__", None)
    stored = {DTYPES.get(tensor["dtype"]) for tensor in header.values()}
    (stored_as,) = stored if len(stored) == 1 else (None,)
    begin = 8 + len(key[0])
    if stored_as is None or begin % stored_as.itemsize:
        return None
    parts = {
        name: TensorPlace(tensor["data_offsets"][0] // stored_as.itemsize, tuple(tensor["shape"]))
        for name, tensor in header.items()
    }
    scaled: dict[float, list[TensorPlace]] = {}
    used = 0

    def found(tensor: torch.Tensor | None) -> TensorPlace | None:
        if tensor is None:
            return None
        nonlocal used
        part = parts[names[tensor.data_ptr()]]
        if part.shape != tuple(tensor.shape):
            raise KeyError
        used += math.prod(part.shape)
        if (scale := made.scales.get(tensor.data_ptr(), 1)) != 1:
            scaled.setdefault(scale, []).append(part)
        return part

    layers = []
    try:
        for name, weights in made.loras.items():
            a, b = (
                tuple(map(found, held if isinstance(held, list) else [held]))
                for held in (weights.lora_a, weights.lora_b)
            )
            like = copy(weights)
            like.lora_a = like.lora_b = None
            layers.append(LayerLayout(name, a, b, like))
    except KeyError:
        return None  # made of several tensors, or of a part of one
    elements = max(tensor["data_offsets"][1] for tensor in header.values()) // stored_as.itemsize
    if used < elements:
        # The block would hold what is left out (copies of the base's embedding) for as long as the
        # adapter stays in host memory.
        return None
    return FileTemplate(
        made.rank, begin, stored_as, dtype, scaled, BlockLayout(elements, tuple(layers))
    )


def _equal(one: Any, other: Any) -> bool:
    first, second = list(tensors(one)), list(tensors(other))
    return len(first) == len(second) and all(
        torch.equal(t, o) for (_, _, t), (_, _, o) in zip(first, second, strict=True)
    )


def tensors(lora: Any) -> Iterator[tuple[Any, int | str, Any]]:
    """Every tensor of a LoRAModel, with where it is kept: (a list, its index, the tensor), or (a
    layer's weights, the attribute's name, the tensor).
    """
    for weights in lora.loras.values():
        for name in ("lora_a", "lora_b"):
            held = getattr(weights, name)
            if isinstance(held, list):
                yield from (
                    (held, i, tensor) for i, tensor in enumerate(held) if tensor is not None
                )
            elif held is not None:
                yield weights, name, held


def gather_into_block(lora: Any) -> None:
    """Moves all weights into one block, pinned if the platform can. An adapter then takes one
    allocation instead of hundreds, and copies from it do not block.
    """
    found = list(tensors(lora))
    sizes = [-(-tensor.nbytes // ALIGN_BYTES) * ALIGN_BYTES for _, _, tensor in found]
    block = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=PIN_MEMORY)
    at = 0
    for (where, key, tensor), size in zip(found, sizes, strict=True):
        view = block[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        view.copy_(tensor)
        if isinstance(key, int):
            where[key] = view
        else:
            setattr(where, key, view)
        at += size


def pin_spare(size_bytes: int) -> None:
    """Pins memory for one more adapter of this size and leaves it to torch, which keeps it for the
    next. To pin 26 MiB takes 15 ms, for which a cold adapter would wait.
    """
    if PIN_MEMORY:
        with suppress(RuntimeError):  # no room: the next one finds out
            torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
