"""Shell. What every test folder shares: one zygote per test process for real-vLLM workers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from shared.runtime.children import Zygote
from tests.store_servers import gcs_url, moto_url, store_credentials

__all__ = ["adapters", "gcs_url", "moto_url", "store_credentials", "zygote"]


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def zygote() -> AsyncIterator[Zygote]:
    z = await Zygote.open({"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"})
    yield z
    await z.close()


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    """An empty adapter store."""
    folder = tmp_path / "adapters"
    folder.mkdir()
    return folder
