"""Shell. What vLLM does for every adapter, tensor by tensor, is watched once per kind of adapter and afterwards done again in a few calls.

Adapters of one training recipe differ in their values only: their files have the same header, and each tensor goes to the same place. vLLM finds
that out anew for each of them, in some thousand Python calls, which for an 8B model take 100 ms of an interpreter that the step loop needs as well.
A `Kind` is what there is to know of reading: where the tensors lie in the file, which are scaled, how vLLM arranges them. It is learned
from what vLLM itself has made, and kept only if it gives the same bits. A `Way` is how such a block of weights is spread over the
buffers of one slot: the copies that vLLM was seen to make. Whatever has no kind (experts, classification heads, files of several dtypes) goes vLLM's
way each time.
"""

from __future__ import annotations

import json
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights, PackedLoRALayerWeights
from vllm.lora.peft_helper import PEFTHelper
from vllm.utils.torch_utils import PIN_MEMORY

KINDS = 16
"""That are remembered; each costs its header and some hundred bytes per tensor."""
WAYS = 256
"""That are remembered, one per slot and arrangement; each costs some 800 bytes per tensor."""
HEADER_BYTES = 16 << 20
ALIGN_BYTES = 512
FILE = "adapter_model.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CONFIG = {f.name for f in fields(PEFTHelper)}

Key = tuple[bytes, bytes]
"""A file's header, and those fields of its config that vLLM reads."""


class Watched(LoRAModel):  # type: ignore[misc]
    """What vLLM makes of a file, with the name of the tensor that each weight came from."""

    names: dict[int, str]  # by address
    scales: dict[int, float]  # of B, by address

    @classmethod
    def from_lora_tensors(cls, *, tensors: dict[str, torch.Tensor], dtype: torch.dtype, **more: Any) -> LoRAModel:
        cast = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        made = super().from_lora_tensors(tensors=cast, dtype=dtype, **more)
        made.names = {tensor.data_ptr(): name for name, tensor in cast.items()}
        made.scales = {w.lora_b.data_ptr(): w.scaling for w in made.loras.values() if w.lora_b is not None}
        return made


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor: where it begins in the block, in elements, and its shape."""

    at: int
    shape: tuple[int, ...]

    def of(self, block: torch.Tensor) -> torch.Tensor:
        strides = [1]
        for size in reversed(self.shape[1:]):
            strides.append(strides[-1] * size)
        return block.as_strided(self.shape, strides[::-1], self.at)


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one layer. `a` and `b` have one entry per sub-module if vLLM packs several of them into one, else a single one."""

    name: str
    a: tuple[Part | None, ...]
    b: tuple[Part | None, ...]
    like: LoRALayerWeights = field(compare=False)  # what vLLM made, without its weights

    def weights(self, block: torch.Tensor) -> LoRALayerWeights:
        a, b = ([part and part.of(block) for part in parts] for parts in (self.a, self.b))
        made = copy(self.like)
        made.lora_a, made.lora_b = (a, b) if isinstance(made, PackedLoRALayerWeights) else (a[0], b[0])
        return made


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Where everything is in the block. Adapters that differ in scaling or in the dtype of their files have the same one."""

    elements: int
    layers: tuple[Layer, ...]


@dataclass(frozen=True, slots=True)
class Kind:
    """Adapters whose files differ in their values only; these begin at byte `begin`."""

    rank: int
    begin: int
    stored: torch.dtype
    dtype: torch.dtype
    scaled: dict[float, list[Part]]
    arrangement: Arrangement

    def read(self, file: Path, int_id: int) -> LoRAModel:
        """What vLLM would make of the file, its weights in one block, pinned where that can be. Raises OSError, RuntimeError."""
        elements = self.arrangement.elements
        size = self.begin + elements * self.stored.itemsize
        if file.stat().st_size < size:
            raise RuntimeError("The file is shorter than its header says.")  # to read beyond its end would kill the process
        values = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)[self.begin :].view(self.stored)
        block = torch.empty(elements, dtype=self.dtype, pin_memory=PIN_MEMORY)
        block.copy_(values)
        for scale, parts in self.scaled.items():
            torch._foreach_mul_([part.of(block) for part in parts], scale)
        made = LoRAModel(int_id, self.rank, {layer.name: layer.weights(block) for layer in self.arrangement.layers})
        made.arrangement, made.block = self.arrangement, block
        return made


class Kinds:
    """The kinds seen last."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._lock = threading.Lock()
        self._known: OrderedDict[Key, Kind] = OrderedDict()

    def read(self, folder: Path, int_id: int, theirs: Callable[[], Any]) -> Any:
        """A LoRAModel of the folder; `theirs` has vLLM make it. Raises what vLLM raises, and OSError."""
        key, file = read_key(folder), folder / FILE
        with self._lock:
            kind = self._known.get(key) if key else None
        if kind is not None:
            return kind.read(file, int_id)
        made = theirs()
        kind = _kind(key, made, self._dtype) if key else None
        again = kind and kind.read(file, int_id)
        if key is None or kind is None or again is None or not _same(made, again):
            gather(made)
            return made
        self._keep(key, kind)
        return again

    def _keep(self, key: Key, kind: Kind) -> None:
        with self._lock:
            known = [k.arrangement for k in self._known.values() if k.arrangement == kind.arrangement]
            self._known[key] = replace(kind, arrangement=known[0]) if known else kind
            if len(self._known) > KINDS:
                self._known.popitem(last=False)


def read_key(folder: Path) -> Key | None:
    """None if vLLM has to look at the folder itself."""
    try:
        with (folder / FILE).open("rb") as f:
            (size,) = struct.unpack("<Q", f.read(8))
            header = f.read(size) if size <= HEADER_BYTES else b""
        config = json.loads((folder / "adapter_config.json").read_bytes())
        read = {name: value for name, value in config.items() if name in CONFIG}
        if isinstance(modules := read.get("target_modules"), list):
            read["target_modules"] = sorted(modules)  # a set to PEFT, which writes it in any order
        return (header, json.dumps(read, sort_keys=True).encode()) if len(header) == size else None
    except (OSError, ValueError, AttributeError, TypeError, struct.error):
        return None  # vLLM has words for it


def _kind(key: Key, made: Any, dtype: torch.dtype) -> Kind | None:
    header = json.loads(key[0])
    header.pop("__metadata__", None)
    stored = {DTYPES.get(tensor["dtype"]) for tensor in header.values()}
    (stored_as,) = stored if len(stored) == 1 else (None,)
    begin = 8 + len(key[0])
    if stored_as is None or begin % stored_as.itemsize or made.modules_to_save or not isinstance(made, Watched):
        return None
    parts = {name: Part(tensor["data_offsets"][0] // stored_as.itemsize, tuple(tensor["shape"])) for name, tensor in header.items()}
    scaled: dict[float, list[Part]] = {}

    def found(tensor: torch.Tensor | None) -> Part | None:
        if tensor is None:
            return None
        part = parts[made.names[tensor.data_ptr()]]
        if part.shape != tuple(tensor.shape):
            raise KeyError
        if (scale := made.scales.get(tensor.data_ptr(), 1)) != 1:
            scaled.setdefault(scale, []).append(part)
        return part

    layers = []
    try:
        for name, weights in made.loras.items():
            a, b = (tuple(map(found, held if isinstance(held, list) else [held])) for held in (weights.lora_a, weights.lora_b))
            like = copy(weights)
            like.lora_a = like.lora_b = None
            layers.append(Layer(name, a, b, like))
    except KeyError:
        return None  # made of several tensors, or of a part of one
    elements = max(tensor["data_offsets"][1] for tensor in header.values()) // stored_as.itemsize
    return Kind(made.rank, begin, stored_as, dtype, scaled, Arrangement(elements, tuple(layers)))


def _same(one: Any, other: Any) -> bool:
    theirs, ours = list(tensors(one)), list(tensors(other))
    return len(theirs) == len(ours) and all(torch.equal(t, o) for (_, _, t), (_, _, o) in zip(theirs, ours, strict=True))


def tensors(lora: Any) -> Iterator[tuple[Any, int | str, Any]]:
    """Every tensor of a LoRAModel and where it hangs: (a list, its index) or (a layer's weights, the attribute's name)."""
    for weights in lora.loras.values():
        for name in ("lora_a", "lora_b"):
            held = getattr(weights, name)
            if isinstance(held, list):
                yield from ((held, i, tensor) for i, tensor in enumerate(held) if tensor is not None)
            elif held is not None:
                yield weights, name, held


def gather(lora: Any) -> None:
    """Moves all weights into one block, pinned where that can be: one allocation per adapter instead of hundreds, and copies that do not wait."""
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


# ---- into a slot ------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Way:
    """The block goes to the device in one piece, where `sources` are views of it; they are copied to `targets`, views of the slot's buffers."""

    stage: torch.Tensor
    pairs: tuple[tuple[list[torch.Tensor], list[torch.Tensor]], ...]  # (targets, sources), those that lie densely apart from the others

    def go(self, block: torch.Tensor) -> None:
        self.stage.copy_(block, non_blocking=True)
        for targets, sources in self.pairs:
            torch._foreach_copy_(targets, sources)


class Ways:
    """What lies in each slot, and how to put something of the same arrangement there."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._holds: list[Arrangement | None] = [None] * manager.lora_slots
        self._known: OrderedDict[tuple[int, int], tuple[Arrangement, Way]] = OrderedDict()
        self._stage: torch.Tensor | None = None

    def activate(self, int_id: int) -> None:
        """What vLLM's activate_adapter does. Raises what it raises."""
        manager = self._manager
        if int_id in manager._active_adapters:
            return
        lora = manager.get_adapter(int_id)
        slot = manager.lora_index_to_id.index(None)
        arrangement = getattr(lora, "arrangement", None)
        _, way = self._known.get((id(arrangement), slot), (None, None))
        if way is not None and self._holds[slot] is arrangement:
            manager._active_adapters[int_id] = None
            manager.lora_index_to_id[slot] = int_id
            way.go(lora.block)
            return
        self._holds[slot] = None
        with _Copies() as copies:
            manager.activate_adapter(int_id)
        if arrangement is not None and (way := self._way(copies, lora.block)) is not None:
            self._holds[slot] = arrangement
            self._known[id(arrangement), slot] = arrangement, way  # which keeps the arrangement, so that its id is its own
            if len(self._known) > WAYS:
                self._known.popitem(last=False)

    def _way(self, copies: _Copies, block: torch.Tensor) -> Way | None:
        if copies.other or not copies.made:
            return None
        home, device = block.untyped_storage().data_ptr(), copies.made[0][0].device
        for target, source in copies.made:
            plain = target.shape == source.shape and target.dtype is source.dtype is block.dtype and target.device == device
            if not plain or source.untyped_storage().data_ptr() != home:
                return None
        stage = self._staged(block, device)
        dense: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        spread: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for target, source in copies.made:
            targets, sources = dense if target.is_contiguous() and source.is_contiguous() else spread
            targets.append(target)
            sources.append(stage.as_strided(source.shape, source.stride(), source.storage_offset()))
        return Way(stage[: len(block)], tuple(pair for pair in (dense, spread) if pair[0]))

    def _staged(self, block: torch.Tensor, device: torch.device) -> torch.Tensor:
        """As large as the largest adapter so far; ways keep the smaller one that they were made with."""
        if self._stage is None or len(self._stage) < len(block):
            self._stage = torch.empty(1 << (len(block) - 1).bit_length(), dtype=block.dtype, device=device)
        return self._stage


class _Copies(TorchFunctionMode):  # type: ignore[misc]
    """The copies that are made meanwhile, and whether anything else is written but zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.other = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "copy_":
            self.made.append((args[0], args[1]))
        elif name == "__setitem__":
            self.other |= isinstance(args[2], torch.Tensor) or args[2] != 0
        elif name.endswith("_") and not name.endswith("__") and name != "zero_":
            self.other = True
        return func(*args, **(kwargs or {}))
