"""Shell. Tests on real vLLM. They all run in one test process, so vLLM is imported once."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from shared.runtime.children import Zygote
from tests.engine.in_process import start_engine, worker_environment
from tests.harness import Cluster, cluster, demo_config

HERE = Path(__file__).parent


class ToldRecords(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.hookimpl(tryfirst=True)  # before xdist looks for the groups, whenever this file was loaded
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("vllm"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Checks that all tests of this folder are in one group. In several processes each would import
    vLLM, and a file whose tests build on one another would fail now and then.
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
    """One gateway and two vLLM workers with two slots each, with all demo adapters. Tests must
    leave it as they found it.
    """
    folder = tmp_path_factory.mktemp("demo")
    async with cluster(demo_config(max_loras=2), folder, zygote) as c:
        await c.start_worker("w0")
        await c.start_worker("w1")
        yield c


@pytest.fixture(scope="module")
def vllm_environment() -> Iterator[None]:
    """The environment of a worker process, for the tests of one module."""
    with worker_environment():
        yield


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Any]:
    """One engine in this process. Tests must leave it as they found it. `boot_log` has what was
    logged while it started.
    """
    log, told = logging.getLogger("loraplex.vllm"), ToldRecords()
    log.addHandler(told)
    log.setLevel(logging.INFO)
    with worker_environment():
        engine = await start_engine(tmp_path_factory.mktemp("engine"))
    log.removeHandler(told)
    engine.boot_log = told.records
    yield engine
    await engine.stop()
