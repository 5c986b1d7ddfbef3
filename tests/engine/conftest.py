"""Shell. Tests on real vLLM: all of this folder in one test process, so that vLLM is imported once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from shared.children import Zygote
from tests.harness import Cluster, cluster, demo_config

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("vllm"))


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def demo(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """One gateway, two vLLM workers with two slots each, all demo adapters. Tests must leave it as they found it."""
    folder = tmp_path_factory.mktemp("demo")
    async with cluster(demo_config(max_loras=2), folder, zygote) as c:
        await c.start_worker("w0")
        await c.start_worker("w1")
        yield c
