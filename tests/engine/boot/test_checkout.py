"""Shell. A checkout on PYTHONPATH that is not installed. vLLM finds no plugin of ours there, and
yet its processes end with their worker.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.harness import ROOT, cluster, demo_config
from tests.processes import called, family_of, still_alive

END_S = 30.0
PACKAGES = ("loraplex", "gateway", "worker", "shared")


def uninstalled(folder: Path) -> dict[str, str]:
    """An environment in which nothing of ours is installed, with a checkout on PYTHONPATH."""
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return {"PYTHONPATH": str(folder)}


@pytest.mark.parametrize("method", ["spawn", pytest.param("fork", marks=pytest.mark.long)])
async def test_a_killed_worker_of_a_checkout_that_is_not_installed_leaves_no_engine(
    tmp_path: Path, method: str
) -> None:
    env = uninstalled(tmp_path / "checkout") | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": method,
        "VLLM_PLUGINS": "",  # as if no entry point of ours were installed
    }
    async with cluster(demo_config(max_loras=2), tmp_path) as c:
        worker = await c.start_worker("w0", env=env)
        family = family_of(worker.pid)
        engines = [p for p in family if "EngineCore" in called(p)]
        assert engines or method == "spawn", family
        assert family
        os.kill(worker.pid, signal.SIGKILL)
        assert not await still_alive(family, END_S)
