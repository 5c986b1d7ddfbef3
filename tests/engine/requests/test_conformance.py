"""Shell. A part of the requests of tests/conformance, every endpoint in it, to Loraplex and to
vLLM's own server: what is answered differs only where it is meant to.
"""

from __future__ import annotations

import pytest

from shared.runtime.children import Zygote
from tests.conformance.__main__ import compare, report
from tests.conformance.audio_cases import audio_cases
from tests.conformance.cases import all_cases, some_cases
from tests.conformance.servers import both

SOME, ALL = 200, 551
pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_answers_are_those_of_vllm_but_for_what_is_meant(
    zygote: Zygote, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert len(all_cases()) >= ALL
    cases = some_cases(SOME)
    assert {c.path for c in cases} == {c.path for c in all_cases()}
    async with both(zygote, tmp_path_factory.mktemp("conformance"), cases) as pair:
        found = await compare(pair, cases)
    assert not [case.name for case, _, why in found if why is None], report(cases, found)


@pytest.mark.long
async def test_what_a_sound_is_answered_with_is_what_vllm_answers(
    zygote: Zygote, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cases = audio_cases()
    async with both(zygote, tmp_path_factory.mktemp("audio"), cases) as pair:
        found = await compare(pair, cases)
    assert not [case.name for case, _, why in found if why is None], report(cases, found)
