"""Shell. What the client is told of an answer that EngineCore has ended for its grammar's cost."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from contextvars import ContextVar
from http import HTTPStatus

from vllm.exceptions import GenerationError
from vllm.outputs import RequestOutput

from worker.engine.vllm.grammars.metering import TOO_COSTLY

WORDS = (
    "The grammar, regular expression or schema of this request costs the engine too much for each "
    "token. That happens if a text can be read in many ways, as in (a{1,99}){1,99}. Write it so "
    "that each text can be read in one way."
)


class TokensSoFar:
    """What an answer with a grammar has used so far. vLLM says it only of an answer that is
    whole.
    """

    def __init__(self) -> None:
        self.prompt_tokens = self.output_tokens = 0


USED: ContextVar[TokensSoFar | None] = ContextVar("used_tokens", default=None)


class GrammarTooCostly(GenerationError):  # type: ignore[misc]
    """vLLM words it as an error of the request: with this status before the first byte, and as an
    event after it.
    """

    def __init__(self) -> None:
        super().__init__(WORDS)
        self.status_code = HTTPStatus.BAD_REQUEST


async def unless_too_costly(
    outputs: AsyncGenerator[RequestOutput, None],
) -> AsyncGenerator[RequestOutput, None]:
    """The outputs. Raises GrammarTooCostly in place of one that EngineCore has ended. The other
    choices of the request end with it. Their tokens up to then are added to USED.
    """
    used, is_first = USED.get() or TokensSoFar(), True
    async with aclosing(outputs) as made:
        async for output in made:
            if is_first:
                used.prompt_tokens += len(output.prompt_token_ids or ())
            is_first = False
            used.output_tokens += sum(len(choice.token_ids) for choice in output.outputs)
            if any(choice.stop_reason == TOO_COSTLY for choice in output.outputs):
                raise GrammarTooCostly
            yield output
