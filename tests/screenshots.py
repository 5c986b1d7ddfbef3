"""Shell. `make screenshots`: the pictures of docs/UI.md, of a gateway with simulated workers under
a little load.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from pathlib import Path

from tests.browser import Page, browser
from tests.harness import ROOT, Cluster, cluster, make_adapter, sim_config

IMAGES = ROOT / "docs" / "images"
STYLES = ("formal", "legal", "pirate", "haiku", "support", "json", "sql", "summary", "german")
ADAPTERS = [f"{team}/{style}" for team in ("acme", "globex", "initech") for style in STYLES]
WORKERS = ("gpu-0", "gpu-1", "gpu-2", "gpu-3")
LOADED_FOR_S = 45.0
CLIENTS = 10
VIEWS = ("fleet", "residency", "requests", "time", "playground", "keys")
SIM = {"load_ms": 120.0, "ttft_ms": 30.0, "itl_ms": 12.0}


async def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "adapters"
        for name in ADAPTERS:
            make_adapter(store, name)
        async with cluster(sim_config(store, max_loras=6, sim=SIM), Path(folder)) as c:
            for worker in WORKERS:
                await c.start_worker(worker)
            async with browser() as page:
                clients = [asyncio.create_task(_client(c, n)) for n in range(CLIENTS)]
                await asyncio.sleep(LOADED_FOR_S)
                await c.post("/admin/adapters/acme/legal/pin?base=sim", b"")
                await _pictures(c, page)
                for client in clients:
                    client.cancel()


async def _client(c: Cluster, seed: int) -> None:
    rng = random.Random(seed)
    weights = [1 / (n + 1) for n in range(len(ADAPTERS))]
    while True:
        model = f"sim:{rng.choices(ADAPTERS, weights)[0]}" if rng.random() < 0.9 else "sim"
        await c.chat(model, "hello", max_tokens=rng.randint(10, 80), stream=True)
        await asyncio.sleep(rng.random() * 0.3)


async def _pictures(c: Cluster, page: Page) -> None:
    await page.look(width=1280, height=820)
    await page.open(f"{c.url}/ui")
    for view in VIEWS:
        await page.click(f'nav a[href="#{view}"]')
        await asyncio.sleep(2.5)
        if view == "playground":
            await page.click("#ask")
            await asyncio.sleep(2.5)
        if view == "requests":
            await page.click("#requests tbody button")
            await page.text("#story")
            await page.run("document.querySelector('#story').scrollIntoView({block: 'end'})")
        for dark in (False, True):
            await page.look(width=1280, height=820, dark=dark)
            await asyncio.sleep(0.5)
            name = f"ui-{view}-{'dark' if dark else 'light'}.png"
            (IMAGES / name).write_bytes(await page.picture())
    await page.look(width=390, height=800)
    await page.click('nav a[href="#fleet"]')
    await asyncio.sleep(1.5)
    (IMAGES / "ui-phone.png").write_bytes(await page.picture())
    await page.click('nav a[href="#residency"]')
    await asyncio.sleep(1.5)
    (IMAGES / "ui-phone-residency.png").write_bytes(await page.picture())


if __name__ == "__main__":
    asyncio.run(main())
