"""Shell. Aliases in the config and at run time: real gateway and worker processes, simulated
engine.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import openai

from tests.harness import Cluster, cluster, make_adapter, second_gateway, sim_config

LIMIT_S = 60
USERS = [f"user-{i}" for i in range(200)]


def with_aliases(
    adapters: Path, aliases: dict[str, Any] | None = None, **gateway: Any
) -> dict[str, Any]:
    config = sim_config(adapters, **gateway)
    config["llm_configs"][0]["lora_config"]["aliases"] = aliases or {}
    return config


async def who(c: Cluster, model: str, **more: Any) -> str:
    """The adapter that answered."""
    status, body, headers = await c.chat(model, max_tokens=1, **more)
    assert status == 200, body
    assert body["model"] == model
    return headers["x-loraplex-adapter"].partition("@")[0]


async def of_users(c: Cluster, model: str, users: list[str] = USERS) -> dict[str, str]:
    return dict(
        zip(users, await asyncio.gather(*(who(c, model, user=user) for user in users)), strict=True)
    )


async def shown(c: Cluster, model: str) -> Any:
    _, body = await c.get("/admin/aliases")
    return next((a for a in body["aliases"] if a["model"] == model), None)


async def test_an_alias_answers_as_its_adapter_under_its_own_name_and_is_listed(
    tmp_path: Path, adapters: Path
) -> None:
    for name in ("v7", "v8", "prod"):
        make_adapter(adapters, name)
    async with cluster(with_aliases(adapters, {"prod": "v7"}), tmp_path) as c:
        await c.start_worker("w0")
        assert await who(c, "sim:prod") == "v7", "before the adapter of the same name"
        async with openai.AsyncOpenAI(base_url=c.url + "/v1", api_key="none") as client:
            cards = {m.id: m async for m in client.models.list()}
            assert set(cards) == {"sim", "sim:prod", "sim:v7", "sim:v8"}
            card = cards["sim:prod"].model_dump()
            assert (card["parent"], card["root"]) == ("sim", "prod")
            assert (await client.models.retrieve("sim:prod")).id == "sim:prod"
            assert len(cards["sim:v7"].model_dump()["loraplex_digest"]) == 16
            stream = await client.chat.completions.create(
                model="sim:prod", messages=[{"role": "user", "content": "x"}], stream=True
            )
            assert {chunk.model async for chunk in stream} == {"sim:prod"}
        assert (await shown(c, "sim:prod"))["hides_adapter"] is True
        assert c.gateway is not None
        assert c.gateway.output().count("an alias hides an adapter") == 1
        async with asyncio.timeout(LIMIT_S):
            while '"adapter":"v7"' not in (log := c.gateway.output()):
                await asyncio.sleep(0.05)
        line = next(json.loads(line) for line in log.splitlines() if '"adapter":"v7"' in line)
        assert line["model"] == "sim:prod" and len(line["digest"]) == 12


async def test_shares_keep_their_users_and_a_change_moves_only_those_that_it_must(
    tmp_path: Path, adapters: Path
) -> None:
    for name in ("v7", "v8"):
        make_adapter(adapters, name)
    aliases = {"prod": [{"adapter": "v7", "weight": 80}, {"adapter": "v8", "weight": 20}]}
    async with cluster(with_aliases(adapters, aliases), tmp_path) as c:
        await c.start_worker("w0")
        before = await of_users(c, "sim:prod")
        assert await of_users(c, "sim:prod") == before
        assert 15 <= Counter(before.values())["v8"] <= 70
        status, entry = await c.put(
            "/admin/aliases/prod",
            {"shares": [{"adapter": "v7", "weight": 40}, {"adapter": "v8", "weight": 60}]},
        )
        assert status == 200 and entry["source"] == "runtime"
        after = await of_users(c, "sim:prod")
        moved = {(before[u], after[u]) for u in USERS if before[u] != after[u]}
        assert moved == {("v7", "v8")}
        # The user decides the share; without `user`, the key; without a key, the session; without
        # any, chance.
        for headers in ({"Authorization": "Bearer k"}, {"x-session-id": "s"}):
            found = {
                (
                    await c.post(
                        "/v1/chat/completions",
                        {"model": "sim:prod", "messages": [{"role": "user", "content": "x"}]},
                        headers,
                    )
                )[2]["x-loraplex-adapter"]
                for _ in range(15)
            }
            assert len(found) == 1
        assert len({await who(c, "sim:prod") for _ in range(40)}) == 2
        assert (await c.delete("/admin/aliases/sim:prod"))[1]["now"]["source"] == "config"
        assert await of_users(c, "sim:prod") == before


async def test_a_change_holds_in_all_gateways_within_a_second_or_so_and_after_a_restart(
    tmp_path: Path, adapters: Path
) -> None:
    for name in ("v7", "v8"):
        make_adapter(adapters, name)
    async with (
        cluster(with_aliases(adapters, {"prod": "v7"}), tmp_path) as c,
        second_gateway(c) as other,
    ):
        await c.start_worker("w0", gateways=[other.control])
        async with asyncio.timeout(LIMIT_S):
            while (await other.get("/ready"))[0] != 200:
                await asyncio.sleep(0.02)
        assert [await who(g, "sim:prod") for g in (c, other)] == ["v7", "v7"]
        assert await c.metric("loraplex_worker_adapters", tier="gpu") == 1
        assert (await c.put("/admin/aliases/prod", {"adapter": "v8"}))[0] == 200
        assert await c.metric("loraplex_worker_adapters", tier="gpu") == 2, (
            "it was loaded before the alias changed"
        )
        assert await who(c, "sim:prod") == "v8"
        async with asyncio.timeout(LIMIT_S):
            while await who(other, "sim:prod") != "v8":
                await asyncio.sleep(0.05)
        assert other.gateway is not None
        other.gateway.signal(9)  # type: ignore[arg-type]
        await other.gateway.wait()
        await other.start_gateway()
        assert (await shown(other, "sim:prod"))["shares"][0]["adapter"] == "v8"


async def test_what_is_wrong_with_a_change_is_said_and_nothing_changes(
    tmp_path: Path, adapters: Path
) -> None:
    make_adapter(adapters, "v7")
    make_adapter(adapters, "bad", rank=1024)
    async with cluster(with_aliases(adapters, {"prod": "v7"}), tmp_path) as c:
        status, body = await c.put("/admin/aliases/prod", {"adapter": "v7"})
        assert status == 503 and "now=1" in body["error"]["message"], "no worker could load it"
        await c.start_worker("w0")
        for change, expected, code in (
            ({"adapter": "nobody"}, 404, "adapter_not_found"),
            ({"adapter": "v7@01234567"}, 404, "adapter_not_found"),
            ({"adapter": "bad"}, 422, "invalid_adapter_rank"),
            ({"shares": []}, 400, "invalid_request"),
            ({"shares": [{"adapter": "v7", "weight": -1}]}, 400, "invalid_request"),
            ({"shares": [{"adapter": "v7"}, {"adapter": "nobody"}]}, 404, "adapter_not_found"),
            ({"adapter": "v7", "wieght": 1}, 400, "invalid_request"),
            ({}, 400, "invalid_request"),
        ):
            status, body = await c.put("/admin/aliases/prod", change)
            assert (status, body["error"]["code"]) == (expected, code), (change, body)
        for name, expected in (("../x", 404), ("other:prod", 404), ("sim:a@b", 404), ("sim", 200)):
            assert (await c.put(f"/admin/aliases/{name.replace('/', '%2F')}", {"adapter": "v7"}))[
                0
            ] == expected, name
        assert (await c.delete("/admin/aliases/nobody"))[0] == 404
        assert (await c.delete("/admin/aliases/prod"))[0] == 400
        entry = await shown(c, "sim:prod")
        assert entry["source"] == "config" and [s["adapter"] for s in entry["shares"]] == ["v7"]


async def test_a_failing_canary_is_rolled_back_for_everybody_until_an_operator_decides(
    tmp_path: Path, adapters: Path
) -> None:
    for name in ("v7", "v8"):
        make_adapter(adapters, name)
    make_adapter(adapters, "bad", rank=1024)
    async with (
        cluster(with_aliases(adapters, {"prod": "v7"}), tmp_path) as c,
        second_gateway(c) as other,
    ):
        await c.start_worker("w0", gateways=[other.control])
        canary = {
            "shares": [{"adapter": "v7", "weight": 50}, {"adapter": "bad", "weight": 50}],
            "rollback": {"error_rate": 0.2, "min_requests": 10, "window_s": 60},
        }
        assert (await c.put("/admin/aliases/prod?now=1", canary))[0] == 200
        failed = 0
        async with asyncio.timeout(LIMIT_S):
            for n in range(10_000):
                status, _, _ = await c.chat("sim:prod", max_tokens=1, user=f"u{n}")
                failed += status == 422
                entry = await shown(c, "sim:prod")
                if entry["shares"][1]["rolled_back"]:
                    break
        assert failed == 10, "at the least number of requests that may decide"
        assert (
            entry["shares"][1]["weight"] == 0
            and "10 of 10" in entry["shares"][1]["rolled_back"]["reason"]
        )
        assert set((await of_users(c, "sim:prod")).values()) == {"v7"}
        assert await c.metric("loraplex_alias_rollbacks_total", alias="prod") == 1
        assert c.gateway is not None and '"level":"error"' in next(
            line
            for line in c.gateway.output().splitlines()
            if "share of an alias rolled back" in line
        )
        async with asyncio.timeout(LIMIT_S):
            while (await shown(other, "sim:prod"))["shares"][-1]["weight"]:
                await asyncio.sleep(0.05)
        mended = {"shares": [{"adapter": "v7", "weight": 50}, {"adapter": "v8", "weight": 50}]}
        assert (await c.put("/admin/aliases/prod", mended))[0] == 200
        assert set((await of_users(c, "sim:prod")).values()) == {"v7", "v8"}


async def test_a_share_whose_adapter_was_deleted_is_rolled_back_though_its_answers_are_404(
    tmp_path: Path, adapters: Path
) -> None:
    for name in ("v7", "v8"):
        make_adapter(adapters, name)
    rollback = {"error_rate": 0.2, "min_requests": 5}
    aliases = {"prod": {"shares": [{"adapter": "v7"}, {"adapter": "v8"}], "rollback": rollback}}
    async with cluster(with_aliases(adapters, aliases, catalog_refresh_s=0.2), tmp_path) as c:
        await c.start_worker("w0")
        assert set((await of_users(c, "sim:prod")).values()) == {"v7", "v8"}
        shutil.rmtree(adapters / "v8")
        found = set()
        async with asyncio.timeout(LIMIT_S):
            while (await shown(c, "sim:prod"))["shares"][1]["weight"]:
                found |= {
                    status
                    for status, _, _ in await asyncio.gather(
                        *(c.chat("sim:prod", max_tokens=1, user=u) for u in USERS[:20])
                    )
                }
        assert found == {200, 404}
        assert set((await of_users(c, "sim:prod")).values()) == {"v7"}


async def test_errors_of_clients_and_clients_that_leave_roll_nothing_back(
    tmp_path: Path, adapters: Path
) -> None:
    for name in ("v7", "v8"):
        make_adapter(adapters, name)
    rollback = {"error_rate": 0.01, "min_requests": 1}
    aliases = {"prod": {"shares": [{"adapter": "v7"}, {"adapter": "v8"}], "rollback": rollback}}
    async with cluster(with_aliases(adapters, aliases), tmp_path) as c:
        await c.start_worker("w0")
        for n in range(20):
            assert (await c.chat("sim:prod", max_tokens=0, user=f"u{n}"))[0] == 400
        leaving = [
            asyncio.create_task(c.chat("sim:prod", max_tokens=3000, user=f"u{n}"))
            for n in range(10)
        ]
        async with asyncio.timeout(LIMIT_S):
            while await c.metric("loraplex_worker_load") < 10:
                await asyncio.sleep(0.02)
            for task in leaving:
                task.cancel()
            while await c.metric("loraplex_requests_total", outcome="aborted") < 10:
                await asyncio.sleep(0.02)
        entry = await shown(c, "sim:prod")
        assert [s["rolled_back"] for s in entry["shares"]] == [None, None]
        assert (
            sum(s["requests"] for s in entry["shares"]) == 20
            and sum(s["errors"] for s in entry["shares"]) == 0
        )
