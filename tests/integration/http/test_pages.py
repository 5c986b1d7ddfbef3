"""Shell. What pages of other origins may do with a gateway that has keys, in a real browser."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from tests.browser import Page, browser
from tests.harness import cluster, make_adapter, sim_config
from tests.integration.admin.test_accounts import keys_file

pytestmark = [pytest.mark.xdist_group("browser"), pytest.mark.asyncio(loop_scope="session")]
CALLS = """
(async () => {
  const gateway = %r, key = {Authorization: 'Bearer red'}
  const json = {...key, 'Content-Type': 'application/json', 'Idempotency-Key': 'k1'}
  const ask = (path, more = {}) => fetch(gateway + path, {headers: key, ...more})
  const chat = more => ask('/v1/chat/completions', {method: 'POST', headers: json, body:
    JSON.stringify({model: 'sim:pirate', max_tokens: 4,
                    messages: [{role: 'user', content: 'hi'}], ...more})})
  const answer = await chat({})
  delete json['Idempotency-Key']
  const stream = (await chat({stream: true})).body.getReader()
  let text = ''
  for (let part; !(part = await stream.read()).done;) text += new TextDecoder().decode(part.value)
  const form = new FormData()
  form.append('purpose', 'batch')
  form.append('file', new Blob(['{}']), 'in.jsonl')
  const file = await (await ask('/v1/files', {method: 'POST', body: form})).json()
  const gone = await ask('/v1/files/' + file.id, {method: 'DELETE'})
  const nobody = await chat({model: 'sim:nobody'})
  const wrong = await ask('/v1/models', {headers: {Authorization: 'Bearer wrong'}})
  return {
    whole: (await answer.json()).choices[0].message.content,
    worker: answer.headers.get('x-loraplex-worker'),
    done: text.endsWith('data: [DONE]\\n\\n'),
    models: (await (await ask('/v1/models')).json()).data.map(m => m.id),
    deleted: (await gone.json()).deleted,
    missing: [nobody.status, (await nobody.json()).error.code],
    unkeyed: [wrong.status, (await wrong.json()).error.code],
    paths: Object.keys((await (await ask('/openapi.json')).json()).paths).length > 0,
  }
})()
"""
REFUSED = """
fetch(%r, {headers: {Authorization: 'Bearer red'}}).then(() => 'read', error => error.name)
"""


@pytest_asyncio.fixture(loop_scope="session")
async def page() -> AsyncIterator[Page]:
    async with browser() as found:
        yield found


@pytest_asyncio.fixture(loop_scope="session")
async def origins() -> AsyncIterator[list[str]]:
    """Two addresses of an empty page. To a browser each is an origin of its own."""

    async def empty(request: web.BaseRequest) -> web.Response:
        return web.Response(text="<!doctype html>", content_type="text/html")

    runner = web.ServerRunner(web.Server(empty))
    await runner.setup()
    for _ in range(2):
        await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield [f"http://127.0.0.1:{address[1]}" for address in runner.addresses]
    await runner.cleanup()


async def at(page: Page, origin: str, script: str) -> Any:
    await page.open(origin)
    await page.until(f"location.origin === '{origin}' && document.readyState === 'complete'")
    return await page.run(script)


async def test_a_page_of_an_allowed_origin_does_all_that_a_client_does_and_no_other_page_may(
    page: Page, origins: list[str], tmp_path: Path
) -> None:
    friend, stranger = origins
    make_adapter(tmp_path / "adapters", "pirate")
    keys = keys_file(tmp_path / "keys.yaml", red={})
    config = sim_config(tmp_path / "adapters", keys_file=str(keys), allowed_origins=[friend])
    async with cluster(config, tmp_path) as c:
        await c.start_worker("w0")
        found = await at(page, friend, CALLS % c.url)
        assert "adapter=pirate" in found.pop("whole")
        assert found == {
            "worker": "w0",
            "done": True,
            "models": ["sim", "sim:pirate"],
            "deleted": True,
            "missing": [404, "adapter_not_found"],
            "unkeyed": [401, "invalid_api_key"],
            "paths": True,
        }
        assert await at(page, stranger, REFUSED % f"{c.url}/v1/models") == "TypeError"
        assert await at(page, friend, REFUSED % f"{c.url}/metrics") == "TypeError"
