"""Pure. One request at the gateway: what is known of it, where it stands, and where its answer
goes.
"""

from __future__ import annotations

from typing import Protocol

from gateway.dispatch.admission import Flow, Ticket
from gateway.dispatch.lifecycle import RequestLifecycle
from gateway.fleet.worker_view import Key
from gateway.routing.policy import Choice, RoutingRequest
from shared.adapters.identity import AdapterRef, StoredAdapter, key_of
from shared.errors import LoraplexError
from shared.link import messages

BYTES_PER_TOKEN = 4
"""Of English text in a BPE vocabulary of 32,000 to 150,000; routing needs the order of magnitude,
the worker counts exactly.
"""
EXPECTED_OUTPUT_TOKENS = 128
"""Charged to a flow when a request without `max_tokens` is sent, and corrected when it ends."""
NO_ASK = RoutingRequest("")


class Sink(Protocol):
    """Where a request's answer goes. None of these may wait; `more` returns False if the client
    cannot take it.
    """

    def comment(self, text: bytes) -> None:
        """Before the head of a stream: something that clients skip."""
        ...

    def head(self, status: int, sse: bool, data: bytes, end: bool) -> None: ...
    def more(self, data: bytes, end: bool) -> bool: ...
    def fail(self, error: LoraplexError) -> None: ...


class InFlightRequest:
    """One request at the gateway, from submit to its end. `prompt_tokens` defaults to an estimate
    from the body's length.
    """

    __slots__ = (
        "adapter",
        "ask",
        "base",
        "body",
        "choice",
        "done",
        "elsewhere",
        "life",
        "model",
        "output_tokens",
        "path",
        "prefix",
        "priority",
        "prompt_tokens",
        "refused_by",
        "request_id",
        "session",
        "sid",
        "sink",
        "stored",
        "streams",
        "t_end",
        "t_head",
        "t_sent",
        "t_start",
        "tenant",
        "ticket",
    )

    def __init__(
        self,
        base: str,
        adapter: AdapterRef | None,
        stored: StoredAdapter | None,
        path: str,
        request_id: str,
        body: bytes,
        sink: Sink,
        *,
        prompt_tokens: int | None = None,
        output_tokens: int = 0,
        tenant: str = "",
        session: str = "",
        prefix: int = 0,
        priority: int = 0,
        streams: bool = False,
        model: str = "",
        elsewhere: bool = False,
    ) -> None:
        self.base, self.adapter, self.stored = base, adapter, stored
        self.path, self.request_id, self.body, self.sink = path, request_id, body, sink
        self.prompt_tokens = (
            len(body) // BYTES_PER_TOKEN if prompt_tokens is None else prompt_tokens
        )
        self.output_tokens = output_tokens
        self.tenant, self.session, self.prefix, self.priority = tenant, session, prefix, priority
        self.streams = streams  # asked for an event stream: it can be told what it waits for
        self.model = model  # what the client called it, where that is not `base:name`
        # a worker that cannot get the adapter says nothing about the others
        self.elsewhere = elsewhere
        self.ask = NO_ASK  # made by the dispatcher, on its clock
        self.life = RequestLifecycle()
        self.sid: messages.StreamId = 0
        self.choice: Choice | None = None
        self.ticket: Ticket[InFlightRequest] | None = None
        self.refused_by: frozenset[messages.WorkerId] = frozenset()
        self.done: messages.Done | None = None
        # set by the dispatcher, on its clock
        self.t_start = self.t_sent = self.t_head = self.t_end = 0.0


def routing_request_of(request: InFlightRequest) -> RoutingRequest:
    """What routing is told of it, as of its start."""
    size_bytes = request.stored.size_bytes if request.stored is not None else 0
    return RoutingRequest(
        request.base,
        request.adapter,
        size_bytes,
        request.prompt_tokens,
        request.output_tokens or EXPECTED_OUTPUT_TOKENS,
        request.tenant,
        request.session,
        request.prefix,
        request.priority,
        request.t_start,
    )


def flow_of(request: InFlightRequest) -> Flow:
    """Whose turn it uses in the queue."""
    return (request.priority, request.tenant, adapter_key(request.adapter))


def adapter_key(adapter: AdapterRef | None) -> Key | None:
    return None if adapter is None else key_of(adapter)
