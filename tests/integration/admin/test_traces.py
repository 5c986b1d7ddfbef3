"""Shell. Traces of requests, as a collector gets them."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

import pytest
from multidict import CIMultiDict

from tests.fault.test_link import ask
from tests.harness import chat_body, cluster, make_adapter, sim_config
from tests.otlp_collector import CollectedSpan, collector

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
END_S = 60.0
CLOCKS_NS = 1_000_000
"""How far the times of a span may be off. Requests are timed on the monotonic clock, and seconds
since 1970 are added to it at their end. The two clocks are read one after the other, 20 us apart
when all is well. A machine that gives no process a longer turn may leave more between them, and an
NTP client slews the wall clock.
"""


def named(spans: list[CollectedSpan], name: str) -> CollectedSpan:
    [found] = [span for span in spans if span.name == name]
    return found


async def test_the_trace_of_a_client_goes_on_with_a_span_for_the_request_and_one_for_each_phase(
    tmp_path: Path, adapters: Path
) -> None:
    make_adapter(adapters, "pirate")
    async with collector() as traces:
        config = sim_config(adapters, traces={"endpoint": traces.url, "sample": 0})
        async with cluster(config, tmp_path) as c:
            await c.start_worker("w0")
            began = time.time_ns()
            headers = {"traceparent": TRACEPARENT, "tracestate": "other=its-own,b=2"}
            body = chat_body("sim:pirate", "hi", stream=True, max_tokens=8, temperature=0.5)
            async with c.http.post(
                c.url + "/v1/chat/completions", json=body, headers=headers
            ) as answer:
                assert answer.status == 200 and await answer.read()
            spans = await traces.until(lambda spans: bool(spans))
            ended = time.time_ns()  # the client has all bytes before the request has ended
            assert await c.metric("gen_ai_server_request_duration_seconds_count") == 1
            asks = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"}
            async with c.http.get(f"{c.url}/metrics", headers=asks) as scraped:
                assert scraped.content_type == "application/openmetrics-text"
                shown = (await scraped.text()).splitlines()
            slow = [line for line in shown if line.startswith("loraplex_ttft_seconds_bucket")]
            assert [line for line in slow if f'# {{trace_id="{TRACE}"}}' in line], slow
            assert shown[-1] == "# EOF" and TRACE not in await c.metrics()
    whole = named(spans, "chat sim:pirate")
    assert (whole.trace_id, whole.parent_id, whole.failed) == (TRACE, PARENT, False)
    inside = [span for span in spans if span is not whole]
    assert {span.parent_id for span in inside} == {whole.span_id}
    assert {"admission", "fetch", "check", "load", "routing", "decode"} <= {s.name for s in inside}
    # among each other the spans are exact, beside the clock of this process they are not
    assert began - CLOCKS_NS <= whole.start_ns <= min(span.start_ns for span in inside)
    assert max(span.end_ns for span in inside) <= whole.end_ns <= ended + CLOCKS_NS
    assert {span.state for span in spans} == {"other=its-own,b=2"}
    assert whole.attributes["gen_ai.response.finish_reasons"] == ["length"]
    assert whole.attributes["gen_ai.request.model"] == "sim:pirate"
    assert whole.attributes["gen_ai.usage.output_tokens"] == 8
    assert whole.attributes["gen_ai.request.max_tokens"] == 8
    assert whole.attributes["gen_ai.request.temperature"] == 0.5
    assert whole.attributes["loraplex.adapter.tier"] == "remote"
    assert "gen_ai.input.messages" not in whole.attributes, "prompts are sent when asked for alone"
    decision = named(spans, "routing").attributes
    assert (decision["loraplex.worker"], decision["loraplex.routing.reason"]) == ("w0", "cold")


async def test_the_trace_of_an_answer_whose_worker_is_killed_shows_the_move(
    tmp_path: Path, adapters: Path
) -> None:
    async with collector() as traces:
        config = sim_config(adapters, sim={"itl_ms": 10}, traces={"endpoint": traces.url})
        config["gateway"]["traces"]["sample"] = 1
        async with cluster(config, tmp_path) as c:
            for name in ("w0", "w1"):
                await c.start_worker(name)
            stream = asyncio.create_task(ask(c, 300))
            async with asyncio.timeout(END_S):
                while not (held := await c.metric("loraplex_worker_load")):
                    await asyncio.sleep(0.02)
            assert held == 1
            busy = "w0" if await c.metric("loraplex_worker_load", worker="w0") else "w1"
            c.workers[busy].signal(signal.SIGKILL)
            await stream
            spans = await traces.until(lambda spans: bool(spans))
    [whole] = [span for span in spans if span.name.startswith("chat ")]
    if whole.attributes["loraplex.moves"]:  # the worker may have been killed before its first token
        assert {"lost", "move"} <= {span.name for span in spans}
    assert named(spans, "routing").attributes["loraplex.routing.attempts"] == 2
    assert whole.attributes["loraplex.worker"] != busy


@pytest.mark.parametrize("more", [{}, {"te": "trailers"}])  # aiohttp reads what is unusual
async def test_a_tracestate_in_several_fields_is_one(
    tmp_path: Path, adapters: Path, more: dict[str, str]
) -> None:
    async with collector() as traces:
        config = sim_config(adapters, traces={"endpoint": traces.url, "sample": 0})
        async with cluster(config, tmp_path) as c:
            await c.start_worker("w0")
            states = [("tracestate", "a=1"), ("tracestate", "b=2,c=3")]
            headers = CIMultiDict([("traceparent", TRACEPARENT), *states, *more.items()])
            body = chat_body("sim", "hi", max_tokens=1)
            async with c.http.post(
                c.url + "/v1/chat/completions", json=body, headers=headers
            ) as answer:
                assert answer.status == 200
            spans = await traces.until(lambda spans: bool(spans))
    assert {span.state for span in spans} == {"a=1,b=2,c=3"}


async def test_a_client_that_does_not_sample_is_not_traced_and_a_broken_header_is_none(
    tmp_path: Path, adapters: Path
) -> None:
    async with collector() as traces:
        config = sim_config(adapters, traces={"endpoint": traces.url, "prompts": True})
        config["gateway"]["traces"]["sample"] = 1
        async with cluster(config, tmp_path) as c:
            await c.start_worker("w0")
            for header in (TRACEPARENT[:-2] + "00", f"00-{'0' * 32}-{PARENT}-01", "x" * 5000):
                body = chat_body("sim", "hello there", max_tokens=2)
                async with c.http.post(
                    c.url + "/v1/chat/completions", json=body, headers={"traceparent": header}
                ) as answer:
                    assert answer.status == 200
            found = await traces.until(lambda s: sum(x.name == "chat sim" for x in s) == 2)
    whole = [span for span in found if span.name == "chat sim"]
    assert TRACE not in {span.trace_id for span in whole}
    assert len({span.trace_id for span in whole}) == 2
    assert all(span.parent_id == "" for span in whole)
    assert all("hello there" in span.attributes["gen_ai.input.messages"] for span in whole)


async def test_a_collector_that_is_gone_is_one_line_and_costs_no_request(
    tmp_path: Path, adapters: Path
) -> None:
    gone = {"endpoint": "http://127.0.0.1:9/v1/traces", "sample": 1}
    async with cluster(sim_config(adapters, traces=gone), tmp_path) as c:
        await c.start_worker("w0")
        assert c.gateway is not None
        async with asyncio.timeout(END_S):
            while '"traces cannot be sent"' not in c.gateway.output():
                assert (await c.chat("sim", max_tokens=1))[0] == 200
                await asyncio.sleep(0.1)
        said = c.gateway.output()
        assert said.count('"traces cannot be sent"') == 1
        assert all(line.startswith("{") for line in said.splitlines()), said


@pytest.mark.parametrize("path", ["/v1/chat/completions"])
async def test_a_request_that_fails_has_its_code_in_the_trace(
    tmp_path: Path, adapters: Path, path: str
) -> None:
    async with collector() as traces:
        config = sim_config(adapters, traces={"endpoint": traces.url, "sample": 1})
        config["gateway"]["queue_timeout_s"] = 0.3
        async with cluster(config, tmp_path) as c:
            async with c.http.post(c.url + path, json=chat_body("sim", "hi")) as answer:
                assert answer.status == 503
            spans = await traces.until(lambda spans: bool(spans))
    whole = named(spans, "chat sim")
    assert whole.failed and whole.attributes["error.type"] == "overloaded"
