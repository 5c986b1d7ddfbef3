"""Shell. What operators ask over HTTP, of a gateway and simulated workers as real processes."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.harness import STOP_S, Cluster, cluster, make_adapter, sim_config


async def row(c: Cluster, name: str) -> dict[str, Any]:
    status, body = await c.get(f"/admin/adapters/{name}")
    assert status == 200, body
    return dict(body)


async def until(c: Cluster, name: str, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Asks for the adapter's row until it is as expected."""
    seen: Any = None
    try:
        async with asyncio.timeout(STOP_S):
            while True:
                status, seen = await c.get(f"/admin/adapters/{name}")
                if status == 200 and holds(seen):
                    return dict(seen)
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"it never became so: {seen}") from None


def pinned_on(found: dict[str, Any]) -> list[str]:
    return [w["worker"] for w in found["workers"] if w["pinned"] and w["tier"] == "gpu"]


async def act(c: Cluster, name: str, action: str, query: str = "") -> tuple[int, Any]:
    status, body, _ = await c.post(f"/admin/adapters/{name}/{action}{query}", b"")
    return status, body


@pytest_asyncio.fixture
async def two(tmp_path: Path, adapters: Path) -> AsyncIterator[Cluster]:
    """Adapters a, b, c and team/d, and two workers with two slots each."""
    for name in ("a", "b", "c", "team/d"):
        make_adapter(adapters, name)
    async with cluster(sim_config(adapters, max_loras=2), tmp_path) as c:
        for worker in ("w0", "w1"):
            await c.start_worker(worker)
        while len((await c.get("/v1/models"))[1]["data"]) < 5:
            await asyncio.sleep(0.02)
        yield c


# ---- looking -------------------------------------------------------------------------------------


async def test_the_table_says_where_every_adapter_is_and_who_asked_for_it(two: Cluster) -> None:
    _, before = await two.get("/admin/adapters")
    assert [(a["base"], a["name"], a["state"], a["hits"]) for a in before["adapters"]] == [
        ("sim", name, "listed", 0) for name in ("a", "b", "c", "team/d")
    ]
    assert before["next"] is None
    assert (await two.chat("sim:team/d", max_tokens=1))[0] == 200
    found = await until(two, "team/d", lambda r: bool(r["workers"]))
    assert (found["state"], found["hits"], found["rank"], found["code"]) == ("loaded", 1, 8, None)
    assert found["digest"] == found["workers"][0]["digest"] and found["workers"][0]["tier"] == "gpu"
    assert found["last_used"].startswith("20") and found["last_used"].endswith("+00:00")
    _, loaded = await two.get("/admin/adapters?state=loaded")
    assert [a["name"] for a in loaded["adapters"]] == ["team/d"]


async def test_the_table_comes_in_pages(two: Cluster) -> None:
    _, first = await two.get("/admin/adapters?limit=3&base=sim")
    assert [a["name"] for a in first["adapters"]] == ["a", "b", "c"] and first["next"] == "sim:c"
    _, second = await two.get(f"/admin/adapters?limit=3&after={first['next']}")
    assert [a["name"] for a in second["adapters"]] == ["team/d"] and second["next"] is None


@pytest.mark.parametrize(
    ("path", "status", "word"),
    [
        ("/admin/adapters?limit=0", 400, "limit"),
        ("/admin/adapters?limit=x", 400, "limit"),
        ("/admin/adapters?state=odd", 400, "`listed`"),
        ("/admin/explain?model=sim&prompt_tokens=x", 400, "prompt_tokens"),
        (f"/admin/explain?model=sim&prompt_tokens={'9' * 5000}", 400, "prompt_tokens"),
        ("/admin/adapters?base=nope", 400, "`sim`"),
        ("/admin/adapters/nobody", 404, "does not exist"),
        ("/admin/adapters/..%2Fx", 404, "not valid"),
    ],
)
async def test_questions_that_make_no_sense_say_why(
    two: Cluster, path: str, status: int, word: str
) -> None:
    got, body = await two.get(path)
    assert got == status and word in body["error"]["message"], body


async def test_a_slash_at_the_end_of_a_path_means_nothing_to_operators_either(
    tmp_path: Path, adapters: Path
) -> None:
    for name in ("a", "a/pin"):
        make_adapter(adapters, name)
    async with cluster(sim_config(adapters), tmp_path) as c:
        await c.start_worker("w0")
        assert (await c.get("/admin/adapters/a/"))[1]["name"] == "a"
        status, pinned = await act(c, "a", "pin/")
        assert status == 200 and pinned["adapter"] == "a"
        status, alias = await c.put("/admin/aliases/prod/", {"adapter": "a"})
        assert status == 200 and alias["model"] == "sim:prod"
        assert (await c.delete("/admin/aliases/prod/"))[0] == 200
        _, _, headers = await c.chat("sim:a", max_tokens=1)
        request_id = headers["x-request-id"]
        assert (await c.get(f"/admin/requests/{request_id}/"))[1]["id"] == request_id
        for page in ("/ui/", "/ui//", "/ui/style.css/"):
            assert (await c.get(page))[0] == 200, page
        assert await c.metric("loraplex_internal_errors_total") == 0
        assert (await c.post("/admin/workers/w0/drain/", b""))[1]["worker"] == "w0"


async def test_ten_thousand_adapters_are_listed_without_holding_up_requests(
    tmp_path: Path, adapters: Path
) -> None:
    for n in range(10_000):
        folder = adapters / f"a{n:05d}"
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
    async with cluster(sim_config(adapters), tmp_path) as c:
        async with asyncio.timeout(STOP_S):
            while len((await c.get("/v1/models"))[1]["data"]) < 10_001:
                await asyncio.sleep(0.1)
        names, after, pages = [], "", 0
        while after is not None:
            _, page = await c.get(f"/admin/adapters?after={after}")
            assert len(page["adapters"]) <= 1000
            names += [a["name"] for a in page["adapters"]]
            after, pages = page["next"], pages + 1
        assert names == [f"a{n:05d}" for n in range(10_000)] and pages == 10
        assert (await c.get("/admin/adapters?state=pinned"))[1] == {
            "adapters": [],
            "next": None,
            "skipped": 0,
        }


# ---- doing ---------------------------------------------------------------------------------------


async def test_a_pinned_adapter_keeps_its_slot_while_more_adapters_than_slots_come_by(
    two: Cluster,
) -> None:
    status, body = await act(two, "a", "pin")
    assert (
        status == 200
        and body["results"] == [{"worker": w, "ok": True} for w in ("w0", "w1")]
        and body["remembered"]
    )
    for _ in range(3):
        for name in ("b", "c", "team/d"):
            assert (await two.chat(f"sim:{name}", max_tokens=1))[0] == 200
    assert pinned_on(await until(two, "a", lambda r: len(pinned_on(r)) == 2)) == ["w0", "w1"]
    for worker in ("w0", "w1"):
        assert '"adapter unloaded", "adapter": "sim:a@' not in two.workers[worker].output()
    assert (await act(two, "a", "unpin"))[0] == 200
    found = await until(two, "a", lambda r: not pinned_on(r))
    assert found["state"] == "loaded" and found["to_be_pinned"] == []


async def test_the_last_slot_cannot_be_pinned_and_the_answer_says_so(two: Cluster) -> None:
    assert (await act(two, "a", "pin"))[0] == 200
    status, body = await act(two, "b", "pin")
    assert (
        status == 409
        and body["error"]["code"] == "too_many_pins"
        and "1 of a worker's 2 slots" in body["error"]["message"]
    )
    assert (await row(two, "b"))["to_be_pinned"] == []


async def test_a_prefetched_adapter_is_on_disk_and_in_no_slot_and_with_tier_gpu_it_is_in_one(
    two: Cluster,
) -> None:
    status, body = await act(two, "team/d", "prefetch")
    assert (
        status == 200
        and [r["ok"] for r in body["results"]] == [True, True]
        and body["tier"] == "disk"
    )
    assert (await row(two, "team/d"))["state"] == "cached"
    found = (await two.get("/admin/explain?model=sim:team/d"))[1]
    assert {w["tier"] for w in found["workers"]} == {"disk"}, found
    assert "adapter loaded" not in "".join(w.output() for w in two.workers.values())
    assert (await act(two, "team/d", "prefetch", "?tier=gpu&worker=w1"))[0] == 200
    await until(
        two,
        "team/d",
        lambda r: (
            [(w["worker"], w["tier"], w["loading"]) for w in r["workers"]] == [("w1", "gpu", False)]
        ),
    )
    assert (await act(two, "team/d", "prefetch", "?worker=w9"))[0] == 400


async def test_an_evicted_adapter_leaves_every_engine_and_is_pinned_no_longer(two: Cluster) -> None:
    assert (await act(two, "a", "pin"))[0] == 200
    assert (await act(two, "a", "evict"))[0] == 200
    found = await until(two, "a", lambda r: not r["workers"])
    assert found["to_be_pinned"] == [] and found["state"] == "cached"
    for worker in ("w0", "w1"):
        assert "adapter unloaded" in two.workers[worker].output()
    assert (await two.chat("sim:a", max_tokens=1))[0] == 200, "it is only out of the engine"


async def test_eviction_waits_for_the_requests_in_flight(two: Cluster) -> None:
    running = asyncio.create_task(two.chat("sim:a", max_tokens=400))
    await until(two, "a", lambda r: any(w["in_flight"] for w in r["workers"]))
    assert (await act(two, "a", "evict", "?timeout_s=0.05"))[0] in (207, 504)
    assert not running.done()
    assert (await act(two, "a", "evict"))[0] == 200
    assert running.done() and (await running)[0] == 200


async def test_an_invalid_adapter_is_refused_with_its_code_and_is_not_pinned(
    two: Cluster, adapters: Path
) -> None:
    make_adapter(adapters, "wide", rank=999)
    status, body = await act(two, "wide", "pin")
    assert (status, body["error"]["code"], body["remembered"]) == (
        422,
        "invalid_adapter_rank",
        False,
    ), body
    assert [(r["ok"], r["code"], r["retryable"]) for r in body["results"]] == [
        (False, "invalid_adapter_rank", False)
    ] * 2
    found = await row(two, "wide")
    assert (found["state"], found["code"], found["to_be_pinned"]) == (
        "invalid",
        "invalid_adapter_rank",
        [],
    )
    assert "999" in found["reason"]
    assert (await act(two, "nobody", "pin"))[0] == 404


# ---- what stays so -------------------------------------------------------------------------------


async def test_a_restarted_worker_and_a_restarted_gateway_pin_again(two: Cluster) -> None:
    assert (await act(two, "a", "pin"))[0] == 200
    two.workers["w1"].signal(signal.SIGKILL)
    await two.workers["w1"].wait()
    await two.start_worker("w1")
    await until(two, "a", lambda r: pinned_on(r) == ["w0", "w1"])
    assert two.gateway is not None
    two.gateway.signal(signal.SIGKILL)
    await two.gateway.wait()
    await two.start_gateway()
    await two.until_serving("w0")
    assert (await until(two, "a", lambda r: pinned_on(r) == ["w0", "w1"]))[
        "to_be_pinned"
    ] == "everywhere"


async def test_a_new_version_of_a_pinned_adapter_is_pinned_and_the_old_one_no_longer(
    tmp_path: Path, adapters: Path
) -> None:
    make_adapter(adapters, "a")
    config = sim_config(adapters, max_loras=2, catalog_refresh_s=0.2)
    config["llm_configs"][0]["lora_config"]["pin"] = ["a"]
    async with cluster(config, tmp_path) as c:
        await c.start_worker("w0")
        old = (await until(c, "a", lambda r: pinned_on(r) == ["w0"]))["digest"]
        make_adapter(adapters, "a", size_bytes=2000)
        found = await until(
            c,
            "a",
            lambda r: r["digest"] != old and pinned_on(r) == ["w0"] and r["digest"] in _pinned(r),
        )
        assert _pinned(found) == [found["digest"]]


def _pinned(found: dict[str, Any]) -> list[str]:
    return [w["digest"] for w in found["workers"] if w["pinned"]]


async def test_configured_adapters_are_there_before_anybody_asks_and_an_unknown_one_is_logged(
    tmp_path: Path, adapters: Path
) -> None:
    for name in ("a", "b"):
        make_adapter(adapters, name)
    config = sim_config(adapters, max_loras=4, catalog_refresh_s=0.2)
    config["llm_configs"][0]["lora_config"] |= {"pin": ["a", "later"], "preload": ["b"]}
    async with cluster(config, tmp_path) as c:
        await c.start_worker("w0")
        await until(c, "a", lambda r: pinned_on(r) == ["w0"])
        await until(c, "b", lambda r: r["state"] == "loaded")
        assert c.gateway is not None
        assert c.gateway.output().count("to be pinned or preloaded was not found") == 1
        make_adapter(adapters, "later")
        await until(c, "later", lambda r: pinned_on(r) == ["w0"])
        assert (await act(c, "a", "unpin"))[0] == 200
        assert (await until(c, "a", lambda r: not pinned_on(r)))["to_be_pinned"] == []


async def test_what_one_gateway_process_was_told_another_one_knows(
    tmp_path: Path, adapters: Path
) -> None:
    make_adapter(adapters, "a")
    config = sim_config(adapters, max_loras=2)
    async with cluster(config, tmp_path) as c:
        argv = [
            sys.executable,
            "-m",
            "gateway",
            str(tmp_path / "config.yaml"),
            "--run-dir",
            str(tmp_path / "run"),
            "--index",
            "1",
        ]
        second = await c._start("g1", argv)
        try:
            facts = tmp_path / "run" / "g1.json"
            async with asyncio.timeout(STOP_S):
                while not facts.exists():
                    await asyncio.sleep(0.02)
            other = json.loads(facts.read_text())
            await c.start_worker("w0", gateways=[other["control"]])
            assert (await act(c, "a", "pin"))[0] == 200
            first, c.url = c.url, f"http://127.0.0.1:{other['port']}"
            await until(
                c, "a", lambda r: r["to_be_pinned"] == "everywhere" and pinned_on(r) == ["w0"]
            )
            assert (await act(c, "a", "unpin"))[0] == 200
            c.url = first
            await until(c, "a", lambda r: r["to_be_pinned"] == [] and not pinned_on(r))
        finally:
            second.signal(signal.SIGKILL)
            await second.wait()


# ---- vLLM's paths --------------------------------------------------------------------------------


async def test_vllms_load_and_unload_are_answered_like_vllm_does(
    two: Cluster, adapters: Path
) -> None:
    status, body, _ = await two.post(
        "/v1/load_lora_adapter", {"lora_name": "a", "lora_path": f"{adapters}/a/"}
    )
    assert (status, body) == (200, "Success: LoRA adapter 'a' added successfully.")
    found = await until(two, "a", lambda r: r["state"] == "loaded")
    assert len(found["workers"]) == 1
    status, body, _ = await two.post("/v1/load_lora_adapter?all=1", {"lora_name": "sim:a"})
    assert (status, body) == (200, "Success: LoRA adapter 'sim:a' added successfully.")
    await until(two, "a", lambda r: len(r["workers"]) == 2)
    status, body, _ = await two.post(
        "/v1/unload_lora_adapter", {"lora_name": "sim:a", "lora_int_id": 7}
    )
    assert (status, body) == (200, "Success: LoRA adapter 'sim:a' removed successfully.")
    await until(two, "a", lambda r: not r["workers"])


@pytest.mark.parametrize(
    ("path", "body", "status", "word"),
    [
        (
            "load",
            {"lora_name": "a", "lora_path": "/etc"},
            400,
            "Files come from the configured store",
        ),
        ("load", {"lora_name": "a", "lora_path": "b"}, 400, "Files come from the configured store"),
        ("load", {"lora_name": "nobody"}, 404, "does not exist"),
        ("load", {"lora_name": "sim"}, 400, "conflicts with a served base model"),
        ("load", {"lora_name": "other:a"}, 404, "does not exist"),
        ("load", {"lora_name": ""}, 400, "lora_name"),
        ("load", {"lora_path": "/x"}, 400, "lora_name"),
        ("unload", {"lora_name": "nobody"}, 404, "cannot be found"),
        ("unload", {}, 400, "lora_name"),
    ],
)
async def test_vllms_paths_refuse_what_they_should(
    two: Cluster, path: str, body: dict[str, str], status: int, word: str
) -> None:
    got, answer, _ = await two.post(f"/v1/{path}_lora_adapter", body)
    assert got == status and word in answer["error"]["message"], answer


# ---- keys ----------------------------------------------------------------------------------------

ADMIN_PATHS = [
    ("GET", "/admin/adapters"),
    ("GET", "/admin/adapters/a"),
    ("GET", "/admin/explain?model=sim"),
    ("POST", "/admin/adapters/a/prefetch"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
]


async def ask(c: Cluster, method: str, path: str, key: str | None) -> int:
    headers = {"Content-Type": "application/json"}
    headers |= {} if key is None else {"Authorization": f"Bearer {key}"}
    data = b'{"lora_name": "a"}' if method == "POST" else None
    async with c.http.request(method, c.url + path, data=data, headers=headers) as answer:
        await answer.read()
        return answer.status


async def test_admin_paths_take_admin_keys_and_nothing_else(
    tmp_path: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(adapters, "a")
    monkeypatch.setenv("TEST_ADMIN_KEYS", "boss, deputy")
    (tmp_path / "keys").write_text("client\n")
    config = sim_config(
        adapters, api_keys_file=str(tmp_path / "keys"), admin_keys_env="TEST_ADMIN_KEYS"
    )
    async with cluster(config, tmp_path) as c:
        await c.start_worker("w0", serving=False)
        async with asyncio.timeout(STOP_S):
            while (await c.get("/ready"))[0] != 200:
                await asyncio.sleep(0.02)
        for method, path in ADMIN_PATHS:
            assert [
                await ask(c, method, path, key)
                for key in (None, "wrong", "client", "boss", "deputy")
            ] == [401, 401, 403, 200, 200], path
        assert [await ask(c, "GET", "/v1/models", key) for key in (None, "client", "boss")] == [
            401,
            200,
            401,
        ]


async def test_without_admin_keys_only_a_gateway_of_this_machine_alone_answers(
    tmp_path: Path, adapters: Path
) -> None:
    (tmp_path / "keys").write_text("client\n")
    keys = str(tmp_path / "keys")
    async with cluster(sim_config(adapters, api_keys_file=keys), tmp_path) as c:
        assert [await ask(c, "GET", "/admin/adapters", key) for key in (None, "client")] == [
            401,
            200,
        ]
    other = tmp_path / "open"
    other.mkdir()
    async with cluster(sim_config(adapters, api_keys_file=keys, host="0.0.0.0"), other) as c:
        for key in (None, "client"):
            assert await ask(c, "GET", "/admin/adapters", key) == 403
        async with c.http.get(c.url + "/admin/adapters") as answer:
            assert "gateway.admin_keys_env" in (await answer.json())["error"]["message"]


async def test_the_live_feed_takes_the_key_where_all_paths_do_and_answers_head_without_a_body(
    tmp_path: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_ADMIN_KEYS", "boss")
    async with cluster(sim_config(adapters, admin_keys_env="TEST_ADMIN_KEYS"), tmp_path) as c:
        async with c.http.get(c.url + "/admin/live", headers={"x-api-key": "boss"}) as answer:
            assert (await answer.content.readline()).startswith(b"data: {")
        host, port = c.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = "{} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer boss\r\n\r\n"
        writer.write((head.format("HEAD /admin/live") + head.format("GET /health")).encode())
        async with asyncio.timeout(STOP_S):
            assert b"text/event-stream" in await reader.readuntil(b"\r\n\r\n")
            assert b"application/json" in await reader.readuntil(b"\r\n\r\n")
            assert json.loads(await reader.readuntil(b"}")) == {"status": "ok"}
        writer.close()
