"""Shell. Keys as tenants see them: what each may use and how much, that it learns nothing of
others, and what the ledger says it used.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest_asyncio

from gateway.cli.main import main as loraplex
from tests.harness import Cluster, chat_body, cluster, make_adapter, sim_config

ADMIN = {"Authorization": "Bearer operator"}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def keys_file(path: Path, **keys: Mapping[str, Any]) -> Path:
    """A keys file in which the name of each key is also the key."""
    lines = ["keys:"]
    for name, more in keys.items():
        lines += [f"  - name: {name}", f"    sha256: {hashlib.sha256(name.encode()).hexdigest()}"]
        lines += [f"    {field}: {value}" for field, value in more.items()]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest_asyncio.fixture(loop_scope="session")
async def two_teams(tmp_path: Path, adapters: Path) -> AsyncIterator[Cluster]:
    for name in ("red-one", "red-two", "blue-one"):
        make_adapter(adapters, name)
    keys = keys_file(
        tmp_path / "keys.yaml",
        red={"adapters": '["red-*"]', "limits": "{requests_per_minute: 5, n: 2}"},
        blue={"adapters": '["blue-*"]', "limits": "{tokens_per_minute: 1000, output_tokens: 20}"},
    )
    (tmp_path / "admin").write_text("operator\n")
    config = sim_config(adapters, keys_file=str(keys), admin_keys_file=str(tmp_path / "admin"))
    async with cluster(config, tmp_path) as c:
        await c.start_worker("w0")
        yield c


async def ask(
    c: Cluster, key: str, model: str = "sim", **more: Any
) -> tuple[int, Any, Mapping[str, str]]:
    body = chat_body(model, **({"max_tokens": 4} | more))
    return await c.post("/v1/chat/completions", body, bearer(key))


async def get(c: Cluster, path: str, headers: Mapping[str, str]) -> tuple[int, str]:
    async with c.http.get(c.url + path, headers=headers) as answer:
        return answer.status, await answer.text()


async def usage(c: Cluster, by: str) -> list[dict[str, Any]]:
    async with c.http.get(c.url + f"/admin/usage?by={by}", headers=ADMIN) as answer:
        assert answer.status == 200, await answer.text()
        return list((await answer.json())["usage"])


async def test_a_tenant_sees_nothing_of_another_ones_adapters(two_teams: Cluster) -> None:
    c = two_teams
    for key, mine, other in (("red", "red-one", "blue-one"), ("blue", "blue-one", "red-one")):
        _, listed = await get(c, "/v1/models", bearer(key))
        assert f"sim:{mine}" in listed and other not in listed
        assert (await get(c, f"/v1/models/sim:{mine}", bearer(key)))[0] == 200
        forbidden = await get(c, f"/v1/models/sim:{other}", bearer(key))
        missing = await get(c, "/v1/models/sim:no-such", bearer(key))
        assert forbidden[0] == missing[0] == 404
        assert forbidden[1].replace(other, "NAME") == missing[1].replace("no-such", "NAME")
        status, body, _ = await ask(c, key, f"sim:{other}")
        assert status == 404 and body["error"]["code"] == "adapter_not_found"
        assert (await ask(c, key, f"sim:{mine}"))[0] == 200
    _, open_to_all = await get(c, "/metrics", {})
    _, to_tenant = await get(c, "/metrics", bearer("red"))
    _, to_operator = await get(c, "/metrics", ADMIN)
    for text in (open_to_all, to_tenant):
        assert "red-one" not in text and "blue" not in text and "loraplex_requests_total" in text
    assert (
        'loraplex_usage_output_tokens_total{adapter="red-one",base="sim",key="red"}' in to_operator
    )


async def test_limits_are_told_in_headers_and_what_is_refused_costs_nothing(
    two_teams: Cluster,
) -> None:
    c = two_teams
    status, _, headers = await ask(c, "red")
    assert status == 200 and headers["x-ratelimit-limit-requests"] == "5"
    assert headers["x-ratelimit-remaining-requests"] == "4"
    for refused in ({"n": 3}, {"model": "sim:none"}, {"max_tokens": "many"}):
        assert (await ask(c, "red", **refused))[0] in (400, 404)
    for left in (3, 2, 1, 0):
        _, _, headers = await ask(c, "red")
        assert headers["x-ratelimit-remaining-requests"] == str(left)
    status, body, headers = await ask(c, "red")
    assert status == 429 and body["error"]["code"] == "rate_limit_exceeded"
    assert int(headers["Retry-After"]) >= 1 and headers["x-ratelimit-remaining-requests"] == "0"
    assert (await ask(c, "blue"))[0] == 200


async def test_tokens_are_settled_with_what_was_used(two_teams: Cluster) -> None:
    c = two_teams
    _, body, headers = await ask(c, "blue", max_tokens=20)
    reserved = 1000 - int(headers["x-ratelimit-remaining-tokens"])
    used = body["usage"]["total_tokens"]
    _, _, headers = await ask(c, "blue", max_tokens=20)
    left = int(headers["x-ratelimit-remaining-tokens"])
    assert abs(left - (1000 - used - reserved)) <= 20  # the bucket fills meanwhile
    status, body, _ = await ask(c, "blue", max_tokens=21)
    assert status == 400 and body["error"]["param"] == "max_tokens"
    _, body, _ = await c.post(
        "/v1/chat/completions", chat_body("sim"), bearer("blue")
    )  # no limit of its own: the key's holds
    assert body["usage"]["completion_tokens"] == 20


async def test_the_ledger_has_what_an_open_stream_used_when_its_gateway_is_killed(
    two_teams: Cluster,
) -> None:
    c = two_teams
    assert c.gateway is not None
    model, heads = "sim:red-one", bearer("red")
    body = chat_body(model, max_tokens=4000, stream=True)

    async def noted() -> dict[str, Any]:
        found = [row for row in await usage(c, "key,adapter") if row["key"] == "red"]
        return found[0] if found else {"output_tokens": 0}

    async with c.http.post(c.url + "/v1/chat/completions", json=body, headers=heads) as answer:
        await answer.content.readany()
        async with asyncio.timeout(60):
            while not (before := await noted())["output_tokens"]:
                await asyncio.sleep(0.05)
        c.gateway.signal(signal.SIGKILL)
        await c.gateway.wait()
    await c.start_gateway()
    after = await noted()
    assert after["output_tokens"] >= before["output_tokens"] > 0
    assert after["requests"] == 0 and after["prompt_tokens"] > 0


async def test_a_stream_whose_parts_were_noted_is_counted_once(two_teams: Cluster) -> None:
    c = two_teams
    body = chat_body("sim:red-one", max_tokens=300, stream=True)
    body["stream_options"] = {"include_usage": True}
    _, events, _ = await c.post("/v1/chat/completions", body, bearer("red"))
    assert "data: [DONE]" in events
    async with asyncio.timeout(60):
        while not (found := await usage(c, "key,adapter")) or not found[0]["requests"]:
            await asyncio.sleep(0.05)
    told = json.loads(events.rstrip().split("data: ")[-2])["usage"]
    assert found[0]["output_tokens"] == told["completion_tokens"] == 300
    assert found[0]["prompt_tokens"] == told["prompt_tokens"] and found[0]["requests"] == 1


async def test_the_ledger_counts_whole_answers_and_those_whose_client_left(
    two_teams: Cluster,
) -> None:
    c = two_teams
    _, whole, _ = await ask(c, "red", "sim:red-one", max_tokens=7)
    body = chat_body("sim:red-two", max_tokens=4000, stream=True)
    async with c.http.post(
        c.url + "/v1/chat/completions", json=body, headers=bearer("red")
    ) as answer:
        async for _ in answer.content.iter_any():
            break  # and leaves
    async with asyncio.timeout(60):
        while len(found := await usage(c, "key,adapter")) < 2:
            await asyncio.sleep(0.05)
    by_adapter = {row["adapter"]: row for row in found if row["key"] == "red"}
    assert by_adapter["red-one"]["output_tokens"] == 7
    assert by_adapter["red-one"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]
    assert 0 < by_adapter["red-two"]["output_tokens"] < 4000
    assert (await get(c, "/admin/usage", bearer("red")))[0] == 403
    assert (await get(c, "/admin/usage?by=secret", ADMIN))[0] == 400
    assert (await get(c, "/admin/usage?since=yesterday", ADMIN))[0] == 400
    assert (await get(c, "/admin/usage?since=2020-01-01", ADMIN))[0] == 200


async def test_usage_outlives_a_gateway_that_is_killed(two_teams: Cluster) -> None:
    c, began = two_teams, time.monotonic()
    assert (await ask(c, "red"))[0] == 200
    async with asyncio.timeout(60):
        while not await usage(c, "key"):
            await asyncio.sleep(0.05)
    assert c.gateway is not None
    c.gateway.signal(signal.SIGKILL)
    await c.gateway.wait()
    await c.start_gateway()
    [row] = await usage(c, "key")
    assert row["requests"] == 1
    await c.until_serving("w0")
    _, _, headers = await ask(c, "red")
    refilled = (time.monotonic() - began) * 5 / 60
    # its limits were not reset
    assert int(headers["x-ratelimit-remaining-requests"]) <= 3 + refilled


async def test_keys_are_made_and_revoked_while_the_gateway_runs(
    two_teams: Cluster, tmp_path: Path, capsys: Any
) -> None:
    c, file = two_teams, str(tmp_path / "keys.yaml")
    assert loraplex(["keys", "new", "green", "--file", file, "--adapters", "blue-*"]) == 0
    key = capsys.readouterr().out.strip()
    assert key not in (tmp_path / "keys.yaml").read_text()
    async with asyncio.timeout(60):
        while (await get(c, "/v1/models", bearer(key)))[0] != 200:
            await asyncio.sleep(0.05)
    assert "red-one" not in (await get(c, "/v1/models", bearer(key)))[1]
    assert loraplex(["keys", "ls", "--file", file]) == 0
    shown = capsys.readouterr().out
    assert "green" in shown and "requests_per_minute=5" in shown and key not in shown
    assert loraplex(["keys", "new", "green", "--file", file]) == 2
    assert loraplex(["keys", "revoke", "green", "--file", file]) == 0
    async with asyncio.timeout(60):
        while (await get(c, "/v1/models", bearer(key)))[0] != 401:
            await asyncio.sleep(0.05)
    (tmp_path / "keys.yaml").write_text("keys: [broken")
    async with asyncio.timeout(60):
        while "keys not read again" not in c.gateway.output():  # type: ignore[union-attr]
            await asyncio.sleep(0.05)
    assert (await get(c, "/v1/models", bearer("red")))[0] == 200
    assert key not in c.gateway.output()  # type: ignore[union-attr]


async def test_odd_bytes_of_authorization_are_a_wrong_key_on_every_path(
    two_teams: Cluster,
) -> None:
    c = two_teams
    host, port = c.url.removeprefix("http://").split(":")
    for path in ("/v1/chat/completions", "/v1/models", "/admin/usage"):
        for value in (b"Bearer \xff\xfe", b"\xe9", b"Bearer", b"Basic cmVk", b"Bearer\t\x80"):
            method = b"GET" if "chat" not in path else b"POST"
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(
                b"%b %b HTTP/1.1\r\nHost: x\r\nAuthorization: %b\r\nContent-Length: 2\r\n\r\n{}"
                % (method, path.encode(), value)
            )
            async with asyncio.timeout(60):
                assert (await reader.readline()).split()[1] == b"401", (path, value)
            writer.close()
    assert "Traceback" not in c.gateway.output()  # type: ignore[union-attr]


async def test_a_client_that_closes_gives_its_place_back(two_teams: Cluster) -> None:
    """`concurrent_requests` counts open requests, whoever ends them."""
    c = two_teams
    async with aiohttp.ClientSession() as http:
        for _ in range(3):
            async with http.post(
                c.url + "/v1/chat/completions",
                json=chat_body("sim", max_tokens=4000, stream=True),
                headers=bearer("red"),
            ) as answer:
                assert answer.status == 200
    async with asyncio.timeout(60):
        while await c.metric("loraplex_worker_load") != 0:
            await asyncio.sleep(0.05)
