"""Shell. Answers behind a reasoning parser that begin on one engine and go on on another."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.engine.in_process import start_engine
from tests.engine.requests.test_resume import answer, chat, cuts, heard

pytestmark = pytest.mark.long


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def reasoning(
    vllm_environment: None, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Any]:
    """An engine whose answers go through a parser that tells reasoning from the answer by words."""
    config = {
        "backend": "xgrammar",
        "disable_any_whitespace": True,
        "reasoning_parser": "granite",
        "enable_in_reasoning": True,
    }
    engine = await start_engine(
        tmp_path_factory.mktemp("reasoning"),
        structured_outputs_config=config,
        reasoning_parser="granite",
    )
    yield engine
    await engine.stop()


THOUGHTS = "Here is my thought process: [a-z ]{12}Here is my response: [a-z ]{12}"
REASONED = {
    "no reasoning": chat(),
    "reasoning and answer": chat(structured_outputs={"regex": THOUGHTS}, max_tokens=150),
}


@pytest.mark.parametrize("case", REASONED)
async def test_an_answer_with_a_reasoning_parser_moves_byte_for_byte(
    reasoning: Any, case: str
) -> None:
    path, body = REASONED[case]
    whole = await answer(reasoning, path, body)
    due = heard(whole.data())
    assert bool(due[0]["reasoning"]) == (case != "no reasoning") and due[0]["text"], due
    for cut in cuts(len(whole.parts)):
        rest = await answer(reasoning, path, body, whole.tokens(cut))
        assert heard(whole.data(cut) + rest.data()) == due, f"cut after {cut} parts"
