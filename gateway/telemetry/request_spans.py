"""Pure. The trace spans of one request, made when it has ended. There is one for the request. Below
it there is one for each phase that took time, and one for the choice of its worker.

Names and attributes follow OpenTelemetry's conventions for generative AI. What these have no word
for is named `loraplex.*`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, TypeAlias

import msgspec

from gateway.telemetry.ended_request import EndedRequest
from gateway.telemetry.request_phases import phases_ms

AttributeValue: TypeAlias = str | int | float | bool | Sequence[str]
Attributes: TypeAlias = Mapping[str, AttributeValue]
NO_ATTRIBUTES: Attributes = {}
PROVIDER = "loraplex"
OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
    "/v2/embed": "embeddings",
}
"""Path -> gen_ai.operation.name. Other paths are named by their last part."""


SPAN_NAMES = {"moved": "move"}
"""Phases whose spans have another name."""
MAX_READ_BYTES = 1 << 20
"""The parameters of a longer body are not read again for its trace."""
MAX_STOP_CHARACTERS = 1024
"""Longer lists of stop sequences are left out: a span may wait long for a slow collector."""
Int64: TypeAlias = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
"""OTLP has no larger ones. A body with one is refused by the engine."""


class AskedParameters(msgspec.Struct):
    """The fields of a request's body that have an attribute."""

    max_tokens: Int64 | None = None
    max_completion_tokens: Int64 | None = None
    max_output_tokens: Int64 | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int64 | None = None
    seed: Int64 | None = None
    n: Int64 | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    stop: str | list[str] | None = None


_read_parameters = msgspec.json.Decoder(AskedParameters).decode


class RequestSpan(msgspec.Struct, frozen=True):
    """`start` and `end` are seconds on the dispatcher's clock."""

    name: str
    start: float
    end: float
    attributes: Attributes = {}
    error: str = ""
    """The code of an error; empty: none."""


def operation(path: str) -> str:
    path = path.partition("?")[0]
    return OPERATIONS.get(path) or path.rpartition("/")[2]


def model_of(e: EndedRequest) -> str:
    return e.base if e.adapter is None else f"{e.base}:{e.adapter}"


def asked_attributes(body: bytes) -> Attributes:
    """What the client asked of the model, without the prompt. Empty if the body is no JSON."""
    if len(body) > MAX_READ_BYTES:
        return {}
    try:
        parameters = _read_parameters(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return {}
    stop = [parameters.stop] if isinstance(parameters.stop, str) else parameters.stop or []
    most = parameters.max_completion_tokens or parameters.max_tokens or parameters.max_output_tokens
    facts: dict[str, AttributeValue | None] = {
        "gen_ai.request.max_tokens": most,
        "gen_ai.request.temperature": parameters.temperature,
        "gen_ai.request.top_p": parameters.top_p,
        "gen_ai.request.top_k": parameters.top_k,
        "gen_ai.request.seed": parameters.seed,
        "gen_ai.request.choice.count": parameters.n if parameters.n != 1 else None,
        "gen_ai.request.frequency_penalty": parameters.frequency_penalty,
        "gen_ai.request.presence_penalty": parameters.presence_penalty,
        "gen_ai.request.stop_sequences": stop
        if stop and sum(len(text) + 1 for text in stop) <= MAX_STOP_CHARACTERS
        else None,
    }
    return {name: value for name, value in facts.items() if value is not None}


def request_span(
    e: EndedRequest, arrived: float, parameters: Attributes = NO_ATTRIBUTES
) -> RequestSpan:
    """The span of the whole request, from its arrival on."""
    done, model = e.done, model_of(e)
    error = e.code or (str(e.engine_status) if e.engine_status else "")
    facts: dict[str, AttributeValue] = {
        **parameters,
        "gen_ai.operation.name": operation(e.path),
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.request.stream": e.streamed,
        "loraplex.request.id": e.request_id,
        "loraplex.outcome": e.outcome,
        "loraplex.worker": e.worker,
        "loraplex.moves": e.moves,
        "loraplex.adapter.digest": e.digest,
        "loraplex.adapter.tier": e.tier if e.adapter is not None else "",
        "loraplex.key": e.tenant,
        "error.type": error,
    }
    if e.is_counted:
        facts["gen_ai.usage.input_tokens"] = e.prompt_tokens
        facts["gen_ai.usage.output_tokens"] = e.output_tokens
    if done is not None and done.finish_reasons:
        facts["gen_ai.response.finish_reasons"] = done.finish_reasons.split(",")
    if e.first_token_s is not None:
        facts["gen_ai.response.time_to_first_chunk"] = e.first_token_s
    known = {name: value for name, value in facts.items() if value != ""}
    return RequestSpan(
        f"{operation(e.path)} {model}".rstrip(), min(arrived, e.t_start), e.t_end, known, error
    )


def phase_spans(e: EndedRequest, arrived: float) -> Iterator[RequestSpan]:
    """The admission first, then the phases in their order, and the routing at the time at which the
    last worker got the request.
    """
    yield RequestSpan("admission", min(arrived, e.t_start), e.t_start)
    at = e.t_start
    for name, ms in phases_ms(e).items():
        end = min(at + ms / 1e3, e.t_end)
        # a stream that another worker took at once has moved, too
        if ms or (name == "moved" and e.moves):
            yield RequestSpan(SPAN_NAMES.get(name, name), at, end, _moved(e, name))
        at = end
    if e.t_sent:
        yield RequestSpan("routing", e.t_sent, e.t_sent, _decision(e))


def _moved(e: EndedRequest, phase: str) -> Attributes:
    if phase != "moved" or not e.moves:
        return NO_ATTRIBUTES
    return {"loraplex.worker": e.worker, "loraplex.moves": e.moves, "loraplex.before": e.earlier}


def _decision(e: EndedRequest) -> Attributes:
    facts: dict[str, AttributeValue] = {
        "loraplex.worker": e.worker,
        "loraplex.routing.reason": e.reason,
        "loraplex.adapter.tier": e.tier,
        "loraplex.routing.attempts": e.attempts,
    }
    if e.cost is not None:
        facts["loraplex.routing.expected_ms"] = round(e.cost.total_s * 1e3, 2)
        for term, ms in e.cost.terms_ms().items():
            facts[f"loraplex.routing.{term}_ms"] = ms
    return facts
