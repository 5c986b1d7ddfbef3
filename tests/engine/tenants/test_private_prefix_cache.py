"""Shell. Tenants who share an engine but not its prefix cache, over HTTP and on real vLLM."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
import yaml

from shared.runtime.children import Zygote
from tests.engine.requests.test_resume import Sent
from tests.harness import Cluster, cluster, demo_config
from tests.integration.admin.test_accounts import bearer, keys_file
from worker.engine.base import EngineRequest

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
WORDS = 200
"""Of a prompt: more tokens than two blocks of the cache hold."""
RELOADED_S = 60.0

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def shared(
    zygote: Zygote, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Cluster]:
    folder = tmp_path_factory.mktemp("private")
    keys = keys_file(folder / "keys.yaml", red={}, blue={})
    config = demo_config(keys_file=str(keys), private_prefix_cache=True)
    async with cluster(config, folder, zygote) as c:
        await c.start_worker("w0")
        yield c


def prompt(name: str) -> str:
    return name + " and then" * WORDS


async def cached(c: Cluster, key: str, text: str, **more: Any) -> int:
    """The tokens of the prompt that vLLM had in its cache."""
    body = {"model": "demo", "input": text, "max_output_tokens": 2, **more}
    status, answer, _ = await c.post("/v1/responses", body, bearer(key))
    assert status == 200, answer
    found: int = answer["usage"]["input_tokens_details"]["cached_tokens"]
    return found


@pytest.mark.parametrize("model", ["demo", "demo:pirate"])
async def test_a_prompt_of_one_tenant_is_not_in_the_cache_of_another(
    shared: Cluster, model: str
) -> None:
    text = prompt("first")
    assert await cached(shared, "red", text, model=model) == 0
    assert await cached(shared, "blue", text, model=model) == 0
    assert await cached(shared, "red", text, model=model) > 0


async def test_a_tenant_cannot_name_the_cache_of_another(shared: Cluster) -> None:
    from worker.engine.vllm.tenants.cache_salt import salt_of

    text = prompt("named")
    await cached(shared, "red", text)
    for salt in ("red", "red,", salt_of("red", "")):
        assert await cached(shared, "blue", text, cache_salt=salt) == 0


async def test_a_client_s_own_salt_parts_its_tenant_s_cache(shared: Cluster) -> None:
    text = prompt("own salt")
    await cached(shared, "red", text, cache_salt="one")
    assert await cached(shared, "red", text) == 0
    assert await cached(shared, "red", text, cache_salt="two") == 0
    assert await cached(shared, "red", text, cache_salt="one") > 0


async def test_without_the_setting_tenants_share_it(shared: Cluster) -> None:
    gateway = {**shared.config["gateway"], "private_prefix_cache": False}
    (shared.folder / "config.yaml").write_text(
        yaml.safe_dump({**shared.config, "gateway": gateway})
    )
    found = number = 0
    async with asyncio.timeout(RELOADED_S):
        while not found:
            text, number = prompt(f"shared {number}"), number + 1
            await cached(shared, "red", text)
            found = await cached(shared, "blue", text)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {**HELLO, "stream": True}),
        (CHAT, HELLO),
        (CHAT, {**HELLO, "n": 3}),
        (CHAT, {**HELLO, "logprobs": True, "stream": True}),
        (CHAT, {**HELLO, "cache_salt": "mine"}),
        ("/v1/messages", HELLO),
        ("/v1/responses", {"input": "hello", "max_output_tokens": 2, "stream": True}),
        ("/v1/responses", {"input": "hello", "max_output_tokens": 2, "background": True}),
        ("/v1/completions", {"prompt": ["hello", "you"], "max_tokens": 2}),
        ("/v1/completions", {"prompt": [5, 6], "max_tokens": 2, "use_beam_search": True, "n": 2}),
        ("/v1/completions", {"prompt": "hello", "max_tokens": 0, "echo": True, "logprobs": 1}),
    ],
)
@pytest.mark.parametrize("tenant", ["red", ""])
async def test_every_prompt_reaches_the_engine_with_its_tenant_s_salt(
    engine: Any, path: str, body: dict[str, Any], tenant: str
) -> None:
    from vllm.v1.engine import EngineCoreRequest

    from worker.engine.vllm.tenants.cache_salt import salt_of

    core = engine._engine.engine_core
    send, salts = core._send_input, []

    def seen(kind: Any, request: Any, *more: Any) -> Any:
        if isinstance(request, EngineCoreRequest):
            salts.append(request.cache_salt)
        return send(kind, request, *more)

    core._send_input = seen
    reply = Sent()
    asked = json.dumps({"model": "demo", **body}).encode()
    try:
        await engine.serve(
            EngineRequest(path, "r", asked, None, answer_id="resp_1", cache_salt=tenant), reply
        )
    finally:
        core._send_input = send
    assert reply.status == 200, reply.data()
    own = body.get("cache_salt")
    assert salts and set(salts) == {salt_of(tenant, own or "") if tenant else own}
