"""Shell. Gateway and simulated workers as real processes over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
from pathlib import Path

import aiohttp
import msgspec
import pytest

from tests.harness import Cluster, chat_body, cluster, make_adapter, sim_config


async def read_until(answer: aiohttp.ClientResponse, text: bytes) -> bytes:
    seen = b""
    async for chunk in answer.content.iter_any():
        seen += chunk
        if text in seen:
            return seen
    raise AssertionError(f"{text!r} not in {seen!r}")


async def test_a_request_names_base_or_adapter_and_the_right_one_answers(
    tmp_path: Path, adapters: Path
) -> None:
    make_adapter(adapters, "pirate")
    make_adapter(adapters, "team/haiku")
    async with cluster(sim_config(adapters), tmp_path) as c:
        await c.start_worker("w0")
        for model, adapter in (
            ("sim", "-"),
            ("sim:pirate", "pirate"),
            ("sim:team/haiku", "team/haiku"),
        ):
            status, body, headers = await c.chat(model, max_tokens=3)
            assert (
                status == 200
                and f"[base=sim adapter={adapter} " in body["choices"][0]["message"]["content"]
            )
            assert body["model"] == model and body["usage"]["completion_tokens"] == 3
            assert headers["x-loraplex-worker"] == "w0"


@pytest.mark.parametrize("prompt_bytes", [5, 300_000], ids=["small", "read aside"])
async def test_a_byte_order_mark_before_a_body_is_ignored(
    tmp_path: Path, adapters: Path, prompt_bytes: int
) -> None:
    config = sim_config(adapters)
    config["llm_configs"][0]["engine_kwargs"]["max_model_len"] = 1_000_000
    async with cluster(config, tmp_path) as c:
        await c.start_worker("w0")
        body = b"\xef\xbb\xbf" + msgspec.json.encode(
            chat_body("sim", "x" * prompt_bytes, max_tokens=1)
        )
        status, answer, _ = await c.post("/v1/chat/completions", body)
        assert status == 200, answer


async def test_models_lists_bases_and_adapters_with_their_parent(
    tmp_path: Path, adapters: Path
) -> None:
    make_adapter(adapters, "pirate")
    async with cluster(sim_config(adapters), tmp_path) as c:
        _, listed = await c.get("/v1/models")
        while len(listed["data"]) < 2:
            _, listed = await c.get("/v1/models")
        assert [(m["id"], m["parent"], m["object"]) for m in listed["data"]] == [
            ("sim", None, "model"),
            ("sim:pirate", "sim", "model"),
        ]
        assert (await c.get("/v1/models/sim:pirate"))[1]["root"] == "pirate"
        assert (await c.get("/v1/models/sim:nobody"))[0] == 404


async def test_ready_says_200_only_once_a_worker_serves(tmp_path: Path, adapters: Path) -> None:
    async with cluster(sim_config(adapters), tmp_path) as c:
        assert (await c.get("/health"))[0] == 200
        assert (await c.get("/ready"))[0] == 503
        await c.start_worker("w0")
        assert (await c.get("/ready"))[0] == 200


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        (b"{", 400, None, "invalid_request"),
        (b"[]", 400, None, "invalid_request"),
        (b"{}", 400, "messages", "invalid_request"),
        (b'{"model": 5}', 400, "model", "invalid_request"),
        (b'{"model": "other"}', 404, "model", "model_not_found"),
        (b'{"model": "sim:nobody", "messages": []}', 404, "model", "adapter_not_found"),
        (b'{"model": "sim:../etc", "messages": []}', 404, "model", "adapter_not_found"),
        (
            b'{"model": "sim", "messages": [{"role": "user", "content": "x"}], "max_tokens": 0}',
            400,
            "max_tokens",
            None,
        ),
    ],
)
async def test_bad_requests_get_openai_errors(
    bad_cluster: Cluster, body: bytes, status: int, param: str | None, code: str | None
) -> None:
    got, answer, headers = await bad_cluster.post("/v1/chat/completions", body)
    assert got == status, answer
    assert answer["error"]["param"] == param
    assert code is None or answer["error"]["code"] == code
    assert headers["x-request-id"]


@pytest.fixture(scope="module")
async def bad_cluster(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("bad")
    (folder / "adapters").mkdir()
    async with cluster(sim_config(folder / "adapters", max_body_bytes=100_000), folder) as c:
        await c.start_worker("w0")
        yield c


async def test_a_body_over_the_limit_is_413(bad_cluster: Cluster) -> None:
    status, answer, _ = await bad_cluster.chat("sim", "x" * 200_000)
    assert status == 413 and answer["error"]["code"] == "body_too_large"


async def test_unknown_paths_and_methods_get_openai_errors(bad_cluster: Cluster) -> None:
    assert (await bad_cluster.get("/v2/what"))[0] == 404
    status, answer = await bad_cluster.get("/v1/chat/completions")
    assert status == 405 and "not allowed" in answer["error"]["message"]


async def test_no_worker_means_503_with_retry_after_once_the_queue_is_full(
    tmp_path: Path, adapters: Path
) -> None:
    async with cluster(sim_config(adapters, max_queued_requests=0), tmp_path) as c:
        status, answer, headers = await c.chat("sim")
        assert (
            status == 503
            and answer["error"]["code"] == "overloaded"
            and int(headers["Retry-After"]) >= 1
        )


async def test_a_queued_request_is_served_when_a_worker_comes(
    tmp_path: Path, adapters: Path
) -> None:
    async with cluster(sim_config(adapters), tmp_path) as c:
        waiting = asyncio.create_task(c.chat("sim", max_tokens=2))
        while await c.metric("loraplex_queue_depth", base="sim") != 1:
            await asyncio.sleep(0.01)
        await c.start_worker("w0")
        assert (await waiting)[0] == 200


async def test_a_burst_between_two_heartbeats_spreads_over_the_workers(
    tmp_path: Path, adapters: Path
) -> None:
    async with cluster(sim_config(adapters, heartbeat_s=0.6), tmp_path) as c:
        for name in ("w0", "w1"):
            await c.start_worker(name)
        answers = await asyncio.gather(*(c.chat("sim", max_tokens=30) for _ in range(20)))
        counts = [sum(h["x-loraplex-worker"] == w for _, _, h in answers) for w in ("w0", "w1")]
        assert min(counts) >= 5, counts


async def test_requests_for_one_cold_adapter_load_it_once(tmp_path: Path, adapters: Path) -> None:
    make_adapter(adapters, "hot")
    async with cluster(sim_config(adapters, sim={"load_ms": 100}), tmp_path) as c:
        for name in ("w0", "w1"):
            await c.start_worker(name)
        answers = await asyncio.gather(*(c.chat("sim:hot", max_tokens=5) for _ in range(12)))
        assert len({h["x-loraplex-worker"] for _, _, h in answers}) == 1
        assert sum(p.output().count('"adapter loaded"') for p in c.workers.values()) == 1


async def test_many_more_adapters_than_slots_cycle_and_each_answers_as_itself(
    tmp_path: Path, adapters: Path
) -> None:
    names = [f"a{i:02d}" for i in range(12)]
    for name in names:
        make_adapter(adapters, name)
    async with cluster(sim_config(adapters, max_loras=2), tmp_path) as c:
        await c.start_worker("w0")
        answers = await asyncio.gather(*(c.chat(f"sim:{name}", max_tokens=4) for name in names * 3))
        for (status, body, _), name in zip(answers, names * 3, strict=True):
            assert status == 200 and name in body["choices"][0]["message"]["content"], body


async def test_a_client_that_leaves_frees_its_place_on_the_worker(
    tmp_path: Path, adapters: Path
) -> None:
    async with cluster(sim_config(adapters), tmp_path) as c:
        await c.start_worker("w0")
        async with c.http.post(
            c.url + "/v1/chat/completions", json=chat_body("sim", max_tokens=5000, stream=True)
        ) as answer:
            await read_until(answer, b"data:")
            assert await c.metric("loraplex_worker_load", worker="w0") == 1
            answer.close()
        async with asyncio.timeout(60):
            while await c.metric("loraplex_requests_total", outcome="aborted") != 1:
                await asyncio.sleep(0.01)
            while await c.metric("loraplex_worker_load", worker="w0") != 0:
                await asyncio.sleep(0.01)


async def test_sigterm_lets_running_requests_finish_and_refuses_new_ones(
    tmp_path: Path, adapters: Path
) -> None:
    async with cluster(sim_config(adapters), tmp_path) as c:
        worker = await c.start_worker("w0")
        async with c.http.post(
            c.url + "/v1/chat/completions", json=chat_body("sim", max_tokens=200, stream=True)
        ) as answer:
            await read_until(answer, b"data:")
            assert c.gateway is not None
            c.gateway.signal(signal.SIGTERM)
            worker.signal(signal.SIGTERM)
            # on an open connection, by closing an idle one, or by not listening any more
            async with asyncio.timeout(60):
                with contextlib.suppress(aiohttp.ClientConnectionError):
                    while (await c.chat("sim"))[0] != 503:
                        await asyncio.sleep(0.01)
            rest = await answer.content.read()
            assert rest.endswith(b"data: [DONE]\n\n")
        assert await c.gateway.wait() == 0
        assert await worker.wait() == 0


async def test_what_a_killed_worker_had_not_begun_to_answer_is_answered_by_another(
    tmp_path: Path, adapters: Path
) -> None:
    async with cluster(sim_config(adapters, sim={"ttft_ms": 1500}), tmp_path) as c:
        await c.start_worker("w0")
        waiting = [asyncio.create_task(c.chat("sim", max_tokens=2)) for _ in range(4)]
        async with asyncio.timeout(60):
            while await c.metric("loraplex_worker_load", worker="w0") != 4:
                await asyncio.sleep(0.01)
        c.workers["w0"].signal(signal.SIGKILL)
        await c.start_worker("w1", serving=False)
        assert [status for status, _, _ in await asyncio.gather(*waiting)] == [200] * 4
        assert await c.metric("loraplex_retries_total") == 4


async def test_a_request_that_two_workers_died_of_is_refused_from_then_on_and_others_are_not(
    tmp_path: Path, adapters: Path
) -> None:
    async with cluster(sim_config(adapters, sim={"ttft_ms": 1500}), tmp_path) as c:
        deadly = asyncio.create_task(c.chat("sim", "deadly", max_tokens=2))
        for name in ("w0", "w1"):
            await c.start_worker(name, serving=False)
            async with asyncio.timeout(60):
                while not await c.metric("loraplex_engine_requests_total", worker=name):
                    await asyncio.sleep(0.01)
            c.workers[name].signal(signal.SIGKILL)
        status, _, headers = await deadly
        assert (status, headers["x-should-retry"]) == (500, "false")
        assert c.gateway is not None and "workers died of a request" in c.gateway.output()
        await c.start_worker("w2")
        for _ in range(2):
            status, body, _ = await c.chat("sim", "deadly", max_tokens=2)
            assert (status, body["error"]["code"]) == (500, "engine_error")
            assert "refused" in body["error"]["message"]
        assert (await c.chat("sim", "harmless", max_tokens=2))[0] == 200
        assert c.workers["w2"].waiter.returncode is None


async def test_a_page_that_has_bound_its_name_to_loopback_reads_nothing_without_keys(
    tmp_path: Path, adapters: Path
) -> None:
    paths = ("/metrics", "/ready", "/ui", "/version", "/v1/models", "/admin/live")
    async with cluster(sim_config(adapters), tmp_path) as c:
        for path in (*paths, "/health"):
            for host, there in (("pages.example", 403), ("localhost", 200)):
                async with c.http.get(c.url + path, headers={"Host": host}) as answer:
                    expected = 200 if path == "/health" else there
                    ready = path == "/ready" and answer.status == 503  # no worker yet
                    assert answer.status == expected or (expected == 200 and ready), (path, host)


async def test_api_keys_are_asked_for(tmp_path: Path, adapters: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret-one\nsecret-two\n")
    async with cluster(sim_config(adapters, api_keys_file=str(keys)), tmp_path) as c:
        assert (await c.get("/v1/models"))[0] == 401
        assert (await c.post("/v1/chat/completions", b"{}", {"Authorization": "Bearer wrong"}))[
            0
        ] == 401
        assert (await c.post("/v1/chat/completions", b"{", {"Authorization": "Bearer secret-two"}))[
            0
        ] == 400
        assert (await c.get("/health"))[0] == 200


async def test_a_broken_adapter_is_422_and_others_still_answer(
    tmp_path: Path, adapters: Path
) -> None:
    make_adapter(adapters, "good")
    (make_adapter(adapters, "bad") / "adapter_config.json").write_text("{")
    async with cluster(sim_config(adapters), tmp_path) as c:
        await c.start_worker("w0")
        status, answer, headers = await c.chat("sim:bad")
        assert (
            status == 422
            and answer["error"]["code"].startswith("invalid_adapter")
            and str(tmp_path) not in str(answer)
        )
        async with asyncio.timeout(60):
            while headers["x-request-id"] not in c.gateway.output():
                await asyncio.sleep(0.05)
        assert (await c.chat("sim:good", max_tokens=1))[0] == 200


async def test_a_changed_adapter_is_served_in_its_new_version(
    tmp_path: Path, adapters: Path
) -> None:
    folder = make_adapter(adapters, "a")
    async with cluster(sim_config(adapters, catalog_refresh_s=0.2), tmp_path) as c:
        await c.start_worker("w0")
        before = await c.text("sim:a", max_tokens=1)
        (folder / "adapter_model.safetensors").write_bytes(bytes(2000))
        async with asyncio.timeout(60):
            while await c.text("sim:a", max_tokens=1) == before:
                await asyncio.sleep(0.05)


async def test_every_answer_on_a_kept_connection_is_whole(tmp_path: Path, adapters: Path) -> None:
    async with cluster(sim_config(adapters, sim={"itl_ms": 0.1}), tmp_path) as c:
        await c.start_worker("w0")
        connector = aiohttp.TCPConnector(limit=1)
        async with aiohttp.ClientSession(connector=connector) as one:
            for i in range(60):
                body = chat_body("sim", max_tokens=1 + i % 7, stream=i % 3 != 0)
                async with one.post(c.url + "/v1/chat/completions", json=body) as answer:
                    raw = await answer.read()
                    assert answer.status == 200
                    if i % 3:
                        assert raw.endswith(b"data: [DONE]\n\n") and raw.count(b"data: ") >= 2
                    else:
                        assert msgspec.json.decode(raw)["usage"]["completion_tokens"] == 1 + i % 7


@pytest.mark.parametrize(
    "body",
    [
        chat_body("sim", max_tokens=3, seed=1),
        chat_body("sim:pirate", max_tokens=3, seed=1, stream=True),
        chat_body("other"),
        chat_body("sim:nobody"),
        chat_body("sim", max_tokens=0),
        chat_body("sim", priority="high"),
        {},
    ],
)
async def test_a_request_is_answered_alike_whichever_way_it_comes_in(
    bad_cluster, body: dict[str, object]
) -> None:
    """A request with a length takes the fast path. One in chunks goes through aiohttp."""

    async def in_chunks():  # type: ignore[no-untyped-def]
        yield msgspec.json.encode(body)

    make_adapter(bad_cluster.folder / "adapters", "pirate")
    answers = []
    for data in (msgspec.json.encode(body), in_chunks()):
        async with bad_cluster.http.post(
            f"{bad_cluster.url}/v1/chat/completions",
            data=data,
            headers={"x-request-id": "same", "Content-Type": "application/json"},
        ) as answer:
            text = re.sub(rb'"created":\d+', b'"created":0', await answer.read())
            names = {
                n
                for n in answer.headers
                if n.lower() not in ("date", "server", "x-loraplex-queue-ms")
            }
            answers.append((answer.status, text, {n.lower(): answer.headers[n] for n in names}))
    for _, _, headers in answers:
        headers.pop("content-length", None)
        headers["content-type"] = headers["content-type"].partition(";")[0]
        headers.pop("x-loraplex-adapter-tier", None)
    assert answers[0] == answers[1]


async def test_a_client_that_leaves_has_a_line_in_the_access_log_whichever_way_it_came(
    tmp_path: Path, adapters: Path
) -> None:
    async with cluster(sim_config(adapters, sim={"itl_ms": 50}), tmp_path) as c:
        await c.start_worker("w0")
        body = msgspec.json.encode(chat_body("sim", max_tokens=5_000, stream=True))

        async def in_chunks():  # type: ignore[no-untyped-def]
            yield body

        for request_id, data in (("short", body), ("aiohttp_path", in_chunks())):
            headers = {"x-request-id": request_id, "Content-Type": "application/json"}
            async with (
                aiohttp.ClientSession() as http,
                http.post(f"{c.url}/v1/chat/completions", data=data, headers=headers) as answer,
            ):
                await read_until(answer, b"data: ")
            async with asyncio.timeout(30):
                while not any(
                    f'"request":"{request_id}"' in line for line in c.gateway.output().splitlines()
                ):  # type: ignore[union-attr]
                    await asyncio.sleep(0.02)
            line = next(
                x for x in c.gateway.output().splitlines() if f'"request":"{request_id}"' in x
            )  # type: ignore[union-attr]
            facts = msgspec.json.decode(line)
            assert (facts["outcome"], facts["status"], facts["event"], facts["process"]) == (
                "aborted",
                200,
                "request",
                "g0",
            )
