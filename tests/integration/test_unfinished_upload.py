"""A refusal for an upload in progress says when to ask again, and ends with the upload."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from tests.harness import chat_body, cluster, make_adapter, sim_config

LIMIT_S = 30  # the next listing would come after an hour


async def test_a_422_for_half_an_upload_has_retry_after_and_ends_with_the_upload(
    tmp_path: Path,
) -> None:
    whole = make_adapter(tmp_path, "whole")
    store = tmp_path / "adapters"
    half = store / "new"
    half.mkdir(parents=True)
    shutil.copy(whole / "adapter_config.json", half)
    body = chat_body("sim:new", max_tokens=2)
    async with cluster(sim_config(store, catalog_refresh_s=3600.0), tmp_path) as c:
        await c.start_worker("w0")
        url = f"{c.url}/v1/chat/completions"
        for _ in range(3):  # the first look at the store and the ones that follow the refusal
            async with c.http.post(url, json=body) as answer:
                assert answer.status == 422, await answer.text()
                assert answer.headers["Retry-After"] == "2"
                code = (await answer.json())["error"]["code"]
                assert code == "invalid_adapter_missing_file"
        shutil.copy(whole / "adapter_model.safetensors", half)
        async with asyncio.timeout(LIMIT_S):
            while True:
                async with c.http.post(url, json=body) as answer:
                    if answer.status == 200:
                        return
                    assert answer.status == 422 and "Retry-After" in answer.headers
