"""Shell. What every test folder shares: one zygote per test process for real-vLLM workers."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from shared.runtime.children import Zygote
from tests.store_servers import gcs_url, moto_url, store_credentials

ENGINE = Path(__file__).parent / "engine"
__all__ = ["adapters", "gcs_url", "moto_url", "store_credentials", "zygote"]


@pytest.hookimpl(tryfirst=True)  # before xdist looks for the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share a fixture of their module run in one test process, so that it is set up
    once. A booted server or an installed package is what costs time here. Tests with a group of
    their own stay in it, and all of tests/engine are one group.
    """
    for item in items:
        if item.get_closest_marker("xdist_group") or ENGINE in item.path.parents:
            continue
        module = item.nodeid.partition("::")[0]
        known = item._fixtureinfo.name2fixturedefs  # type: ignore[attr-defined]
        used = [known[name][-1] for name in known if known[name]]
        if any(f.scope == "module" and f.baseid == module for f in used):
            item.add_marker(pytest.mark.xdist_group(module), append=False)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def zygote() -> AsyncIterator[Zygote]:
    z = await Zygote.open({"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"})
    yield z
    await z.close()


@pytest.fixture(autouse=True)
def own_logging() -> None:
    """Each test begins with logging as a new process has it. A command that runs in a test's own
    process sets it up for that process, and an engine there even sets the level of all loggers.
    """
    ours = logging.getLogger("loraplex")
    ours.handlers.clear()
    ours.propagate = True
    ours.setLevel(logging.NOTSET)
    logging.root.setLevel(logging.WARNING)
    logging.disable(logging.NOTSET)


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    """An empty adapter store."""
    folder = tmp_path / "adapters"
    folder.mkdir()
    return folder
