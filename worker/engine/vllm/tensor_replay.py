"""Shell. What vLLM does for every adapter, tensor by tensor, is watched once per kind of adapter
and afterwards done again in a few calls.

Adapters of one training recipe differ in their values only: their files have the same header, and
each tensor goes to the same place. vLLM finds that out anew for each of them, in some thousand
Python calls, which for an 8B model take 100 ms of an interpreter that the step loop needs as well.
A `Kind` is what there is to know of reading: where the tensors lie in the file, which are scaled,
how vLLM arranges them. It is learned from what vLLM itself has made, and kept only if it gives the
same bits. `SlotPlace`s are where the parts of such a block go in a slot: the copies that vLLM was
seen to make for the first adapter of its kind; a `CopyPlan` makes them for any slot. Whatever has
no kind (experts, classification heads, files of several dtypes) goes vLLM's way each time.
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

from worker.engine.vllm.lora.files import read_tensors

KINDS = 16
"""That are remembered; each costs its header and some hundred bytes per tensor."""
ARRANGEMENTS = 8
"""Whose places are remembered; each costs some 800 bytes per tensor and slot."""
HEADER_BYTES = 16 << 20
ALIGN_BYTES = 512
FILE = "adapter_model.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CONFIG = {f.name for f in fields(PEFTHelper)}

Key = tuple[bytes, bytes]
"""A file's header, and those fields of its config that vLLM reads."""


class RecordedWrites(LoRAModel):  # type: ignore[misc]
    """What vLLM makes of a file, with the name of the tensor that each weight came from."""

    names: dict[int, str] | None = None  # by address; None: not watched
    scales: dict[int, float]  # of B, by address

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
        if peft_helper.modules_to_save:  # whose tensors keep their dtype
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
        if (Path(lora_dir) / FILE).is_file():
            return super().from_local_checkpoint(
                lora_dir, expected_lora_modules, moe_ep_spec=moe_ep_spec, **more
            )
        # several files, of which vLLM knows nothing; what it expects is checked already
        return cls.from_lora_tensors(tensors=read_tensors(Path(lora_dir)), **more)


@dataclass(frozen=True, slots=True)
class TensorPart:
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
    """The weights of one layer. `a` and `b` have one entry per sub-module if vLLM packs several of
    them into one, else a single one.
    """

    name: str
    a: tuple[TensorPart | None, ...]
    b: tuple[TensorPart | None, ...]
    like: LoRALayerWeights = field(compare=False)  # what vLLM made, without its weights

    def weights(self, block: torch.Tensor) -> LoRALayerWeights:
        a, b = ([part and part.of(block) for part in parts] for parts in (self.a, self.b))
        made = copy(self.like)
        made.lora_a, made.lora_b = (
            (a, b) if isinstance(made, PackedLoRALayerWeights) else (a[0], b[0])
        )
        return made


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Where everything is in the block. Adapters that differ in scaling or in the dtype of their
    files have the same one.
    """

    elements: int
    layers: tuple[Layer, ...]


EMPTY = Arrangement(0, ())


@dataclass(frozen=True, slots=True)
class Kind:
    """Adapters whose files differ in their values only; these begin at byte `begin`."""

    rank: int
    begin: int
    stored: torch.dtype
    dtype: torch.dtype
    scaled: dict[float, list[TensorPart]]
    arrangement: Arrangement

    def read(self, file: Path, int_id: int) -> LoRAModel:
        """What vLLM would make of the file, its weights in one block, pinned where that can be.
        Raises OSError, RuntimeError.
        """
        elements = self.arrangement.elements
        size = self.begin + elements * self.stored.itemsize
        if file.stat().st_size < size:
            # to read beyond its end would kill the process
            raise RuntimeError("The file is shorter than its header says.")
        values = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)[
            self.begin :
        ].view(self.stored)
        block = torch.empty(elements, dtype=self.dtype, pin_memory=PIN_MEMORY)
        block.copy_(values)
        for scale, parts in self.scaled.items():
            for part in parts:
                part.of(block).mul_(scale)  # _foreach_mul_ rounds otherwise
        made = LoRAModel(
            int_id,
            self.rank,
            {layer.name: layer.weights(block) for layer in self.arrangement.layers},
        )
        made.arrangement, made.block = self.arrangement, block
        return made


class Kinds:
    """The kinds seen last."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._lock = threading.Lock()
        self._known: OrderedDict[Key, Kind] = OrderedDict()

    def read(self, folder: Path, int_id: int, theirs: Callable[[], Any]) -> Any:
        """A LoRAModel of the folder; `theirs` has vLLM make it. Raises what vLLM raises, and
        OSError.
        """
        key, file = read_key(folder), folder / FILE
        kind = self._find(key) if key else None
        if kind is not None:
            return kind.read(file, int_id)
        made = theirs()
        kind = _kind(key, made, self._dtype) if key else None
        if key is not None and kind is not None:
            kind = self._sharing(kind)
            again = kind.read(file, int_id)
            if _same(made, again):
                self._keep(key, kind)
                return again
        gather(made)
        return made

    def _find(self, key: Key) -> Kind | None:
        with self._lock:
            kind = self._known.get(key)
            if kind is not None:
                self._known.move_to_end(key)
            return kind

    def _sharing(self, kind: Kind) -> Kind:
        """With the very arrangement of a kind that lies alike: places in slots are known by it."""
        with self._lock:
            known = next(
                (k.arrangement for k in self._known.values() if k.arrangement == kind.arrangement),
                kind.arrangement,
            )
        return replace(kind, arrangement=known)

    def _keep(self, key: Key, kind: Kind) -> None:
        with self._lock:
            self._known[key] = kind
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
        return (header, json.dumps(sorted(read.items())).encode()) if len(header) == size else None
    except (OSError, ValueError, AttributeError, TypeError, struct.error):
        return None  # vLLM has words for it


def _kind(key: Key, made: Any, dtype: torch.dtype) -> Kind | None:
    names: dict[int, str] | None = getattr(made, "names", None)
    if names is None:
        return None
    header = json.loads(key[0])
    header.pop("__metadata__", None)
    stored = {DTYPES.get(tensor["dtype"]) for tensor in header.values()}
    (stored_as,) = stored if len(stored) == 1 else (None,)
    begin = 8 + len(key[0])
    if stored_as is None or begin % stored_as.itemsize:
        return None
    parts = {
        name: TensorPart(tensor["data_offsets"][0] // stored_as.itemsize, tuple(tensor["shape"]))
        for name, tensor in header.items()
    }
    scaled: dict[float, list[TensorPart]] = {}

    def found(tensor: torch.Tensor | None) -> TensorPart | None:
        if tensor is None:
            return None
        part = parts[names[tensor.data_ptr()]]
        if part.shape != tuple(tensor.shape):
            raise KeyError
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
            layers.append(Layer(name, a, b, like))
    except KeyError:
        return None  # made of several tensors, or of a part of one
    elements = max(tensor["data_offsets"][1] for tensor in header.values()) // stored_as.itemsize
    return Kind(made.rank, begin, stored_as, dtype, scaled, Arrangement(elements, tuple(layers)))


def _same(one: Any, other: Any) -> bool:
    theirs, ours = list(tensors(one)), list(tensors(other))
    return len(theirs) == len(ours) and all(
        torch.equal(t, o) for (_, _, t), (_, _, o) in zip(theirs, ours, strict=True)
    )


def tensors(lora: Any) -> Iterator[tuple[Any, int | str, Any]]:
    """Every tensor of a LoRAModel and where it hangs: (a list, its index) or (a layer's weights,
    the attribute's name).
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


def gather(lora: Any) -> None:
    """Moves all weights into one block, pinned where that can be: one allocation per adapter
    instead of hundreds, and copies that do not wait.
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


# ---- into a slot ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SlotPlace:
    """Where a part of the block goes, in whatever slot: which buffer, how far into the slot's row
    of it, as what; and where it lies in the block.
    """

    buffer: int
    at: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    source_strides: tuple[int, ...]
    source_at: int


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """Into one slot: the block goes to the device in one piece, where `sources` are views of it;
    they are copied to `targets`, views of the buffers.
    """

    stage: torch.Tensor
    # (targets, sources), those that lie densely apart from the others
    pairs: tuple[tuple[list[torch.Tensor], list[torch.Tensor]], ...]

    def go(self, block: torch.Tensor) -> None:
        self.stage.copy_(block, non_blocking=True)
        for targets, sources in self.pairs:
            torch._foreach_copy_(targets, sources)


class CopyPlans:
    """What lies in each slot, and how adapters of the same arrangement get there.

    vLLM zeroes every buffer of every module before it writes what the adapter has. Here the slot's
    rows are zeroed in one call, and not at all where the next adapter overwrites exactly what the
    last one wrote.
    """

    def __init__(self, manager: Any) -> None:
        """While all slots are empty."""
        self._manager = manager
        self._holds: list[Arrangement | None] = [None] * manager.lora_slots
        self._known: OrderedDict[int, tuple[Arrangement, list[SlotPlace], dict[int, CopyPlan]]] = (
            OrderedDict()
        )
        self._stage: torch.Tensor | None = None
        self._buffers = _buffers(manager)
        if self._buffers is not None:
            for buffer in self._buffers:
                buffer.zero_()
            for module in manager.modules.values():
                module.reset_lora = _zero_already
            self._holds = [EMPTY] * manager.lora_slots

    def activate(self, int_id: int) -> None:
        """What vLLM's activate_adapter does. Raises what it raises."""
        manager = self._manager
        if int_id in manager._active_adapters:
            return
        lora = manager.get_adapter(int_id)
        slot = manager.lora_index_to_id.index(None)
        arrangement = getattr(lora, "arrangement", None)
        held, self._holds[slot] = self._holds[slot], None
        way = self._way(arrangement, slot)
        if (
            self._buffers is not None
            and held is not EMPTY
            and (way is None or held is not arrangement)
        ):
            torch._foreach_zero_([buffer[slot] for buffer in self._buffers])
        if way is not None:
            manager._active_adapters[int_id] = None
            manager.lora_index_to_id[slot] = int_id
            way.go(lora.block)
        else:
            with _Writes() as writes:
                manager.activate_adapter(int_id)
            if arrangement is not None and (places := self._places(writes, lora.block, slot)):
                self._known[id(arrangement)] = arrangement, places, {}
                if len(self._known) > ARRANGEMENTS:
                    self._known.popitem(last=False)
        self._holds[slot] = arrangement

    def _way(self, arrangement: Arrangement | None, slot: int) -> CopyPlan | None:
        known = self._known.get(id(arrangement))  # which is its own for as long as it is known
        if known is None:
            return None
        self._known.move_to_end(id(arrangement))
        _, places, ways = known
        if slot not in ways:
            try:
                ways[slot] = self._into(places, known[0].elements, slot)
            except torch.OutOfMemoryError:
                return None  # vLLM's way needs no staged copy
        return ways[slot]

    def _into(self, places: list[SlotPlace], elements: int, slot: int) -> CopyPlan:
        assert self._buffers is not None
        stage = self._staged(elements)
        dense: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        spread: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for p in places:
            buffer = self._buffers[p.buffer]
            target = buffer.as_strided(
                p.shape, p.strides, buffer.storage_offset() + slot * buffer.stride(0) + p.at
            )
            source = stage.as_strided(p.shape, p.source_strides, p.source_at)
            targets, sources = (
                dense if target.is_contiguous() and source.is_contiguous() else spread
            )
            targets.append(target)
            sources.append(source)
        return CopyPlan(stage[:elements], tuple(pair for pair in (dense, spread) if pair[0]))

    def _staged(self, elements: int) -> torch.Tensor:
        """As large as the largest adapter so far; ways keep the smaller one that they were made
        with.
        """
        if self._stage is None or len(self._stage) < elements:
            assert self._buffers is not None
            buffer = self._buffers[0]
            self._stage = torch.empty(
                1 << (elements - 1).bit_length(), dtype=buffer.dtype, device=buffer.device
            )
        return self._stage

    def _places(self, writes: _Writes, block: torch.Tensor, slot: int) -> list[SlotPlace] | None:
        """None if that is not all of what happened, or the block not all of what was copied."""
        if self._buffers is None or writes.other or writes.zeroed:
            return None
        number = {buffer.untyped_storage().data_ptr(): n for n, buffer in enumerate(self._buffers)}
        home = block.untyped_storage().data_ptr()
        places = []
        for target, source in writes.copied:
            n = number.get(target.untyped_storage().data_ptr())
            if (
                n is None
                or source.untyped_storage().data_ptr() != home
                or target.shape != source.shape
            ):
                return None
            buffer = self._buffers[n]
            at = target.storage_offset() - buffer.storage_offset() - slot * buffer.stride(0)
            if not 0 <= at < buffer.stride(0) or not target.dtype is source.dtype is block.dtype:
                return None
            places.append(
                SlotPlace(
                    n,
                    at,
                    tuple(target.shape),
                    target.stride(),
                    source.stride(),
                    source.storage_offset(),
                )
            )
        return places


def _buffers(manager: Any) -> list[torch.Tensor] | None:
    """Those whose first dimension is the slot, as vLLM's own reset tells. None if it does more than
    set rows of them to zero.
    """
    with _Writes() as writes:
        for module in manager.modules.values():
            module.reset_lora(0)
    found = [
        buffer
        for buffer, index in writes.zeroed
        if index == 0 and buffer.size(0) == manager.lora_slots
    ]
    own = {buffer.untyped_storage().data_ptr() for buffer in found}
    one = {(buffer.dtype, buffer.device) for buffer in found}
    plain = (
        not writes.other
        and not writes.copied
        and len(own) == len(found) == len(writes.zeroed)
        and len(one) == 1
    )
    return found if plain and not any(manager.lora_index_to_id) else None


def _zero_already(index: int) -> None:
    """In the place of a module's reset_lora."""


class _Writes(TorchFunctionMode):  # type: ignore[misc]
    """What is written to tensors meanwhile: (target, source) of copies, (tensor, index) of what is
    set to zero, and whether there was anything else.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copied: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.zeroed: list[tuple[torch.Tensor, Any]] = []
        self.other = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "copy_":
            self.copied.append((args[0], args[1]))
        elif name == "__setitem__" and isinstance(args[2], int | float) and args[2] == 0:
            self.zeroed.append((args[0], args[1]))
        elif name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
            self.other = True
        return func(*args, **(kwargs or {}))
