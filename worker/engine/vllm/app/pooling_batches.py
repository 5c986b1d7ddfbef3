"""Shell. A pooling request with many inputs does not hold the worker's event loop.

vLLM 0.32 reads, starts and ends all inputs of a request in one turn each: 2,048 texts took 0.1 to
0.5 s. It writes the answer in a thread, but in a few calls that keep the interpreter: 1.2 s for
2,048 vectors of 1,024 numbers. Here a turn has AT_ONCE inputs, and a call some thousand numbers.

A model with a vector for each token answers with as many numbers as its inputs have tokens times
dimensions. Their number is bounded, because the worker has all of them in memory.

vLLM tells the tokens of such a request to its client alone. Here they are noted where its other
paths have them, so keys are charged for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from itertools import islice
from types import SimpleNamespace
from typing import Any

from pydantic import BaseModel
from vllm.entrypoints.pooling.base import serving as base
from vllm.entrypoints.pooling.classify import serving as classify
from vllm.entrypoints.pooling.embed import protocol as embed_protocol
from vllm.entrypoints.pooling.embed import serving as embed
from vllm.entrypoints.pooling.pooling import serving as pooling
from vllm.entrypoints.pooling.scoring import serving as scoring
from vllm.exceptions import VLLMValidationError

from worker.engine.vllm.app.json_pieces import encode, give_up
from worker.engine.vllm.app.written_answers import Written, WrittenResponse
from worker.engine.vllm.tenants.pooled_media import read_inputs

AT_ONCE = 32
"""Inputs that are read, started or ended in one turn of the loop: 5 ms."""
MOST_NUMBERS = 2048 * 4096
"""Numbers of one answer of a model with a vector for each token: 32 MiB, and 160 MB as JSON."""
MOST_TOKENS = 8 << 20
"""Of all inputs of a request: as many as there are bytes in the longest text."""
METADATA = "request_metadata"
"""Where the state of a request has what it has used."""
ANSWERS = {
    classify: ["ClassificationResponse"],
    embed: ["EmbeddingResponse", "CohereEmbedResponse"],
    pooling: ["PoolingResponse"],
    scoring: ["ScoreResponse", "RerankResponse"],
}


def install() -> None:
    """Called once per process, before vLLM makes its serving objects."""
    if base.merge_async_iterators is merge:
        return
    base.merge_async_iterators = merge
    base.PoolingBaseServing._preprocessing = _read
    base.PoolingBaseServing._collect_batch = _noting(base.PoolingBaseServing._collect_batch)
    embed_protocol._pack_binary_embeddings = _by_slices(embed_protocol._pack_binary_embeddings)
    for module, names in ANSWERS.items():
        module.JSONResponse = WrittenResponse
        if hasattr(module, "get_json_response_cls"):
            module.get_json_response_cls = lambda: WrittenResponse
        for name in names:
            setattr(module, name, _written(getattr(module, name)))


async def merge(*iterators: AsyncGenerator[Any, None]) -> AsyncGenerator[tuple[int, Any], None]:
    """(Index of an iterator, what it gave), as it comes. Raises the first error of any."""
    arrived: asyncio.Queue[tuple[int, Any, BaseException | None]] = asyncio.Queue()
    tasks: list[asyncio.Task[None]] = []

    async def run(index: int, iterator: AsyncGenerator[Any, None]) -> None:
        try:
            async for item in iterator:
                arrived.put_nowait((index, item, None))
        except (Exception, asyncio.CancelledError) as exc:
            arrived.put_nowait((index, _END, exc))
        else:
            arrived.put_nowait((index, _END, None))

    async def start() -> None:
        for index, iterator in enumerate(iterators):
            tasks.append(asyncio.create_task(run(index, iterator)))
            if len(tasks) % AT_ONCE == 0:
                await asyncio.sleep(0)

    starting = asyncio.create_task(start())
    left = len(iterators)
    try:
        while left:
            index, item, error = await arrived.get()
            if error is not None:
                raise error
            if item is _END:
                left -= 1
            else:
                yield index, item
    finally:
        starting.cancel()
        running = (task for task in tasks if not task.done())
        while some := list(islice(running, AT_ONCE)):
            for task in some:
                task.cancel()
            await asyncio.gather(*some, return_exceptions=True)


async def _read(self: Any, io_processor: Any, ctx: Any) -> None:
    """Takes the place of `PoolingBaseServing._preprocessing`."""
    requests = await read_inputs(io_processor, ctx)
    if len(requests) == 0:
        raise ValueError("You must pass at least one prompt")
    inputs: list[Any] = []
    tokens = 0
    for some in _slices(requests):
        read = await asyncio.gather(*map(io_processor.render_async, some))
        inputs += read
        tokens += _tokens(read)
        if tokens > MOST_TOKENS:
            raise VLLMValidationError(
                f"The inputs have more than {MOST_TOKENS} tokens together, with their padding and "
                "with what they are compared to. Send fewer inputs.",
                parameter="input",
            )
    _check_numbers(ctx, inputs, self.model_config)
    ctx.engine_inputs = inputs


def _noting(collect: Callable[..., Any]) -> Callable[..., Any]:
    """`PoolingBaseServing._collect_batch`, which a request may call for one part after another."""

    async def _collect_batch(self: Any, ctx: Any) -> None:
        await collect(self, ctx)
        state = ctx.raw_request.state
        metadata = getattr(state, METADATA, None)
        before = metadata.final_usage_info.prompt_tokens if metadata is not None else 0
        tokens = before + sum(len(one.prompt_token_ids) for one in ctx.final_res_batch)
        usage = SimpleNamespace(prompt_tokens=tokens, completion_tokens=0)
        setattr(state, METADATA, SimpleNamespace(final_usage_info=usage))

    return _collect_batch


def _check_numbers(ctx: Any, inputs: list[Any], model_config: Any) -> None:
    """Raises VLLMValidationError if the answer would have too many numbers."""
    task = getattr(ctx.pooling_params, "task", None)
    if task == "token_embed":
        width = model_config.get_hidden_size()
    elif task == "token_classify":
        width = getattr(model_config.hf_config, "num_labels", 1)
    else:
        return
    tokens = _tokens(inputs)
    most = MOST_NUMBERS // max(1, width)
    if tokens > most:
        raise VLLMValidationError(
            f"The inputs have {tokens} tokens. At most {most} of this model, which has a vector "
            "for each, are answered at once. Send fewer inputs.",
            parameter="input",
            value=tokens,
        )


def _tokens(inputs: list[Any]) -> int:
    return sum(len(it["prompts"].get("prompt_token_ids") or ()) for it in inputs)


def _slices(items: Any) -> Iterator[Any]:
    for first in range(0, len(items), AT_ONCE):
        yield items[first : first + AT_ONCE]


def _by_slices(convert: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    def converted(rows: list[Any], *more: Any, **named: Any) -> list[Any]:
        return [row for some in _slices(rows) for row in convert(some, *more, **named)]

    return converted


def _written(answer: type[BaseModel]) -> type[BaseModel]:
    """The class, but `model_dump` writes it, in the thread that vLLM makes the answer in."""

    def model_dump(self: BaseModel, **dump: Any) -> Written:
        chunks = encode(self, **dump)
        give_up(self)
        return Written(chunks)

    return type(answer.__name__, (answer,), {"__module__": __name__, "model_dump": model_dump})


_END = object()
