"""`loraplex adapters verify`, as an operator types it, against real vLLM."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from shared.runtime.children import Zygote
from tests.harness import DEMO, cluster, demo_config
from tests.integration.cli.test_cli_adapters import loraplex


async def test_verify_says_that_a_served_adapter_is_the_same_as_peft_s(
    tmp_path: Path, zygote: Zygote
) -> None:
    """And it says the opposite once the store has another adapter under the name than the
    worker.
    """
    store = tmp_path / "adapters"
    shutil.copytree(DEMO / "adapters" / "pirate", store / "mine")
    settings = demo_config(adapters=store, catalog_refresh_s=3600.0)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    async with cluster(settings, tmp_path, zygote) as c:
        await c.start_worker("w0")
        verify = ("verify", "mine", "--config", str(config), "--url", c.url)
        status, out, err = await loraplex(*verify)
        assert status == 0 and out.startswith("the same: 0 of "), out + err
        shutil.rmtree(store / "mine")
        shutil.copytree(DEMO / "adapters" / "haiku", store / "mine")
        status, out, err = await loraplex(*verify)
        assert status == 1 and out.startswith("DIFFERENT: "), out + err
