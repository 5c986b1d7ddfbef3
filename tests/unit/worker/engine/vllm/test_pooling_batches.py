"""The inputs of one pooling request run side by side, and start and end some at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from types import SimpleNamespace

import pytest
from vllm.exceptions import VLLMValidationError

from worker.engine.vllm.app import pooling_batches as batches

COUNT = 200


class Inputs:
    """Async generators that note when they start and how they end."""

    def __init__(self) -> None:
        self.go, self.started, self.ended = asyncio.Event(), 0, 0
        self.goes_at = -1
        """They go on once so many have started."""

    async def one(self, number: int, fails: bool = False) -> AsyncGenerator[str, None]:
        self.started += 1
        if self.started == self.goes_at:
            self.go.set()
        try:
            await self.go.wait()
            if fails:
                raise ValueError(f"{number} is wrong")
            yield f"first {number}"
            yield f"last {number}"
        finally:
            self.ended += 1


async def test_all_that_each_gives_comes_with_its_index() -> None:
    inputs = Inputs()
    inputs.go.set()
    seen = [item async for item in batches.merge(*map(inputs.one, range(COUNT)))]
    assert sorted(seen) == sorted(
        (n, f"{which} {n}") for n in range(COUNT) for which in ("first", "last")
    )
    assert [n for n, words in seen if words.startswith("last")] == [*range(COUNT)]
    assert [item async for item in batches.merge()] == []


async def test_others_have_turns_between_those_that_start() -> None:
    inputs, seen = Inputs(), []

    async def listen() -> None:
        async for item in batches.merge(*map(inputs.one, range(COUNT))):
            seen.append(item)

    listening = asyncio.create_task(listen())
    most, before = 0, 0
    async with asyncio.timeout(10):
        while inputs.started < COUNT:
            await asyncio.sleep(0)
            most, before = max(most, inputs.started - before), inputs.started
    assert most <= 2 * batches.AT_ONCE
    inputs.go.set()
    await listening
    assert len(seen) == 2 * COUNT


async def test_the_first_error_is_raised_and_all_others_end() -> None:
    inputs = Inputs()
    generators = [inputs.one(n, fails=n == 150) for n in range(COUNT)]
    inputs.goes_at = COUNT
    with pytest.raises(ValueError, match="150 is wrong"):
        async with aclosing(batches.merge(*generators)) as merged:
            async for _ in merged:
                pass
    assert inputs.ended == inputs.started == COUNT


async def test_who_leaves_ends_them_all_some_at_a_time() -> None:
    inputs = Inputs()

    async def listen() -> None:
        async with aclosing(batches.merge(*map(inputs.one, range(COUNT)))) as merged:
            async for _ in merged:
                pass

    others = asyncio.all_tasks()
    listening = asyncio.create_task(listen())
    async with asyncio.timeout(10):
        while inputs.started < COUNT:
            await asyncio.sleep(0)
        listening.cancel()
        most, before = 0, 0
        while inputs.ended < COUNT:
            await asyncio.sleep(0)
            most, before = max(most, inputs.ended - before), inputs.ended
        with pytest.raises(asyncio.CancelledError):
            await listening
    assert most <= 2 * batches.AT_ONCE
    assert asyncio.all_tasks() <= others


@pytest.mark.parametrize(
    ("task", "most"),
    [("token_embed", batches.MOST_NUMBERS // 4096), ("token_classify", batches.MOST_NUMBERS // 9)],
)
def test_the_numbers_of_all_tokens_are_bounded_by_what_each_has(task: str, most: int) -> None:
    context = SimpleNamespace(pooling_params=SimpleNamespace(task=task))
    model = SimpleNamespace(get_hidden_size=lambda: 4096, hf_config=SimpleNamespace(num_labels=9))

    def inputs(tokens: int) -> list[object]:
        return [{"prompts": {"prompt_token_ids": range(n)}} for n in (tokens - 1, 1)]

    batches._check_numbers(context, inputs(most), model)
    with pytest.raises(VLLMValidationError, match="Send fewer inputs"):
        batches._check_numbers(context, inputs(most + 1), model)
    context.pooling_params.task = "embed"
    batches._check_numbers(context, inputs(most + 1), model)


async def test_inputs_that_grow_in_the_worker_are_bounded_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`padding` makes each text as long as the model takes, and a query is in each of its pairs."""
    monkeypatch.setattr(batches, "MOST_TOKENS", 1000 * batches.AT_ONCE)
    read = 0

    class Processor:
        def get_request_factory_online(self, context: object) -> range:
            return range(2048)

        async def render_async(self, number: int) -> dict[str, object]:
            nonlocal read
            read += 1
            return {"prompts": {"prompt_token_ids": [5] * 600}}

    serving = SimpleNamespace(model_config=None)
    with pytest.raises(VLLMValidationError, match="Send fewer inputs"):
        await batches._read(serving, Processor(), SimpleNamespace())
    assert read == 2 * batches.AT_ONCE
