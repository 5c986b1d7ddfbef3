"""Two clients may choose the same request id. Each one's leaving ends its own requests."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

NAME = "transcribe-1_0"


class Engine:
    """vLLM's own functions over tables of this test."""

    def __init__(self) -> None:
        from vllm.v1.engine.output_processor import OutputProcessor

        self.log_requests = False
        self.aborted: list[str] = []
        self.engine_core = SimpleNamespace(abort_requests_async=self.note)
        self.output_processor: Any = object.__new__(OutputProcessor)
        self.output_processor.request_states = {}
        self.output_processor.parent_requests = {}
        self.output_processor.external_req_ids = {}
        self.output_processor.lora_states = SimpleNamespace(request_finished=lambda *_: None)
        self.output_processor.admission_stats = Mock()
        self.output_processor.add_request = self.add

    async def abort(self, request_id: Any, internal: bool = False) -> None:
        from vllm.v1.engine.async_llm import AsyncLLM

        await AsyncLLM.abort(self, request_id, internal)

    async def note(self, ids: list[str]) -> None:
        self.aborted += ids

    def add(self, request: Any) -> None:
        table = self.output_processor
        state = SimpleNamespace(
            external_req_id=NAME, queue=None, lora_name=None, parent_req=None, detokenizer=None
        )
        table.request_states[request.request_id] = state
        table.external_req_ids.setdefault(NAME, []).append(request.request_id)


async def calls(guarded: bool) -> list[str]:
    """What is aborted when the first of two calls of one name ends."""
    from worker.engine.vllm.tenants.own_requests import OWN, abort_own_only

    engine = Engine()
    if guarded:
        abort_own_only(engine)

    async def call(own: str, leaves: bool) -> None:
        OWN.set(set())
        # vLLM makes some of a call's requests in tasks of their own
        made = asyncio.to_thread(
            engine.output_processor.add_request, SimpleNamespace(request_id=own)
        )
        await asyncio.create_task(made)
        await asyncio.sleep(0.05)
        if leaves:
            await engine.abort([NAME])

    await asyncio.gather(call("first", True), call("second", False))
    return engine.aborted


@pytest.mark.parametrize(("guarded", "aborted"), [(True, ["first"]), (False, ["first", "second"])])
async def test_one_that_leaves_ends_no_other_of_its_name(guarded: bool, aborted: list[str]) -> None:
    assert sorted(await calls(guarded)) == aborted


async def test_an_id_of_the_engine_means_what_it_meant() -> None:
    from worker.engine.vllm.tenants.own_requests import OWN, abort_own_only

    engine = Engine()
    abort_own_only(engine)
    OWN.set(set())
    engine.output_processor.add_request(SimpleNamespace(request_id="a"))
    OWN.set(set())
    await engine.abort("a", internal=True)
    assert engine.aborted == ["a"]
