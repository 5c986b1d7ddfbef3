"""Shell. Traces without OpenTelemetry, their config, their headers, and a collector that hangs."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

import pytest

from gateway.telemetry import traces
from gateway.telemetry.ended_request import EndedRequest
from gateway.telemetry.traces import IncomingTrace, Traces, incoming_trace
from shared.config.gateway import TracesConfig
from shared.errors import ConfigError

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def test_a_gateway_without_opentelemetry_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"gateway\.traces\.endpoint.*loraplex\[traces\]"):
        Traces(TracesConfig(endpoint="http://127.0.0.1:1/v1/traces"), "g0")


def test_a_gateway_without_traces_does_not_even_load_opentelemetry() -> None:
    script = (
        "import sys, gateway.app; sys.exit(any('opentelemetry' in name for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("traceparent", "sampled"),
    [
        (f"00-{TRACE}-{PARENT}-01", True),
        (f"00-{TRACE}-{PARENT}-03", True),
        (f"00-{TRACE}-{PARENT}-00", False),
        (f"cc-{TRACE}-{PARENT}-01", True),
        (f"cc-{TRACE}-{PARENT}-01-what-comes-later", True),
    ],
)
def test_a_traceparent_is_read_as_w3c_says(traceparent: str, sampled: bool) -> None:
    headers = {"traceparent": traceparent, "tracestate": "a=1,b@c=x y"}
    expected = IncomingTrace(int(TRACE, 16), int(PARENT, 16), sampled, "a=1,b@c=x y")
    assert incoming_trace(headers.get) == expected


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01-more",
        f"00-{TRACE}-{PARENT}-01\n",
        f"00-{TRACE}-{PARENT}-0",
        f"cc-{TRACE}-{PARENT}-01.more",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f" 00-{TRACE}-{PARENT}-01",
        "x" * 5000,
    ],
)
def test_a_traceparent_that_cannot_be_read_is_none(traceparent: str) -> None:
    assert incoming_trace({"traceparent": traceparent, "tracestate": "a=1"}.get) is None


@pytest.mark.parametrize("tracestate", ["", "a=\n", "a=\udcff", "a=é", "a=" + "x" * 511])
def test_a_tracestate_that_nobody_needs_to_pass_on_is_left_out(tracestate: str) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": tracestate}
    found = incoming_trace(headers.get)
    assert found is not None and found.state == ""


def test_a_collector_that_never_answers_holds_neither_a_request_nor_the_end_of_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(traces, "CLOSE_S", 0.1)
    # far longer than a busy machine takes for what follows
    monkeypatch.setattr(traces, "EXPORT_TIMEOUT_S", 200.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        sent = Traces(TracesConfig(endpoint=f"http://127.0.0.1:{port}/v1/traces", sample=1), "g0")
        ended = EndedRequest("m", "a", "finished", None, 1.0, 1.1, 1.2, 1.3)
        began = time.monotonic()
        for _ in range(1000):  # more spans than the queue holds
            trace = sent.begin({}.get, 1.0, b"{}")
            assert trace is not None
            trace.ended(ended)
        sent.close()
        assert time.monotonic() - began < traces.EXPORT_TIMEOUT_S


@pytest.mark.parametrize("tracestate", ["foo bar", "A=1,b=2"])
def test_a_tracestate_that_cannot_be_read_is_no_fault_of_the_collector(
    caplog: pytest.LogCaptureFixture, tracestate: str
) -> None:
    sent = Traces(TracesConfig(endpoint="http://127.0.0.1:1/v1/traces"), "g0")
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": tracestate}
    trace = sent.begin(headers.get, 1.0, b"{}")
    assert trace is not None
    with caplog.at_level("WARNING", "loraplex.traces"):
        trace.ended(EndedRequest("m", "a", "finished", None, 1.0, 1.1, 1.2, 1.3))
    sent.close()
    assert not any(tracestate.split(",")[0] in str(vars(line)) for line in caplog.records)
