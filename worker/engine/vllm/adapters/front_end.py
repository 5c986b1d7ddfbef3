"""Shell. Moves adapters in and out of vLLM, from the front end's side. It calls the functions of
worker/engine/vllm/worker_extension.py on every rank, between engine steps.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM

from shared.adapters.base_layers import BaseShapes
from shared.adapters.identity import AdapterRef
from shared.errors import EngineFailure, InvalidAdapter
from worker.engine.base import Loaded, Swap, Swapped
from worker.engine.vllm.adapters.prepare_link import Drop, PrepareLink, Ready, ToPrepare
from worker.engine.vllm.lora.layers import join

# A utility call waits for the running step. One that takes this long never answers: the engine
# died.
UTILITY_TIMEOUT_S = 300.0
# Time until ranks are asked which do not tell by themselves what they have prepared.
ASK_AGAIN_S = 0.02
_PATH = re.compile(r"(/[\w.\-]+){2,}")


class Adapters:
    """Does `prepare` and `swap` of `worker.engine.base.Engine`."""

    def __init__(self, engine: AsyncLLM, link: PrepareLink, ranks: int) -> None:
        self._engine, self._link, self._ranks = engine, link, ranks
        self._new: list[ToPrepare] = []  # for which the link was no use
        self._gone: list[int] = []
        self._called: set[int] = set()  # ids that were begun by a call, while they are wanted
        self._preparing: dict[int, tuple[ToPrepare, asyncio.Future[str]]] = {}
        self._told: dict[int, dict[str, str]] = {}  # int id -> what ranks said, while it is wanted
        self._asked = asyncio.Event()
        self._poll: asyncio.Task[None] | None = None
        link.listen(self._on_ready)

    def read_ahead(self, ref: AdapterRef, int_id: int, folder: Path) -> None:
        self._told[int_id] = {}
        self._start(ToPrepare(_name(ref), int_id, str(folder), False))

    def forget(self, int_id: int) -> None:
        self._told.pop(int_id, None)
        self._new = [wanted for wanted in self._new if wanted.int_id != int_id]
        dropped = self._link.send(Drop(int_id), self._ranks)
        if not dropped or int_id in self._called:  # that call may still be on its way
            self._called.discard(int_id)
            self._gone.append(int_id)
            self._ask()

    async def prepare(self, adapter: Loaded) -> None:
        int_id, wanted = adapter.int_id, ToPrepare(*_fields(adapter), True)
        prepared: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._preparing[int_id] = wanted, prepared
        self._told.setdefault(int_id, {})
        if not self._all_told(int_id):  # else it was read ahead, and nothing is left to do
            self._start(wanted)
        failure = await prepared
        if failure:
            # Another rank may have prepared it.
            await self._call("loraplex_swap", [], [], [int_id])
            raise _refusal(failure)

    async def swap(self, swap: Swap) -> Swapped:
        demote, unload = [a.int_id for a in swap.demote], [a.int_id for a in swap.unload]
        ranks = await self._call("loraplex_swap", [_fields(a) for a in swap.enter], demote, unload)
        refused: dict[AdapterRef, InvalidAdapter] = {}
        for i, adapter in enumerate(swap.enter):
            failure = next((words[i] for words, _ in ranks if words[i]), "")
            if failure:
                refused[adapter.ref] = _refusal(failure)
        if refused and len(ranks) > 1:  # one rank refused it, but the others have loaded it
            await self._call(
                "loraplex_swap", [], [], [a.int_id for a in swap.enter if a.ref in refused]
            )
        return Swapped(refused, max(seconds for _, seconds in ranks))

    async def rehearse(self, adapter: Loaded) -> None:
        """Puts an adapter that changes nothing, and has no files, into a slot. Kernels are
        compiled, and memory is pinned, before the first real adapter comes.
        """
        await self._call("loraplex_rehearse", adapter.int_id)

    async def layers(self) -> BaseShapes:
        """What adapters may change in the model, as the engine itself says."""
        return join(await self._call("loraplex_layers")).shapes()

    def _start(self, wanted: ToPrepare) -> None:
        if not self._link.send(wanted, self._ranks):
            self._new.append(wanted)
        self._ask()

    def _ask(self) -> None:
        self._asked.set()
        if self._poll is None or self._poll.done():
            self._poll = asyncio.create_task(self._watch(), name="adapters being prepared")

    async def _watch(self) -> None:
        """Runs until nothing is being prepared. Answers every caller, whatever happens."""
        clock = asyncio.get_running_loop().time
        ask_at = clock() + ASK_AGAIN_S
        try:
            while self._preparing or self._new or self._gone:
                self._asked.clear()
                if not self._new and not self._gone and clock() < ask_at:
                    with suppress(TimeoutError):
                        async with asyncio.timeout_at(ask_at):
                            await self._asked.wait()
                    continue
                new, self._new = self._new, []
                gone, self._gone = self._gone, []
                # What the link has not delivered yet would count as ready.
                new += [wanted for wanted, _ in self._preparing.values() if wanted not in new]
                starts = [(n.name, n.int_id, n.folder, n.checked) for n in new]
                watched = list(self._preparing)
                self._called.update(n.int_id for n in new)
                ranks = await self._call("loraplex_prepare", starts, watched, gone)
                ask_at = clock() + ASK_AGAIN_S
                for int_id, states in zip(watched, zip(*ranks, strict=True), strict=True):
                    if None not in states:
                        self._answer(int_id, states)
        except EngineFailure as exc:
            for _, prepared in self._preparing.values():
                if not prepared.done():
                    prepared.set_exception(EngineFailure(exc.message))
            self._preparing.clear()
            self._told.clear()
            self._called.clear()

    def _on_ready(self, ready: Ready) -> None:
        if ready.int_id in self._told:
            self._told[ready.int_id][ready.rank] = ready.failure
            self._all_told(ready.int_id)

    def _all_told(self, int_id: int) -> bool:
        """Whether all ranks have told of it; then whoever waits for it has the answer."""
        told = self._told.get(int_id, {})
        if len(told) < self._ranks:
            return False
        self._answer(int_id, told.values())
        return True

    def _answer(self, int_id: int, ranks: Iterable[str]) -> None:
        if int_id not in self._preparing:  # read ahead, or answered on the other way
            return
        _, prepared = self._preparing.pop(int_id)
        self._told.pop(int_id, None)  # `forget` may have come first
        self._called.discard(int_id)
        if not self._preparing:
            self._asked.set()  # nobody is left to look for
        if not prepared.done():  # the caller may have been cancelled
            prepared.set_result(next((words for words in ranks if words), ""))

    async def _call(self, method: str, *args: Any) -> list[Any]:
        """Calls `method` on every rank. Returns one answer per rank. Raises EngineFailure."""
        try:
            async with asyncio.timeout(UTILITY_TIMEOUT_S):
                answers: list[Any] = await self._engine.collective_rpc(method, args=args)
        except TimeoutError as exc:
            raise EngineFailure(f"{method} did not answer within {UTILITY_TIMEOUT_S:g} s") from exc
        except Exception as exc:
            # vLLM raises a plain Exception. Nobody knows then what is in the slots, so the engine
            # is given up.
            raise EngineFailure(f"{method} failed: {_without_paths(str(exc))}") from exc
        return answers


def lora_request(adapter: Loaded) -> LoRARequest:
    """Name, id and path are unique per version: vLLM compares adapters by name, and keys its prefix
    cache by name and path.
    """
    name, int_id, folder = _fields(adapter)
    return LoRARequest(lora_name=name, lora_int_id=int_id, lora_path=folder)


def _fields(adapter: Loaded) -> tuple[str, int, str]:
    return _name(adapter.ref), adapter.int_id, str(adapter.folder)


def _name(ref: AdapterRef) -> str:
    return f"{ref.base}:{ref.name}@{ref.digest}"


def _refusal(words: str) -> InvalidAdapter:
    return InvalidAdapter(f"The engine refused the adapter: {_without_paths(words)}")


def _without_paths(words: str) -> str:
    return _PATH.sub("<path>", words.splitlines()[0] if words else "")[:500]
