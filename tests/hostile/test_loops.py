"""Shell. No attack holds the loop of a gateway or of a worker. CPU time, not wall time."""

from __future__ import annotations

from pathlib import Path

from tests.harness import cluster, sim_config
from tests.hostile.attacks import KEY
from tests.hostile.turns import too_long


async def test_no_attack_holds_a_loop_for_more_than_50_ms(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    (tmp_path / "adapters").mkdir()
    config = sim_config(tmp_path / "adapters", api_keys_file=str(keys))
    async with cluster(config, tmp_path, measured=True) as c:
        await c.start_worker("w0")
        assert await too_long(c) == {}
