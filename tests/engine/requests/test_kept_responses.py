"""Shell. A kept answer of `/v1/responses` is its owner's: to another key it does not exist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shared.runtime.children import Zygote
from tests.harness import Cluster, cluster, demo_config
from tests.integration.admin.test_accounts import bearer, keys_file

PATH = "/v1/responses"
pytestmark = pytest.mark.asyncio(loop_scope="session")


async def ask(c: Cluster, key: str, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    async with c.http.request(method, c.url + path, json=body, headers=bearer(key)) as answer:
        return answer.status, await answer.json()


async def test_a_kept_answer_is_404_for_another_key_in_the_words_for_one_that_is_gone(
    zygote: Zygote, tmp_path: Path
) -> None:
    keys = keys_file(tmp_path / "keys.yaml", red={}, blue={})
    async with cluster(demo_config(keys_file=str(keys)), tmp_path, zygote) as c:
        await c.start_worker("w0", serving=False)
        await c.until_serving("w0")
        asked = {"model": "demo", "input": "Hi", "temperature": 0, "max_output_tokens": 4}
        status, made = await ask(c, "red", "POST", PATH, asked)
        assert status == 200
        one, gone = f"{PATH}/{made['id']}", f"{PATH}/resp_{'0' * 32}"
        assert (await ask(c, "red", "GET", one))[1]["id"] == made["id"]
        for method, end in (("GET", ""), ("POST", "/cancel")):
            status, refused = await ask(c, "blue", method, one + end)
            never = (await ask(c, "blue", method, gone + end))[1]
            assert status == 404
            told = refused["error"]["message"].replace(made["id"], "ID")
            assert told == never["error"]["message"].replace(f"resp_{'0' * 32}", "ID")
        more = asked | {"previous_response_id": made["id"]}
        assert (await ask(c, "blue", "POST", PATH, more))[0] == 404
        assert (await ask(c, "red", "POST", PATH, more))[0] == 200
        assert (await ask(c, "red", "GET", one))[0] == 200  # blue's cancel has touched nothing
