"""Shell. What Loraplex adds to vLLM's worker class (`worker_extension_cls`). The front end calls it
by name on every rank, between engine steps.

vLLM can only load an adapter into a slot or remove it altogether (add_lora, remove_lora). It takes
one adapter per call, and reads and pins it inside the step loop: 60 ms for 26 MiB. Here a thread of
the same process does all of that beforehand (`loraplex_prepare`). One call between two steps then
takes what is prepared (`loraplex_swap`). The state stays vLLM's own: its two caches, its table of
slots, and its modules' buffers.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from worker.engine.vllm import patches

# vLLM imports this module in every worker, before the model. Its plugin hook would need the project
# to be installed.
patches.apply()

from worker.engine.vllm.adapters.prepare_link import (  # noqa: E402
    Drop,
    RankLink,
    Request,
    rank_link,
)
from worker.engine.vllm.lora import layers as lora_layers  # noqa: E402
from worker.engine.vllm.lora.files import has_fused_experts  # noqa: E402
from worker.engine.vllm.tensor_replay.file_templates import (  # noqa: E402
    FileTemplates,
    TracedLoRAModel,
    gather_into_block,
    pin_spare,
    tensors,
)
from worker.engine.vllm.tensor_replay.slot_writer import SlotWriter  # noqa: E402

STAGED_BYTES = 4 << 30
"""Size of the prepared adapters that no slot has taken yet. A further adapter is read inside the
swap, which stalls the engine but needs no memory before.
"""
SWITCH_S = 0.0005
"""How long the preparing thread may keep the interpreter from the step loop. Python's default of 5
ms is a third of a step.
"""


class AdapterSlots:
    """Mixed into vLLM's worker class. The thread that runs the steps calls it."""

    model_runner: Any

    def loraplex_prepare(
        self, start: list[tuple[str, int, str, bool]], watch: list[int], drop: Sequence[int] = ()
    ) -> list[str | None]:
        """Starts to prepare adapters, and returns at once. Each is a (name, int id, folder, whether
        it was checked). One that was not is read if its header is known, so only values differ.
        Those of `drop` are not wanted any more.

        Returns one entry per id in `watch`: None while the adapter is being prepared, "" once it is
        ready, else the reason why it cannot be loaded.
        """
        staging = self._loraplex().staging
        for int_id in drop:
            staging.drop(int_id)
        for request in start:
            staging.start(*request)
        return [staging.state(int_id) for int_id in watch]

    def loraplex_swap(
        self, enter: list[tuple[str, int, str]], demote: list[int], remove: list[int]
    ) -> tuple[list[str], float]:
        """Frees slots and fills them. Returns, per adapter of `enter`, "" or the reason why it
        could not enter, and the seconds that all of it took.

        Adapters of `demote` leave their slots and stay in host memory; those of `remove` leave
        both. None of them is in flight. Nothing of an adapter that fails stays, and the other
        adapters are not affected.
        """
        began = time.perf_counter()
        slots = self._loraplex()
        for int_id in demote:
            slots.manager.deactivate_adapter(int_id)
        for int_id in remove:
            slots.remove(int_id)
        return [slots.enter(*request) for request in enter], time.perf_counter() - began

    def loraplex_rehearse(self, int_id: int) -> None:
        """Puts an adapter of zeros into a slot, as vLLM does while it captures its graphs.
        `loraplex_swap` takes it out again.
        """
        slots = self._loraplex()
        manager = slots.manager
        rank = manager.get_dummy_lora_warmup_rank(min(8, manager.lora_config.max_lora_rank))
        lora = manager.create_dummy_lora(
            int_id, rank, self.model_runner.lora_manager.embedding_modules
        )
        gather_into_block(lora)
        manager._registered_adapters[int_id] = lora
        slots.writer.activate(int_id)

    def loraplex_layers(self) -> bytes:
        """What adapters may change in this model, as bytes for `join` of
        worker/engine/vllm/lora/layers.py.
        """
        return lora_layers.pack(lora_layers.of_manager(self._loraplex().manager))

    def loraplex_slots(self) -> list[int]:
        """The ids of the adapters that are in a slot, as the engine sees it."""
        return [
            int_id for int_id in self._loraplex().manager.lora_index_to_id if int_id is not None
        ]

    def _loraplex(self) -> _RankSlots:
        slots: _RankSlots | None = getattr(self, "_loraplex_slots", None)
        if slots is None:
            slots = self._loraplex_slots = _RankSlots(self.model_runner.lora_manager)
        return slots


class _RankSlots:
    """The slots of one rank. `lora_manager` is vLLM's LRUCacheWorkerLoRAManager; its
    `_adapter_manager` owns caches and modules.
    """

    def __init__(self, lora_manager: Any) -> None:
        self.manager = lora_manager._adapter_manager
        self.staging = _StagingArea(lora_manager)
        self.writer = SlotWriter(self.manager)
        apply = lora_manager._apply_adapters

        def apply_adapters(requests: Collection[Any]) -> None:
            """vLLM looks after each adapter of each step: 2 ms for 64 of them. Here they are in
            their slots before their requests come.
            """
            active = self.manager._active_adapters
            if not all(request.lora_int_id in active for request in requests if request):
                apply(requests)

        lora_manager._apply_adapters = apply_adapters

    def remove(self, int_id: int) -> None:
        self.staging.drop(int_id)
        self.manager.remove_adapter(int_id)

    def enter(self, name: str, int_id: int, folder: str) -> str:
        """Puts the adapter into a slot. Returns "" or the reason why it could not."""
        try:
            self._enter(name, int_id, folder)
        except Exception as exc:
            # vLLM, safetensors and torch raise errors of many kinds. This adapter fails; the engine
            # must not.
            self.remove(int_id)
            return _words(exc)
        return ""

    def _enter(self, name: str, int_id: int, folder: str) -> None:
        manager = self.manager
        if manager.get_adapter(int_id) is None:
            lora = self.staging.take(int_id) or self.staging.read(name, int_id, folder)
            if len(manager) >= manager.capacity:
                # vLLM would drop an adapter that residency counts as present.
                raise RuntimeError("No room in host memory for another adapter.")
            # The last step of vLLM's _add_adapter; `read` has done the others.
            manager._registered_adapters[int_id] = lora
        if (
            len(manager._active_adapters) >= manager.lora_slots
            and int_id not in manager._active_adapters
        ):
            raise RuntimeError("No slot is free.")  # vLLM would take a slot that may be in use
        if self.writer.activate(int_id):
            self.staging.later(self._make_copies)

    def _make_copies(self) -> None:
        """For one slot at a time, so that adapters can be prepared in between."""
        if self.writer.make_next_copies():
            self.staging.later(self._make_copies)


class _StagingArea:
    """Adapters that are being prepared, or that are prepared and wait for a slot. One thread reads
    files; every other call comes from the step loop.
    """

    def __init__(self, lora_manager: Any) -> None:
        self._lora_manager = lora_manager
        manager = lora_manager._adapter_manager
        manager.model.hf_to_vllm_mapper = lora_layers.names_mapper(manager.model, manager.modules)
        manager.model.lora_skip_prefixes = lora_layers.skipped_prefixes(manager.model)
        self._row_order = lora_layers.RowOrder(manager.model)
        self._lock = threading.Lock()
        self._ready: dict[int, Any] = {}  # int id -> LoRAModel
        self._bytes: dict[int, int] = {}  # size of each of those
        self._failed: dict[int, str] = {}
        # Ids that are being prepared and were not dropped, with the folder once it was checked.
        self._wanted: dict[int, str] = {}
        lora_manager._lora_model_cls = TracedLoRAModel
        self._templates = FileTemplates(lora_manager.lora_config.lora_dtype)
        device = manager.device
        self._thread = ThreadPoolExecutor(
            1, "loraplex-prepare", initializer=_use_device, initargs=(device,)
        )
        _pin_later()
        sys.setswitchinterval(SWITCH_S)
        self.link: RankLink | None = None
        self.link = rank_link(self._on_request)

    def start(self, name: str, int_id: int, folder: str, checked: bool = True) -> None:
        with self._lock:
            if int_id in self._ready or int_id in self._failed:
                return
            full = sum(self._bytes.values()) > STAGED_BYTES
            under_way = int_id in self._wanted
            if not full:
                self._wanted[int_id] = folder if checked else ""
        if full:
            if checked and not under_way:  # the swap reads it
                self._tell(int_id, "")
        elif not under_way:
            self._thread.submit(self._prepare, name, int_id, folder)

    def later(self, work: Callable[[], None]) -> None:
        """Does it in the thread that reads files."""
        self._thread.submit(work)

    def state(self, int_id: int) -> str | None:
        """None while it is being prepared, "" once it is ready, else the reason why it failed."""
        with self._lock:
            return None if int_id in self._wanted else self._failed.get(int_id, "")

    def take(self, int_id: int) -> Any | None:
        with self._lock:
            self._wanted.pop(int_id, None)
            self._bytes.pop(int_id, None)
            return self._ready.pop(int_id, None)

    def drop(self, int_id: int) -> None:
        self.take(int_id)
        with self._lock:
            self._failed.pop(int_id, None)

    def _on_request(self, request: Request) -> None:
        """In the link's thread."""
        if isinstance(request, Drop):
            self.drop(request.int_id)
        else:
            self.start(request.name, request.int_id, request.folder, request.checked)

    def _tell(self, int_id: int, failure: str) -> None:
        if self.link is not None:
            self.link.tell(int_id, failure)

    def read(self, name: str, int_id: int, folder: str) -> Any:
        """Does what vLLM's add_adapter does before it registers an adapter, and puts all weights
        into one pinned block.
        """
        return self._templates.read(
            Path(folder), int_id, lambda: self._load_by_vllm(name, int_id, folder)
        )

    def _load_by_vllm(self, name: str, int_id: int, folder: str) -> Any:
        """Has vLLM read the adapter, and checks that all of it will be applied."""
        from vllm.lora.request import LoRARequest

        manager = self._lora_manager._adapter_manager
        lora = self._lora_manager._load_adapter(
            LoRARequest(
                lora_name=name,
                lora_int_id=int_id,
                lora_path=folder,
                is_3d_lora_weight=has_fused_experts(Path(folder)),
            )
        )
        if left_out := lora_layers.unapplied(manager, lora):
            raise RuntimeError(
                f"{len(left_out)} of its {len(lora.loras)} layers would not be applied: "
                f"{', '.join(left_out[:3])}."
            )
        self._row_order.apply(lora)
        manager._validate_moe_lora_format(lora)
        manager._create_merged_loras_inplace(lora)
        return lora

    def _prepare(self, name: str, int_id: int, folder: str) -> None:
        made, failure = self._read_ahead(int_id, folder), ""
        if made is None:
            with self._lock:
                folder = self._wanted.get(int_id, "")
                if not folder:  # `start` comes again once it is checked
                    self._wanted.pop(int_id, None)
                    return
            try:
                made = self.read(name, int_id, folder)
            except Exception as exc:  # as in _RankSlots.enter
                failure = _words(exc)
        with self._lock:
            if int_id not in self._wanted:
                return
            del self._wanted[int_id]
            if made is None:
                self._failed[int_id] = failure
            else:
                self._ready[int_id] = made
                size_bytes = self._bytes[int_id] = sum(t.nbytes for _, _, t in tensors(made))
        self._tell(int_id, failure)
        if made is not None:
            pin_spare(size_bytes)

    def _read_ahead(self, int_id: int, folder: str) -> Any | None:
        """The adapter, if all that is new of it are its values and they can be read. Its folder
        moves once it is checked.
        """
        try:
            return self._templates.read_known(Path(folder), int_id)
        except (OSError, RuntimeError):
            return None


def _use_device(device: Any) -> None:
    """A new thread begins on device 0. If rank 3 pinned memory there, it would cost a context on
    that device.
    """
    import torch

    if device.type == "cuda":
        torch.cuda.set_device(device)


def _pin_later() -> None:
    """Stops vLLM from pinning each tensor as it reads it; `gather_into_block` pins them all at
    once.
    """
    from vllm.lora import lora_model, model_manager

    lora_model.PIN_MEMORY = model_manager.PIN_MEMORY = False


def _words(exc: Exception) -> str:
    return str(exc) or type(exc).__name__
