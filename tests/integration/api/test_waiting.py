"""Shell. Requests that wait for a worker or for an adapter: what their clients hear meanwhile, and
what happens when their time is over.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest
import pytest_asyncio

from tests.harness import Cluster, chat_body, cluster, make_adapter, sim_config

LOAD_MS = 2000
END_S = 60.0
LOADING = b": loading adapter slow\n\n"


@pytest_asyncio.fixture(loop_scope="session")
async def slow(tmp_path: Path, adapters: Path) -> AsyncIterator[Cluster]:
    """One worker, on which the adapter `slow` takes two seconds to load."""
    make_adapter(adapters, "slow")
    async with cluster(
        sim_config(adapters, sim={"load_ms": LOAD_MS}, progress_s=0.3, max_queued_requests=2),
        tmp_path,
    ) as c:
        await c.start_worker("w0")
        yield c


async def connect(c: Cluster) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = c.url.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port))


def raw_request(body: dict[str, object], version: str = "1.1") -> bytes:
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/{version}\r\nHost: localhost\r\nContent-Type: "
        f"application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


async def test_the_openai_sdk_streams_over_comments(slow: Cluster) -> None:
    async with openai.AsyncOpenAI(base_url=slow.url + "/v1", api_key="x", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model="sim:slow",
            messages=[{"role": "user", "content": "hello"}],
            max_tokens=5,
            stream=True,
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert "adapter=slow " in text and text.endswith("w3")


async def test_comments_come_one_by_one_while_the_adapter_loads_and_not_after(
    slow: Cluster,
) -> None:
    body = chat_body("sim:slow", max_tokens=3, stream=True)
    async with (
        asyncio.timeout(END_S),
        slow.http.post(slow.url + "/v1/chat/completions", json=body) as answer,
    ):
        first = await answer.content.readuntil(b"\n\n")
        assert (
            first == LOADING
            and answer.status == 200
            and answer.headers["x-loraplex-worker"] == "w0"
        )
        rest = await answer.content.read()
    assert (
        rest.count(LOADING) >= 2
        and rest.rindex(LOADING) < rest.index(b"data: ")
        and rest.endswith(b"data: [DONE]\n\n")
    )


async def test_a_connection_with_comments_can_be_used_again(slow: Cluster) -> None:
    reader, writer = await connect(slow)
    async with asyncio.timeout(END_S):
        writer.write(raw_request(chat_body("sim:slow", max_tokens=2, stream=True)))
        raw = await reader.readuntil(b"\r\n0\r\n\r\n")
        assert raw.startswith(b"HTTP/1.1 200 OK\r\n") and LOADING in raw and b"data: [DONE]" in raw
        writer.write(raw_request(chat_body("sim", max_tokens=2)))
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    writer.close()


async def test_an_http_1_0_client_gets_comments_as_plain_bytes(slow: Cluster) -> None:
    reader, writer = await connect(slow)
    async with asyncio.timeout(END_S):
        writer.write(raw_request(chat_body("sim:slow", max_tokens=2, stream=True), "1.0"))
        raw = await reader.read()
    body = raw.partition(b"\r\n\r\n")[2]
    assert (
        body.startswith(LOADING + LOADING)
        and body.endswith(b"data: [DONE]\n\n")
        and b"chunked" not in raw
    )
    writer.close()


async def test_a_client_that_leaves_during_comments_is_forgotten(slow: Cluster) -> None:
    _, writer = await connect(slow)
    writer.write(raw_request(chat_body("sim:slow", stream=True)))
    async with asyncio.timeout(END_S):
        while await slow.metric("loraplex_worker_load", worker="w0") != 1:
            await asyncio.sleep(0.01)
        writer.transport.abort()
        while await slow.metric("loraplex_requests_total", outcome="aborted") != 1:
            await asyncio.sleep(0.01)
        while await slow.metric("loraplex_worker_load", worker="w0") != 0:
            await asyncio.sleep(0.01)
    assert (await slow.chat("sim:slow", max_tokens=1))[0] == 200


async def test_quick_errors_of_a_stream_keep_their_own_status(
    tmp_path: Path, adapters: Path
) -> None:
    make_adapter(adapters, "bad").joinpath("adapter_config.json").write_text("{")
    # quick is what comes before the first comment, on a busy machine too
    async with cluster(sim_config(adapters, progress_s=END_S), tmp_path) as c:
        await c.start_worker("w0")
        assert (await c.chat("sim:nobody", stream=True))[0] == 404
        assert (await c.chat("sim:bad", stream=True))[0] == 422
        assert (await c.chat("sim", stream=True, max_tokens=0))[0] == 400


async def test_an_error_after_comments_is_an_event_that_the_openai_sdk_raises(
    tmp_path: Path, adapters: Path
) -> None:
    async with cluster(sim_config(adapters, progress_s=0.2, queue_timeout_s=1.0), tmp_path) as c:
        async with openai.AsyncOpenAI(base_url=c.url + "/v1", api_key="x", max_retries=0) as client:
            stream = await client.chat.completions.create(
                model="sim", messages=[{"role": "user", "content": "x"}], stream=True
            )
            with pytest.raises(openai.APIError) as caught:
                async for _ in stream:
                    pass
        assert caught.value.code == "overloaded"
        assert await c.metric("loraplex_error_responses_total", code="overloaded") == 1


async def test_a_request_waits_on_while_a_worker_starts_whoever_starts_it(
    tmp_path: Path, adapters: Path
) -> None:
    """It has waited for longer than `queue_timeout_s` when its worker serves."""
    async with cluster(sim_config(adapters, progress_s=0.3, queue_timeout_s=0.5), tmp_path) as c:
        worker = await c.start_worker("w0", serving=False)
        async with asyncio.timeout(END_S):
            while await c.metric("loraplex_worker_up", worker="w0", state="joining") != 1:
                await asyncio.sleep(0)
        worker.signal(signal.SIGSTOP)
        reader, writer = await connect(c)
        writer.write(raw_request(chat_body("sim", max_tokens=3, stream=True)))
        async with asyncio.timeout(END_S):
            for _ in range(3):
                await reader.readuntil(b": starting a worker\n\n")
            worker.signal(signal.SIGCONT)
            await reader.readuntil(b"data: [DONE]")
        writer.close()


async def test_no_comment_is_sent_where_the_config_says_so(tmp_path: Path, adapters: Path) -> None:
    async with cluster(sim_config(adapters, progress_s=None, queue_timeout_s=1.0), tmp_path) as c:
        assert (await c.chat("sim", stream=True))[0] == 503


async def test_a_queued_request_whose_deadline_passes_gets_504_and_leaves_the_queue(
    tmp_path: Path, adapters: Path
) -> None:
    async with cluster(sim_config(adapters), tmp_path) as c:
        status, answer, _ = await c.post(
            "/v1/chat/completions", chat_body("sim"), {"x-loraplex-timeout-ms": "200"}
        )
        assert (
            status == 504
            and answer["error"]["code"] == "deadline_exceeded"
            and "queued" in answer["error"]["message"]
        )
        assert await c.metric("loraplex_queue_depth", base="sim") == 0
        assert await c.metric("loraplex_requests_total", outcome="failed") == 1


async def test_a_running_request_whose_deadline_passes_gets_504_and_its_worker_stops(
    slow: Cluster,
) -> None:
    for stream in (False, True):  # no byte of it was there in time, so the status is still free
        body = chat_body("sim:slow" if stream else "sim", max_tokens=3000, stream=stream)
        status, answer, _ = await slow.post(
            "/v1/chat/completions", body, {"x-loraplex-timeout-ms": "250"}
        )
        assert status == 504 and answer["error"]["code"] == "deadline_exceeded"
    async with asyncio.timeout(END_S):
        while await slow.metric("loraplex_worker_load", worker="w0") != 0:
            await asyncio.sleep(0.01)


async def test_a_deadline_in_the_middle_of_a_stream_is_an_error_event(slow: Cluster) -> None:
    body = chat_body("sim", max_tokens=3000, stream=True)
    status, raw, _ = await slow.post("/v1/chat/completions", body, {"x-loraplex-timeout-ms": "400"})
    assert (
        status == 200 and '"code":"deadline_exceeded"' in raw and raw.endswith("data: [DONE]\n\n")
    )


@pytest.mark.parametrize("given", ["0", "-1", "1.5", "soon", "", "99999999999"])
async def test_a_deadline_that_is_no_number_of_milliseconds_is_400(
    slow: Cluster, given: str
) -> None:
    status, answer, _ = await slow.post(
        "/v1/chat/completions", chat_body("sim"), {"x-loraplex-timeout-ms": given}
    )
    assert status == 400 and answer["error"]["param"] == "x-loraplex-timeout-ms"


async def test_a_full_queue_answers_as_the_models_config_says(
    tmp_path: Path, adapters: Path
) -> None:
    config = sim_config(adapters)
    config["llm_configs"][0]["deployment_config"] = {
        "max_ongoing_requests": 1,
        "max_queued_requests": 1,
        "backpressure_config": {"status_code": 429, "retry_after_s": 7},
    }
    async with cluster(config, tmp_path) as c:
        await c.start_worker("w0")
        assert await c.metric("loraplex_worker_capacity", worker="w0") == 1
        taken = [asyncio.create_task(c.chat("sim", max_tokens=300)) for _ in range(2)]
        async with asyncio.timeout(END_S):
            while await c.metric("loraplex_queue_depth", base="sim") != 1:
                await asyncio.sleep(0.01)
        status, answer, headers = await c.chat("sim")
        assert status == 429 and headers["Retry-After"] == "7"
        assert (answer["error"]["code"], answer["error"]["type"]) == (
            "rate_limit_exceeded",
            "rate_limit_error",
        )
        assert [status for status, _, _ in await asyncio.gather(*taken)] == [200, 200]
        assert await c.metric("loraplex_error_responses_total", code="rate_limit_exceeded") == 1
