"""Shell. Many choices of a long prompt do not hold the worker's event loop.

vLLM's front end makes a text of each choice's tokens. It begins each with the tokens of the whole
prompt, so that the first new token is written as it stands behind them. That takes 1.1 ms for each
choice of 100,000 tokens, and 10 ms more at its first token. 64 choices held the loop for 0.12 to
0.19 s. The last tokens of the prompt are enough: what a token looks like depends on what stands
just before it.

Then each choice is sent to the engine with the whole prompt, all of them in one turn: 64 took 0.06
s. Here others have a turn between two of them.
"""

from __future__ import annotations

import asyncio
from copy import copy
from typing import Any

from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

PRIMED_TOKENS = 1024
"""More than any character or run of special tokens takes. 64 choices are begun in 7 ms."""


def install() -> None:
    """Called once per process."""
    begin = FastIncrementalDetokenizer.__init__
    if getattr(begin, "loraplex", False):
        return

    def begin_with_the_end(self: FastIncrementalDetokenizer, tokenizer: Any, request: Any) -> None:
        ids = request.prompt_token_ids
        if ids is not None and len(ids) > PRIMED_TOKENS:
            request = copy(request)
            request.prompt_token_ids = ids[-PRIMED_TOKENS:]
        begin(self, tokenizer, request)

    begin_with_the_end.loraplex = True  # type: ignore[attr-defined]
    FastIncrementalDetokenizer.__init__ = begin_with_the_end


def take_turns(llm: AsyncLLM) -> None:
    """Called once for each engine."""
    send, states = llm.engine_core.add_request_async, llm.output_processor.request_states

    async def send_in_turn(request: Any) -> None:
        state = states.get(request.request_id)
        one_of_many = state is not None and state.parent_req is not None
        if one_of_many and len(request.prompt_token_ids or ()) > PRIMED_TOKENS:
            await asyncio.sleep(0)  # if it is cancelled here, vLLM ends all choices
        await send(request)

    llm.engine_core.add_request_async = send_in_turn
