"""Shell. What gateway and worker leave on the disk is nobody else's to read, whatever the umask of
the shell that started them is.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import cluster, make_adapter, sim_config

OTHERS = stat.S_IRWXG | stat.S_IRWXO


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0o000)
    yield
    os.umask(before)


@pytest.mark.usefixtures("open_umask")
async def test_nobody_else_may_enter_or_read_what_gateway_and_worker_make(
    tmp_path: Path, adapters: Path
) -> None:
    make_adapter(adapters, "secret")
    config = sim_config(adapters)
    async with cluster(config, tmp_path) as c:
        await c.start_worker("w0", state_dir=tmp_path / "other-host")
        assert (await c.chat("sim:secret"))[0] == 200
        for folder in (tmp_path / "state", tmp_path / "run"):
            assert folder.is_dir() and not folder.stat().st_mode & OTHERS, folder
        cache = tmp_path / "other-host" / "adapters"
        assert any(cache.rglob("adapter_config.json"))
        for root in (tmp_path / "state", tmp_path / "run", cache):
            opened = [p for p in root.rglob("*") if p.lstat().st_mode & OTHERS and _readable(p)]
            assert opened == []


def _readable(path: Path) -> bool:
    """Sockets and links are reached through their folders alone."""
    return path.is_file() or path.is_dir()
