"""Shell. The page at /ui in a real browser, with a gateway and simulated workers: what it shows is
what /admin says.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.browser import Page, browser
from tests.harness import STOP_S, Cluster, cluster, make_adapter, sim_config

HOSTILE = (
    "<img src=x onerror=window.hit=1>",
    "<script>window.hit=2<script>",
    '"onmouseover="window.hit=3',
    "javascript:window.hit=4",
    "${window.hit=5}",
    "&lt;b&gt;",
)
pytestmark = pytest.mark.xdist_group("browser")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def page() -> AsyncIterator[Page]:
    async with browser() as found:
        yield found


@pytest_asyncio.fixture
async def two(tmp_path: Path, adapters: Path) -> AsyncIterator[Cluster]:
    """Adapters a, b, team/d; two workers with two slots each; four requests have ended."""
    for name in ("a", "b", "team/d"):
        make_adapter(adapters, name)
    async with cluster(sim_config(adapters, max_loras=2, sim={"load_ms": 30}), tmp_path) as c:
        for worker in ("w0", "w1"):
            await c.start_worker(worker)
        while len((await c.get("/v1/models"))[1]["data"]) < 4:
            await asyncio.sleep(0.02)
        for n, model in enumerate(("sim:a", "sim:a", "sim:b", "sim")):
            headers = {"x-request-id": f"r{n}"}
            body = {"model": model, "messages": [{"role": "user", "content": "x"}]}
            assert (await c.post("/v1/chat/completions", body, headers))[0] == 200
        yield c


@pytest_asyncio.fixture
async def ui(two: Cluster, page: Page) -> AsyncIterator[Page]:
    """The page of `two`. At its end the test checks for errors, violations of its policy, and
    foreign hosts.
    """
    await page.open("about:blank")
    page.asked.clear()
    page.complaints.clear()
    await page.look(width=1280, height=900)
    await page.open(f"{two.url}/ui")
    yield page
    assert page.complaints == []
    assert [url for url in page.asked if not url.startswith((two.url, "data:", "about:"))] == []
    await page.open("about:blank")


async def view(page: Page, name: str) -> None:
    await page.click(f'nav a[href="#{name}"]')
    await page.until(f"location.hash === '#{name}'")


async def test_the_fleet_shows_every_worker_as_admin_has_it(two: Cluster, ui: Page) -> None:
    await ui.until("document.querySelectorAll('#workers tbody tr').length", lambda n: n == 2)
    for worker in ("w0", "w1"):
        shown = await ui.text(f'tr[data-worker="{worker}"]')
        assert "serving" in shown and "/ 2" in shown
    _, scaling = await two.get("/admin/autoscale")
    assert scaling["models"]["sim"]["present"] == 2
    assert (await ui.text(".card .big")).startswith("2")


async def test_the_matrix_shows_each_adapter_in_its_tier_and_a_pin_is_done_by_a_button(
    two: Cluster, ui: Page
) -> None:
    await view(ui, "residency")
    for name in ("a", "b", "team/d"):
        where = {
            w["worker"]: w["tier"] for w in (await two.get(f"/admin/adapters/{name}"))[1]["workers"]
        }
        line = f"document.querySelector('[data-adapter=\"{name}\"]')"
        await ui.until(f"!!{line}")
        for worker in ("w0", "w1"):
            cell = f"{line}.querySelector('[aria-label^=\"{worker}:\"]').className"
            kind = where.get(worker, "none")
            await ui.until(cell, lambda found, kind=kind: kind in found.split())
    assert (await ui.text('[data-adapter="a"] .hits')) == "2"
    await ui.click('[data-adapter="a"] button')
    await ui.click('#adapter [data-action="pin"]')
    await ui.until("document.querySelector('#adapter .note')?.innerText", _says("pin: done"))
    _, row = await two.get("/admin/adapters/a")
    assert row["to_be_pinned"] == "everywhere"
    await ui.until("document.querySelectorAll('[data-adapter=\"a\"] .pinned').length", _is(2))
    await ui.type("#search", "team")
    await ui.until("document.querySelectorAll('[data-adapter]').length", _is(1))


async def test_what_lies_on_a_hosts_disk_alone_is_shown_so(two: Cluster, ui: Page) -> None:
    cells = (
        "[...document.querySelectorAll('[data-adapter=\"team/d\"] .cell')].map((c) => c.ariaLabel)"
    )
    await view(ui, "residency")
    assert await ui.until(cells, len) == ["w0: not here", "w1: not here"]
    await ui.click('[data-adapter="team/d"] button')
    await ui.until("document.querySelector('#adapter dl')?.innerText", _says("as far as known"))
    await ui.click('#adapter [data-action="prefetch"]')
    await ui.until("document.querySelector('#adapter .note')?.innerText", _says("prefetch: done"))
    await ui.until(cells, _is(["w0: on disk", "w1: on disk"]))
    _, row = await two.get("/admin/adapters/team/d")
    (host,) = row["on_disk"]
    assert row["state"] == "cached" and row["workers"] == []
    await ui.until("document.querySelector('#adapter dl')?.innerText", _says(host[:10]))


async def test_requests_are_listed_filtered_and_told_one_by_one(two: Cluster, ui: Page) -> None:
    await view(ui, "requests")
    rows = "[...document.querySelectorAll('#requests tbody tr')].map((r) => r.dataset.request)"
    assert await ui.until(rows, len) == ["r3", "r2", "r1", "r0"]
    await ui.type('input[name="adapter"]', "a")
    await ui.until(rows, _is(["r1", "r0"]))
    await ui.click('[data-request="r0"] button')
    told = await ui.text("#timeline ul")
    _, timeline = await two.get("/admin/requests/r0")
    assert timeline["faster"][0] in told
    assert timeline["words"][0] in await ui.text("#timeline")
    chosen = await ui.text("#timeline .chosen")
    assert timeline["worker"] in chosen


async def test_the_last_hour_is_drawn_from_the_gateways_own_memory(two: Cluster, ui: Page) -> None:
    await view(ui, "time")
    latest = "document.querySelector('[data-chart=\"requests_per_s\"] b')?.innerText.trim()"
    shown = await ui.until(latest, lambda now: now not in (None, "–"))
    _, hour = await two.get("/admin/series")
    values = [v for v in hour["series"]["requests_per_s"] if v]
    assert float(shown) <= max(values) + 0.1 and sum(values) * hour["step_s"] == pytest.approx(4)


async def test_ten_seconds_that_are_not_over_are_not_shown_as_the_latest(ui: Page) -> None:
    """A second into them, a rate over all ten would be a tenth of what it is."""
    await ui.run(
        "(() => { const real = window.fetch; window.fetch = async (path, given) => {"
        "  const answer = await real(path, given);"
        "  if (path !== '/admin/series') return answer;"
        "  const hour = await answer.json();"
        "  hour.series.requests_per_s.splice(-3, 3, 20, 20, 2);"
        "  return new Response(JSON.stringify(hour)); }; })()"
    )
    await view(ui, "time")
    shown = "document.querySelector('[data-chart=\"requests_per_s\"] b')?.innerText.trim()"
    await ui.until(shown)
    assert await ui.run(shown) == "20"


async def test_two_models_answer_side_by_side_in_the_playground(two: Cluster, ui: Page) -> None:
    await view(ui, "playground")
    await ui.until("document.querySelectorAll('#side-1 option').length", _is(4))
    await ui.click("#ask")
    for side in (0, 1):
        await ui.until(f"document.querySelector('#side-{side} .answer').innerText.length > 5")
        facts = await ui.until(
            f"document.querySelector('#side-{side} .facts').innerText", _says("ms")
        )
        assert "w0" in facts or "w1" in facts
    assert two.url in str(await ui.run("document.querySelector('#side-0 pre').textContent"))


async def test_keys_have_their_usage(two: Cluster, ui: Page) -> None:
    await view(ui, "keys")
    shown = await ui.text("#usage tbody")
    _, found = await two.get("/admin/usage?by=key,base,adapter")
    assert len(found["usage"]) == 3
    for used in found["usage"]:
        model = f"{used['base']}:{used['adapter']}" if used["adapter"] else used["base"]
        line = next(line for line in shown.splitlines() if f"\t{model}\t" in line)
        assert line.split("\t")[2:] == [
            str(used[n]) for n in ("requests", "prompt_tokens", "output_tokens")
        ]


async def test_of_ten_thousand_usages_the_largest_are_shown_and_seldom_asked_for(
    two: Cluster, ui: Page
) -> None:
    await ui.run(
        "(() => { const real = window.fetch; window.fetch = (path, given) => {"
        "  if (!path.startsWith('/admin/usage')) return real(path, given);"
        "  window.summed = (window.summed ?? 0) + 1;"
        "  const usage = [...Array(10000).keys()].map((n) => ({key: 'k', base: 'sim',"
        "    adapter: `a${n}`, requests: 1, prompt_tokens: 1, output_tokens: 10000 - n}));"
        "  return Promise.resolve(new Response(JSON.stringify({usage}))); }; })()"
    )
    await view(ui, "keys")
    await ui.until("document.querySelectorAll('#usage tbody tr').length", _is(200))
    assert "sim:a199\t" in await ui.text("#usage tbody")
    async with asyncio.timeout(STOP_S):
        while sum(url.endswith("/admin/keys") for url in ui.asked) < 3:
            await asyncio.sleep(0.05)
    assert await ui.run("window.summed") == 1


async def test_names_of_adapters_stay_text(two: Cluster, adapters: Path, ui: Page) -> None:
    for name in HOSTILE:
        make_adapter(adapters, name)
    async with asyncio.timeout(STOP_S):
        while len((await two.get("/admin/adapters"))[1]["adapters"]) < 3 + len(HOSTILE):
            await asyncio.sleep(0.05)
    for name in HOSTILE:
        assert (await two.chat(f"sim:{name}", max_tokens=1))[0] == 200
    await view(ui, "residency")
    names = "[...document.querySelectorAll('[data-adapter] button')].map((b) => b.textContent)"
    await ui.until(names, lambda shown: set(HOSTILE) <= set(shown or ()))
    await ui.run("[...document.querySelectorAll('[data-adapter] button')].at(-1).click()")
    await ui.text("#adapter dl")
    await view(ui, "requests")
    models = "[...document.querySelectorAll('#requests td:nth-child(3)')].map((c) => c.textContent)"
    await ui.until(models, lambda shown: {f"sim:{n}" for n in HOSTILE} <= set(shown or ()))
    await view(ui, "playground")
    await ui.until("document.querySelectorAll('#side-0 option').length", _is(4 + len(HOSTILE)))
    assert await ui.run("window.hit ?? 0") == 0
    assert await ui.run("document.querySelectorAll('main img, main script').length") == 0


async def test_the_key_is_asked_for_and_kept_nowhere(
    tmp_path: Path, adapters: Path, page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_ADMIN_KEYS", "the-admin-key")
    config = sim_config(adapters, admin_keys_env="TEST_ADMIN_KEYS")
    async with cluster(config, tmp_path) as c:
        async with c.http.get(f"{c.url}/ui") as answer:
            assert answer.status == 200 and answer.headers["Cache-Control"] == "no-store"
            policy = answer.headers["Content-Security-Policy"]
            assert "unsafe" not in policy and policy.startswith("default-src 'none'")
        for path in ("/admin/live", "/admin/requests", "/admin/series", "/admin/keys"):
            assert (await c.get(path))[0] == 401
        await page.open(f"{c.url}/ui")
        await page.type("#key", "wrong")
        await page.click(".key button")
        await page.until("document.querySelector('.key .note')?.innerText", _says("admin key"))
        await page.type("#key", "the-admin-key")
        await page.click(".key button")
        await page.until("document.querySelector('h2')?.innerText", _is("Fleet"))
        kept = (
            "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, "
            "location.href])"
        )
        assert "the-admin-key" not in await page.run(kept)
        await page.open("about:blank")


async def test_a_key_that_has_expired_is_shown_so_and_times_say_their_zone(
    tmp_path: Path, adapters: Path, page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_ADMIN_KEYS", "the-admin-key")
    keys = tmp_path / "keys.yaml"
    keys.write_text(
        f"keys:\n- {{name: old, sha256: {'a' * 64}, expires: 2020-01-01}}\n"
        f"- {{name: new, sha256: {'b' * 64}, expires: 2999-01-01}}\n"
    )
    config = sim_config(adapters, admin_keys_env="TEST_ADMIN_KEYS", keys_file=str(keys))
    async with cluster(config, tmp_path) as c:
        await page.open(f"{c.url}/ui")
        await page.type("#key", "the-admin-key")
        await page.click(".key button")
        await view(page, "keys")
        shown = "[...document.querySelectorAll('main tbody td:last-child')].map((d) => d.innerText)"
        expected = ["2999-01-01 00:00 UTC", "expired 2020-01-01 00:00 UTC"]
        await page.until(f"{shown}.sort()", _is(expected))
        await page.open("about:blank")


async def test_what_was_answered_whole_is_told_without_a_first_token(
    two: Cluster, ui: Page
) -> None:
    await view(ui, "requests")
    await ui.click('[data-request="r0"] button')
    told = await ui.text("#timeline h4 + p")
    assert told.startswith("Its cost was put at ") and "first token" not in told and "–" not in told


async def test_a_thousand_adapters_on_sixty_four_workers_stay_smooth(ui: Page) -> None:
    """The page's own work for a step of scrolling. A reader notices 100 ms."""
    await ui.run((Path(__file__).parent / "big_fleet.js").read_text())
    await view(ui, "residency")
    await ui.until("document.querySelector('#matched')?.innerText", _says("1,000 adapters, 64"))
    lines = await ui.run("document.querySelectorAll('[data-adapter]').length")
    assert 0 < lines < 60
    await ui.run("document.querySelector('.matrix').scrollTop = 14000")
    await ui.until("document.querySelector('[data-adapter=\"a0500\"]') !== null")
    assert await ui.run("document.querySelectorAll('[data-adapter]').length") < 60


async def test_of_more_adapters_than_it_lists_the_matrix_says_so(ui: Page) -> None:
    await ui.run(
        "(() => { const real = window.fetch; window.fetch = (path, given) => {"
        "  if (!path.startsWith('/admin/adapters?')) return real(path, given);"
        "  const from = Number(new URL(path, location).searchParams.get('after').slice(5));"
        "  const adapters = [...Array(1000).keys()].map((n) => ({base: 'sim',"
        "    name: `a${String(from + n + 1).padStart(5, '0')}`, hits: 0, state: 'listed'}));"
        "  const next = from < 11000 ? `sim:a${String(from + 1000).padStart(5, '0')}` : null;"
        "  return Promise.resolve(new Response(JSON.stringify({adapters, next}))); }; })()"
    )
    await view(ui, "residency")
    await ui.until(
        "document.querySelector('#matched')?.innerText ?? ''", _says("the first 10,000 adapters")
    )
    await ui.type("#search", "a11000")
    await ui.until("document.querySelector('.empty')?.innerText", _says("No adapter of these"))


def _says(part: str) -> Any:
    return lambda seen: part in (seen or "")


def _is(value: object) -> Any:
    return lambda seen: seen == value
