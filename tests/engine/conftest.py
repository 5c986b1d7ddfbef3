"""Shell. Tests on real vLLM: all of this folder in one test process, so that vLLM is imported
once.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from shared.runtime.children import Zygote
from tests.harness import Cluster, cluster, demo_config
from worker.engine.factory import VLLM_CPU_ENV, VLLM_ENV

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before xdist looks for the groups, whenever this file was loaded
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("vllm"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Scattered over the processes these tests would import vLLM in each, and a file whose tests
    build on one another would fail now and then.
    """
    grouped = hasattr(session.config, "workerinput") and getattr(
        session.config.option, "loadgroup", False
    )
    if grouped and any(
        HERE in item.path.parents and not item.nodeid.endswith("@vllm") for item in session.items
    ):
        raise pytest.UsageError(
            "pytest-xdist has not grouped the tests of tests/engine; do its version "
            "and pytest's fit?"
        )


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def demo(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """One gateway, two vLLM workers with two slots each, all demo adapters. Tests must leave it as
    they found it.
    """
    folder = tmp_path_factory.mktemp("demo")
    async with cluster(demo_config(max_loras=2), folder, zygote) as c:
        await c.start_worker("w0")
        await c.start_worker("w1")
        yield c


@pytest.fixture(scope="module")
def vllm_environment() -> Iterator[None]:
    """What a worker process sets before it imports vLLM; taken back, since other tests start
    processes of their own.
    """
    before = dict(os.environ)
    for key, value in (
        VLLM_ENV | VLLM_CPU_ENV | {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    ).items():
        os.environ.setdefault(key, value)
    yield
    os.environ.clear()
    os.environ.update(before)
