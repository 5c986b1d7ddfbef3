"""Bad adapters on real vLLM. Each is refused with its own code, and no other answer changes by a
bit.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio

from shared.runtime.children import Zygote
from tests.bad_adapters import KINDS
from tests.harness import DEMO, Cluster, cluster, demo_config

GOOD = ("pirate", "haiku")
SPOILED = "pirate"
PROMPT = "Tell me about the sea."
# A folder without a config is no adapter, so the store does not list it.
NOT_LISTED = {"no-config"}


@dataclass
class Served:
    """A cluster of one worker with good and bad adapters. It keeps what the base and the good
    adapters answered before any bad one was asked for.
    """

    cluster: Cluster
    before: dict[str, Any]

    async def answers(self) -> dict[str, Any]:
        """The answers, one after another: the last digit of a probability depends on what else is
        in the batch.
        """
        return {
            model: await answer(self.cluster, model)
            for model in ("demo", *(f"demo:{name}" for name in GOOD))
        }


async def answer(c: Cluster, model: str) -> Any:
    """A greedy answer, with the probabilities of every token to the last digit."""
    status, body, _ = await c.chat(
        model, PROMPT, temperature=0, max_tokens=24, logprobs=True, top_logprobs=3
    )
    assert status == 200, body
    return body["choices"]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def served(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    folder = tmp_path_factory.mktemp("bad")
    store = folder / "store"
    for name in GOOD:
        shutil.copytree(DEMO / "adapters" / name, store / name)
    for name, kind in KINDS.items():
        kind.make(DEMO / "adapters" / SPOILED, store / "bad" / name)
    async with cluster(demo_config(max_loras=2, adapters=store), folder, zygote) as c:
        await c.start_worker("w0")
        served = Served(c, {})
        served.before = await served.answers()
        assert len({str(a) for a in served.before.values()}) == len(served.before), (
            "the adapters must be told apart"
        )
        yield served


@pytest.mark.parametrize("name", KINDS)
async def test_a_bad_adapter_is_refused_and_others_answer_as_before(
    served: Served, name: str
) -> None:
    status, body, _ = await served.cluster.chat(f"demo:bad/{name}", PROMPT, max_tokens=4)
    if name in NOT_LISTED:
        assert (status, body["error"]["code"]) == (404, "adapter_not_found")
        return
    assert (status, body["error"]["code"]) == (422, KINDS[name].code), body
    assert str(served.cluster.folder) not in body["error"]["message"]
    assert await served.answers() == served.before


async def test_all_bad_adapters_at_once_change_no_answer_that_is_being_written(
    served: Served,
) -> None:
    bad = [n for n in KINDS if n not in NOT_LISTED]
    asked = asyncio.gather(
        *(served.cluster.chat(f"demo:bad/{n}", PROMPT, max_tokens=4) for n in bad)
    )
    for _ in range(3):
        assert await served.answers() == served.before
    assert [(s, b["error"]["code"]) for s, b, _ in await asked] == [
        (422, KINDS[n].code) for n in bad
    ]
    assert await served.answers() == served.before


async def test_the_worker_that_refused_them_all_is_the_one_that_was_started(served: Served) -> None:
    """This test is the last of the module. It shows that no engine died and was started again
    meanwhile.
    """
    assert "engine died" not in served.cluster.workers["w0"].output()
    assert await served.cluster.metric("loraplex_worker_adapters", worker="w0", tier="gpu") <= len(
        GOOD
    )
