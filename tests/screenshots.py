"""Shell. `make screenshots`: the pictures of docs/UI.md, of a gateway with simulated workers under
a little load.
"""

from __future__ import annotations

import asyncio
import io
import random
import tempfile
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image

from tests.browser import Page, browser
from tests.harness import ROOT, Cluster, chat_body, cluster, make_adapter, sim_config

IMAGES = ROOT / "docs" / "images"
STYLES = ("formal", "legal", "pirate", "haiku", "support", "json", "sql", "summary", "german")
TEAMS = ("acme", "globex", "initech")
ADAPTERS = [f"{team}/{style}" for team in TEAMS for style in STYLES]
WORKERS = ("gpu-0", "gpu-1", "gpu-2", "gpu-3")
LOADED_FOR_S = 45.0
CLIENTS = 10
VIEWS = ("fleet", "residency", "requests", "time", "playground", "keys")
KEYS = """
keys:
  - name: acme
    sha256: {0}
    adapters: ["acme/*"]
    limits: {{requests_per_minute: 900, tokens_per_minute: 60000}}
  - name: globex
    sha256: {1}
    adapters: ["globex/*"]
    weight: 2
    limits: {{concurrent_requests: 20}}
  - name: initech
    sha256: {2}
    adapters: ["initech/*"]
    expires: 2030-01-01
    limits: {{requests_per_minute: 60}}
"""
ADMIN = "the-admin-key"
ADMIN_HEADER = {"Authorization": f"Bearer {ADMIN}"}
SIM = {"load_ms": 120.0, "ttft_ms": 30.0, "itl_ms": 12.0}


async def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "adapters"
        for name in ADAPTERS:
            make_adapter(store, name)
        keys = Path(folder) / "keys.yaml"
        keys.write_text(KEYS.format(*(sha256(team.encode()).hexdigest() for team in TEAMS)))
        admins = Path(folder) / "admins"
        admins.write_text(f"{ADMIN}\n")
        files = {"keys_file": str(keys), "admin_keys_file": str(admins)}
        config = sim_config(store, max_loras=6, sim=SIM, **files)
        async with cluster(config, Path(folder)) as c:
            for worker in WORKERS:
                await c.start_worker(worker)
            async with browser() as page:
                clients = [asyncio.create_task(_client(c, n)) for n in range(CLIENTS)]
                await asyncio.sleep(LOADED_FOR_S)
                await c.post("/admin/adapters/acme/legal/pin?base=sim", b"", ADMIN_HEADER)
                await _pictures(c, page)
                for client in clients:
                    client.cancel()


def _small(picture: bytes) -> bytes:
    """With its 256 most frequent colours, which are enough for a page, and fewer bytes. These stay
    as they are: with colours of Pillow's choice, backgrounds had another tint in each picture.
    """
    made = io.BytesIO()
    with Image.open(io.BytesIO(picture)) as opened:
        pixels = np.asarray(opened.convert("RGB"), np.int32)
    colours, of_pixel, counts = np.unique(
        pixels.reshape(-1, 3), axis=0, return_inverse=True, return_counts=True
    )
    palette = colours[np.argsort(-counts)[:256]]
    nearest = (np.abs(colours[:, None] - palette).sum(2)).argmin(1).astype(np.uint8)
    image = Image.fromarray(nearest[of_pixel].reshape(pixels.shape[:2]))
    image.putpalette(palette.astype(np.uint8).tobytes())
    image.save(made, "PNG", optimize=True)
    return made.getvalue()


async def _client(c: Cluster, seed: int) -> None:
    rng = random.Random(seed)
    weights = [1 / (n + 1) for n in range(len(ADAPTERS))]
    while True:
        adapter = rng.choices(ADAPTERS, weights)[0]
        key = {"Authorization": f"Bearer {adapter.partition('/')[0]}"}
        model = f"sim:{adapter}" if rng.random() < 0.9 else "sim"
        body = chat_body(model, max_tokens=rng.randint(10, 80), stream=True)
        await c.post("/v1/chat/completions", body, key)
        await asyncio.sleep(rng.random() * 0.3)


async def _pictures(c: Cluster, page: Page) -> None:
    await page.look(width=1280, height=820)
    await page.open(f"{c.url}/ui")
    await page.type("#key", ADMIN)
    await page.press("Enter")
    for view in VIEWS:
        await page.click(f'nav a[href="#{view}"]')
        await asyncio.sleep(2.5)
        if view == "playground":
            await page.type('.ask input[type="password"]', "acme")
            await page.run("document.activeElement.blur()")
            await page.until("document.querySelectorAll('#side-1 option').length > 5")
            await page.click("#ask")
            await asyncio.sleep(2.5)
        if view == "requests":
            await page.click("#requests tbody button")
            await page.text("#timeline")
            await page.run("document.querySelector('#timeline').scrollIntoView({block: 'end'})")
        for dark in (False, True):
            await page.look(width=1280, height=820, dark=dark)
            await asyncio.sleep(0.5)
            name = f"ui-{view}-{'dark' if dark else 'light'}.png"
            (IMAGES / name).write_bytes(_small(await page.picture()))
    await page.look(width=390, height=800)
    await page.click('nav a[href="#fleet"]')
    await asyncio.sleep(1.5)
    (IMAGES / "ui-phone.png").write_bytes(_small(await page.picture()))
    await page.click('nav a[href="#residency"]')
    await asyncio.sleep(1.5)
    (IMAGES / "ui-phone-residency.png").write_bytes(_small(await page.picture()))


if __name__ == "__main__":
    asyncio.run(main())
