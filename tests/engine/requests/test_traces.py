"""Shell. One trace from the client's header to vLLM's own span, for a streamed answer of an adapter
that another worker went on with.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from shared.runtime.children import Zygote
from tests.harness import Cluster, chat_body, cluster, demo_config
from tests.otlp_collector import CollectedSpan, collector

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
ENGINE_SPAN = "llm_request"
HTTP = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}


def ours(spans: list[CollectedSpan]) -> list[CollectedSpan]:
    """Without those of the requests that a worker makes itself before it serves."""
    return [span for span in spans if span.trace_id == TRACE]


LAST = "c" * 32
UNSAMPLED: tuple[dict[str, str], ...] = ({}, {"traceparent": f"00-{'a' * 32}-{PARENT}-00"})
"""Headers of clients that leave it to the gateway, which samples none here, and that say no."""


async def answered(c: Cluster, last: str, headers: Sequence[Mapping[str, str]]) -> None:
    """Streamed or not, with each of the headers, and then once in the trace `last`."""
    traced = {"traceparent": f"00-{last}-{PARENT}-01"}
    for number, given in enumerate((*headers, traced)):
        for streamed in (True, False):
            body = chat_body("demo:pirate", "Hello!", stream=streamed, max_tokens=2)
            named = {"x-request-id": f"{'last' if given is traced else 'unsampled'}-{number}"}
            assert (await c.post("/v1/chat/completions", body, named | dict(given)))[0] == 200


async def test_one_trace_leads_from_the_client_to_the_engine_that_went_on(
    zygote: Zygote, tmp_path: Path
) -> None:
    async with collector() as traces:
        config = demo_config(
            max_loras=2,
            engine={"otlp_traces_endpoint": traces.url},
            traces={"endpoint": traces.url, "sample": 0},
        )
        async with cluster(config, tmp_path, zygote) as c:
            for name in ("w0", "w1"):
                await c.start_worker(name, env=HTTP)
            body = chat_body("demo:pirate", "Hello!", stream=True, max_tokens=200, ignore_eos=True)
            killed, last = "", b""
            async with c.http.post(
                c.url + "/v1/chat/completions",
                json=body,
                headers={"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "other=1"},
            ) as answer:
                async for line in answer.content:
                    last = line if line.strip() else last
                    if not killed and b'"content":"' in line and b'"content":""' not in line:
                        killed = answer.headers["x-loraplex-worker"]
                        c.workers[killed].signal(signal.SIGKILL)
            assert last.strip() == b"data: [DONE]" and killed
            spans = await traces.until(
                lambda spans: {ENGINE_SPAN, "chat demo:pirate"} <= {s.name for s in ours(spans)}
            )
            await answered(c, LAST, UNSAMPLED)
            await traces.until(
                lambda spans: (LAST, ENGINE_SPAN) in [(s.trace_id, s.name) for s in spans]
            )
    assert not [span for span in spans if "unsampled" in str(span.attributes)]
    whole = next(span for span in spans if span.name == "chat demo:pirate")
    engine = next(span for span in ours(spans) if span.name == ENGINE_SPAN)
    assert (whole.trace_id, whole.parent_id) == (TRACE, PARENT)
    assert (engine.trace_id, engine.parent_id) == (TRACE, whole.span_id)
    assert whole.attributes["loraplex.moves"] == 1
    assert whole.attributes["gen_ai.response.finish_reasons"] == ["length"]
    assert whole.state == engine.state == "other=1"
    assert whole.attributes["loraplex.worker"] not in ("", killed)
    assert {"lost", "move", "load", "routing"} <= {span.name for span in spans}
