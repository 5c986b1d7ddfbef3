"""Shell. A base that answers with a vector for each token, as those of late interaction do."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from shared.runtime.children import Zygote
from tests.harness import Cluster, cluster, demo_config

pytestmark = pytest.mark.asyncio(loop_scope="session")
WIDTH, MOST_NUMBERS = 192, 2048 * 4096


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def tokens(
    zygote: Zygote, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Cluster]:
    engine = {"runner": "pooling", "pooler_config": {"task": "token_embed"}, "enable_lora": False}
    config = demo_config(engine=engine)
    del config["llm_configs"][0]["lora_config"]
    async with cluster(config, tmp_path_factory.mktemp("tokens"), zygote) as c:
        await c.start_worker("w0")
        yield c


async def test_it_starts_and_does_the_task_that_it_is_configured_for_and_no_other(
    tokens: Cluster,
) -> None:
    status, body, _ = await tokens.post("/pooling", {"model": "demo", "input": ["a b", "c"]})
    assert status == 200 and [len(it["data"][0]) for it in body["data"]] == [WIDTH, WIDTH]
    assert [len(it["data"]) for it in body["data"]] == [
        (await tokens.post("/tokenize", {"model": "demo", "prompt": text}))[1]["count"]
        for text in ("a b", "c")
    ]
    status, body, _ = await tokens.post("/v1/embeddings", {"model": "demo", "input": "a"})
    assert status == 400 and "token_embed" in body["error"]["message"], body


async def test_more_numbers_than_a_worker_may_hold_are_refused_and_it_goes_on(
    tokens: Cluster,
) -> None:
    inputs = [[5] * 900] * (MOST_NUMBERS // WIDTH // 900 + 1)
    status, body, _ = await tokens.post("/pooling", {"model": "demo", "input": inputs})
    assert status == 400 and "Send fewer inputs" in body["error"]["message"], body
    assert body["error"]["param"] == "input"
    status, body, _ = await tokens.post("/pooling", {"model": "demo", "input": inputs[:3]})
    assert status == 200 and [len(it["data"]) for it in body["data"]] == [900] * 3
