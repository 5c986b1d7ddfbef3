"""Shell. Traces of requests, exported by OTLP over HTTP. The only `import opentelemetry`, and only
where `gateway.traces.endpoint` is set.

A request's spans are made at its end, from what is recorded anyway, so that a traced request costs
nothing on its way. The trace goes on from the client's `traceparent`, which also says whether it is
sampled. Other requests are sampled at random.
"""

from __future__ import annotations

import logging
import random
import re
import threading
import time
from collections.abc import Callable
from typing import Any, cast

import msgspec

from gateway.telemetry.ended_request import EndedRequest
from gateway.telemetry.request_spans import RequestSpan, asked_attributes, phase_spans, request_span
from gateway.telemetry.wall_clock import wall_offset
from shared.config.gateway import TracesConfig
from shared.errors import ConfigError

log = logging.getLogger("loraplex.traces")

TRACEPARENT, TRACESTATE = "traceparent", "tracestate"
MAX_TRACESTATE = 512
"""Characters that W3C Trace Context asks every system to pass on. A longer one is left out."""
MAX_PROMPT_CHARACTERS = 64 << 10
EXPORT_TIMEOUT_S = 5.0
CLOSE_S = 2.0
"""How long the end of the process waits for the last spans to be taken."""
SAY_AGAIN_S = 60.0
"""A collector that is gone is named so often, and not for each batch of spans."""
_TRACEPARENT = re.compile(
    r"(?P<version>(?!ff)[0-9a-f]{2})-(?P<trace>[0-9a-f]{32})-(?P<parent>[0-9a-f]{16})"
    r"-(?P<flags>[0-9a-f]{2})(?P<more>-.*)?\Z"
)
_TRACESTATE = re.compile(rf"[ -~]{{1,{MAX_TRACESTATE}}}\Z")
SAMPLED = 1


class IncomingTrace(msgspec.Struct, frozen=True):
    """What a request's headers say of the trace that it belongs to."""

    trace_id: int
    parent_id: int
    sampled: bool
    state: str = ""


def incoming_trace(header: Callable[[str], str | None]) -> IncomingTrace | None:
    """By the rules of W3C Trace Context. None: there is no `traceparent`, or one that cannot be
    read. Versions that come later may say more behind what is known.
    """
    given = _TRACEPARENT.match(header(TRACEPARENT) or "")
    if given is None or (given["version"] == "00" and given["more"]):
        return None
    trace_id, parent_id = int(given["trace"], 16), int(given["parent"], 16)
    if not trace_id or not parent_id:
        return None
    state = header(TRACESTATE) or ""
    sampled = bool(int(given["flags"], 16) & SAMPLED)
    return IncomingTrace(trace_id, parent_id, sampled, state if _TRACESTATE.match(state) else "")


class _ExportLog(logging.Handler):
    """What OpenTelemetry has to say, as a line of ours."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said_at = -SAY_AGAIN_S

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        if now - self._said_at >= SAY_AGAIN_S:
            self._said_at = now
            log.warning("traces cannot be sent", extra={"reason": record.getMessage()})


def _listen_to_the_library() -> None:
    """What it says of sending is for operators. What it says of a client's headers is for nobody:
    a `tracestate` that it cannot read is left out.
    """
    library, ours = logging.getLogger("opentelemetry"), _ExportLog()
    library.handlers, library.propagate = [logging.NullHandler()], False
    for part in ("sdk", "exporter"):
        library.getChild(part).handlers = [ours]


class RequestTrace:
    """A request that is traced. `traceparent` and `tracestate` are passed on to the worker. A
    `parent_id` of 0: the trace begins here.
    """

    __slots__ = (
        "_arrived",
        "_body",
        "_traces",
        "parent_id",
        "span_id",
        "trace_id",
        "tracestate",
    )

    def __init__(
        self,
        traces: Traces,
        trace_id: int,
        parent_id: int,
        tracestate: str,
        arrived: float,
        body: bytes,
    ) -> None:
        self._traces, self.trace_id, self.parent_id = traces, trace_id, parent_id
        self.tracestate = tracestate
        self.span_id = random.getrandbits(64) | 1
        self._arrived, self._body = arrived, body

    @property
    def id(self) -> str:
        return f"{self.trace_id:032x}"

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-01"

    def ended(self, ended: EndedRequest) -> None:
        """Hands the spans to the exporter, which works in a thread of its own."""
        body, self._body = self._body, b""
        span = request_span(ended, self._arrived, asked_attributes(body))
        phases = phase_spans(ended, self._arrived)
        self._traces.emit(self, span, phases, body)


class Traces:
    """Raises ConfigError if OpenTelemetry is not installed."""

    def __init__(
        self, config: TracesConfig, process: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ALWAYS_ON
        except ImportError as exc:
            raise ConfigError(
                f"gateway.traces.endpoint: OpenTelemetry is not installed ({exc}); "
                "install loraplex[traces]"
            ) from exc
        _listen_to_the_library()
        self._otel: Any = trace
        self._sample, self._prompts, self._clock = config.sample, config.prompts, clock
        self._ids = _Ids()
        resource = {"service.name": "loraplex", "service.instance.id": process}
        self._provider = TracerProvider(
            sampler=ALWAYS_ON,
            resource=Resource.create(resource),
            id_generator=cast(Any, self._ids),
            shutdown_on_exit=False,
        )
        exporter = OTLPSpanExporter(endpoint=config.endpoint, timeout=EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("loraplex")

    def begin(
        self, header: Callable[[str], str | None], arrived: float, body: bytes
    ) -> RequestTrace | None:
        """Begins the trace of a request with these headers. None: the request is not sampled."""
        given = incoming_trace(header)
        if given is not None and not given.sampled:
            return None
        if given is not None:
            return RequestTrace(self, given.trace_id, given.parent_id, given.state, arrived, body)
        if random.random() >= self._sample:
            return None
        return RequestTrace(self, random.getrandbits(128) | 1, 0, "", arrived, body)

    @staticmethod
    def for_engine(
        trace: RequestTrace | None, header: Callable[[str], str | None]
    ) -> tuple[str, str]:
        """The `traceparent` and `tracestate` that the engine gets. A request that is not sampled
        (None) says so: without them, the engine would begin a trace of its own.
        """
        if trace is not None:
            return trace.traceparent, trace.tracestate
        given = incoming_trace(header)
        if given is not None:
            return f"00-{given.trace_id:032x}-{given.parent_id:016x}-00", given.state
        return f"00-{random.getrandbits(128) | 1:032x}-{random.getrandbits(64) | 1:016x}-00", ""

    def close(self) -> None:
        """Sends what is left. It waits for at most CLOSE_S, whatever the collector does: the SDK
        knows no time limit (opentelemetry-python#4568), so a thread waits for it.
        """
        closing = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        closing.start()
        closing.join(CLOSE_S)

    def emit(
        self,
        of: RequestTrace,
        span: RequestSpan,
        phases: Any,
        body: bytes,
    ) -> None:
        otel, wall = self._otel, wall_offset(self._clock)
        self._ids.next = (of.trace_id, of.span_id)
        state = otel.TraceState.from_header([of.tracestate]) if of.tracestate else None
        parent = self._context(of.trace_id, of.parent_id, state) if of.parent_id else None
        whole = self._started(span, parent, otel.SpanKind.SERVER, wall)
        if self._prompts and body:
            prompt = body[:MAX_PROMPT_CHARACTERS].decode(errors="replace")
            whole.set_attribute("gen_ai.input.messages", prompt)
        inside = self._context(of.trace_id, of.span_id, state)
        for phase in phases:
            self._end(self._started(phase, inside, otel.SpanKind.INTERNAL, wall), phase, wall)
        self._end(whole, span, wall)

    def _context(self, trace_id: int, span_id: int, state: Any) -> Any:
        otel = self._otel
        of = otel.SpanContext(trace_id, span_id, True, otel.TraceFlags(SAMPLED), state)
        return otel.set_span_in_context(otel.NonRecordingSpan(of))

    def _started(self, span: RequestSpan, context: Any, kind: Any, wall: float) -> Any:
        return self._tracer.start_span(
            span.name,
            context=context,
            kind=kind,
            attributes=dict(span.attributes),
            start_time=_nanoseconds(span.start + wall),
        )

    def _end(self, started: Any, span: RequestSpan, wall: float) -> None:
        if span.error:
            started.set_status(self._otel.StatusCode.ERROR, span.error)
        started.end(end_time=_nanoseconds(span.end + wall))


class _Ids:
    """Gives the prepared ids to the next span that begins, and random ones to all others."""

    def __init__(self) -> None:
        self.next: tuple[int, int] | None = None

    def generate_trace_id(self) -> int:
        return self.next[0] if self.next is not None else random.getrandbits(128) | 1

    def generate_span_id(self) -> int:
        if self.next is not None:
            (_, span_id), self.next = self.next, None
            return span_id
        return random.getrandbits(64) | 1

    def is_trace_id_random(self) -> bool:
        return True


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
