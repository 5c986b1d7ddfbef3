"""Shell. The page at /ui in a real browser, with real vLLM: each view shows what /admin says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shared.runtime.children import Zygote
from tests.browser import Page, browser
from tests.harness import Cluster, chat_body, cluster, demo_config

pytestmark = pytest.mark.long


def _number(text: str) -> float:
    return float(text.split()[0].replace(",", ""))


async def _view(page: Page, name: str) -> None:
    await page.click(f'nav a[href="#{name}"]')
    await page.until(f"location.hash === '#{name}'")


async def _asked(c: Cluster, model: str, name: str) -> None:
    body = chat_body(model, "Hello!", stream=True, max_tokens=24, ignore_eos=True)
    headers = {"x-request-id": name}
    status, _, _ = await c.post("/v1/chat/completions", body, headers)
    assert status == 200


async def test_every_view_shows_true_figures_of_real_vllm(zygote: Zygote, tmp_path: Path) -> None:
    async with cluster(demo_config(max_loras=2), tmp_path, zygote) as c, browser() as page:
        await c.start_worker("w0")
        for number, model in enumerate(("demo:pirate", "demo:pirate", "demo")):
            await _asked(c, model, f"r{number}")
        await page.look(width=1280, height=900)
        await page.open(f"{c.url}/ui")
        await _fleet(c, page)
        await _residency(c, page)
        await _requests(c, page)
        await _time_and_usage(c, page)
        await _playground(page)
        assert page.complaints == []


async def _fleet(c: Cluster, page: Page) -> None:
    shown = await page.text('tr[data-worker="w0"]')
    slots = await c.metric("loraplex_worker_slots", worker="w0")
    assert "serving" in shown and f"0 / {slots:.0f} busy" in shown and "1 full" in shown, shown
    step_ms = await page.run("document.querySelector('#workers td:nth-child(8)').innerText")
    assert _number(step_ms) > 0


async def _residency(c: Cluster, page: Page) -> None:
    await _view(page, "residency")
    _, row = await c.get("/admin/adapters/pirate")
    tier = row["workers"][0]["tier"]
    cell = "document.querySelector('[data-adapter=\"pirate\"] .cell')?.className"
    assert tier == "gpu"
    await page.until(cell, lambda shown: tier in (shown or "").split())  # the page's next second
    await page.click('[data-adapter="pirate"] button')
    facts = await page.text("#adapter dl")
    assert row["digest"][:12] in facts and f"rank {row['rank']}" in facts and "2 in all" in facts
    await page.click('#adapter [data-action="pin"]')
    await page.until(
        "document.querySelector('#adapter .note')?.innerText", lambda s: "done" in (s or "")
    )
    pinned = "document.querySelectorAll('[data-adapter=\"pirate\"] .pinned').length"
    await page.until(pinned, lambda count: count == 1)
    assert (await c.get("/admin/adapters/pirate"))[1]["workers"][0]["pinned"]


async def _requests(c: Cluster, page: Page) -> None:
    await _view(page, "requests")
    for name in ("r0", "r1", "r2"):
        _, told = await c.get(f"/admin/requests/{name}")
        cells = f"[...document.querySelectorAll('[data-request={name}] .n')]"
        shown = await page.until(f"{cells}.map((cell) => cell.innerText)", bool)
        assert _number(shown[0]) == pytest.approx(told["ttft_ms"], abs=0.5), (shown, told)
        assert told["output_tokens"] == 24
    cold = (await c.get("/admin/requests/r0"))[1]["phases_ms"]
    bar = await page.run("document.querySelector('[data-request=r0] .bars').title")
    assert cold["fetch"] + cold["check"] + cold["load"] > 0 and "load" in bar, (cold, bar)


async def _time_and_usage(c: Cluster, page: Page) -> None:
    await _view(page, "time")
    for chart in ("ttft_warm_p50_ms", "itl_ms", "output_tokens_per_s"):
        drawn = json.dumps(f'[data-chart="{chart}"] :is(polyline, circle)')
        await page.until(f"document.querySelector({drawn}) !== null")
    await _view(page, "keys")
    _, found = await c.get("/admin/usage?by=key,base,adapter")
    shown = await page.text("#usage tbody")
    for used in found["usage"]:
        assert str(used["output_tokens"]) in shown


async def _playground(page: Page) -> None:
    await _view(page, "playground")
    await page.until("document.querySelectorAll('#side-1 option').length > 1")
    await page.click("#ask")
    for side in (0, 1):
        facts = f"document.querySelector('#side-{side} .facts').innerText"
        shown = await page.until(facts, lambda text: "w0" in text and "– " not in text)
        assert "ms" in shown, shown
        await page.until(f"document.querySelector('#side-{side} .answer').innerText.length > 5")
