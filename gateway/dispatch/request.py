"""Pure. One request at the gateway: what was asked, what answers it, whose it is, where it stands
and where its answer goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import msgspec

from gateway.dispatch.journal import StreamJournal
from gateway.dispatch.lifecycle import RequestLifecycle
from gateway.dispatch.queue.admission import Flow, Ticket
from gateway.routing.policy import Choice, RoutingRequest
from shared.adapters.identity import AdapterRef, StoredAdapter, key_of
from shared.errors import LoraplexError
from shared.link import messages

BYTES_PER_TOKEN = 4
"""Of English text in a BPE vocabulary of 32,000 to 150,000. Routing needs the order of magnitude;
the worker counts exactly.
"""
EXPECTED_OUTPUT_TOKENS = 128
"""Charged to a flow when a request without `max_tokens` is sent, and corrected when it ends."""


class ClientRequest(msgspec.Struct, frozen=True):
    """What the client asked for, as far as the gateway reads it.

    `prompt_tokens` is an estimate (see `estimated_tokens`); `output_tokens` is the client's limit,
    for each of its `choices`, 0 if it set none; `prefix` is a hash of the prompt's first bytes, 0
    if unknown; `streams` says that the client wants an event stream, so that it can be told what
    it waits for. `created` is the time that the answer carries, in seconds since 1970 (0: the
    worker's). `movable`: if its worker is lost, another one may continue the answer. `timeout_s` is
    the time that the client gives it, 0.0: as long as it takes. `owner` goes into the ids of
    answers that a worker keeps.
    """

    path: str
    request_id: str
    body: bytes
    prompt_tokens: int
    output_tokens: int = 0
    prefix: int = 0
    streams: bool = False
    created: int = 0
    movable: bool = False
    choices: int = 1
    timeout_s: float = 0.0
    method: str = "POST"
    content_type: str = "application/json"
    owner: str = ""


class RequestedModel(msgspec.Struct, frozen=True):
    """What answers the request. `stored` are the adapter's files.

    `shown_as` is the client's name for the model where that is not `base:name`. `elsewhere`: a
    worker that cannot get the adapter says nothing about the others.
    """

    base: str
    adapter: AdapterRef | None = None
    stored: StoredAdapter | None = None
    shown_as: str = ""
    elsewhere: bool = False
    only_on: messages.WorkerId = ""
    """The one worker that keeps what the request refers to; "": any worker."""


class Requester(msgspec.Struct, frozen=True):
    """Whose request it is. A lower `priority` goes first. `weight` is the tenant's share beside
    others that wait.
    """

    tenant: str = ""
    session: str = ""
    priority: int = 0
    weight: float = 1.0


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


class UsedTokens(msgspec.Struct, frozen=True):
    """What was worked on, whether the client saw its end or not."""

    prompt_tokens: int = 0
    output_tokens: int = 0


NOTHING_USED = UsedTokens()
UNKNOWN_REQUESTER = Requester()
NOT_SUBMITTED = RoutingRequest("")


class Bill(Protocol):
    """Who is told, once, what a request has used: when its `used` is final."""

    def settle(self, request: InFlightRequest) -> None: ...


class InFlightRequest:
    """One request at the gateway, from submit to its end. `flow` says whose turn it uses in the
    queue; `moves` counts the workers that were lost with a part of its answer sent. `code` is that
    of the error that its client got. What follows from its choice is as in EndedRequest. Times are
    on the dispatcher's clock, which sets them; `t_lost` is since when no worker has it any more.
    `answer_lines` are header lines of the worker's, which stand before the gateway's own.
    """

    __slots__ = (
        "answer_lines",
        "asked",
        "bill",
        "blocked",
        "candidates",
        "choice",
        "code",
        "done",
        "flow",
        "journal",
        "key",
        "life",
        "model",
        "moved_s",
        "moves",
        "refused_by",
        "requester",
        "routing_request",
        "sid",
        "sink",
        "t_end",
        "t_first_sent",
        "t_head",
        "t_lost",
        "t_sent",
        "t_start",
        "ticket",
        "used",
    )

    def __init__(
        self,
        asked: ClientRequest,
        model: RequestedModel,
        sink: Sink,
        requester: Requester = UNKNOWN_REQUESTER,
    ) -> None:
        self.asked, self.model, self.sink, self.requester = asked, model, sink, requester
        self.key = None if model.adapter is None else key_of(model.adapter)
        self.flow: Flow = (requester.priority, requester.tenant, self.key)
        self.routing_request = NOT_SUBMITTED
        self.life = RequestLifecycle()
        self.journal = StreamJournal(asked.movable)
        self.moves = 0
        self.sid: messages.StreamId = 0
        self.answer_lines = b""
        self.choice: Choice | None = None
        self.ticket: Ticket[InFlightRequest] | None = None
        self.refused_by: frozenset[messages.WorkerId] = frozenset()
        self.done: messages.Done | None = None
        self.used = NOTHING_USED
        self.bill: Bill | None = None
        self.code = self.blocked = ""
        self.candidates: tuple[Mapping[str, object], ...] = ()
        self.t_start = self.t_sent = self.t_head = self.t_end = 0.0
        self.t_first_sent = self.t_lost = self.moved_s = 0.0


def estimated_tokens(body: bytes) -> int:
    """Of the prompt, by the length of the whole body."""
    return len(body) // BYTES_PER_TOKEN


BYTES_PER_AUDIO_TOKEN = 640
"""Of 16 kHz 16-bit sound, of which Whisper makes 50 positions a second; compressed files have more
in as many bytes.
"""


def audio_tokens(body: bytes) -> int:
    """The same of an audio file."""
    return len(body) // BYTES_PER_AUDIO_TOKEN


def routing_request_of(request: InFlightRequest) -> RoutingRequest:
    """What routing is told of the request, as of its start."""
    asked, model, requester = request.asked, request.model, request.requester
    return RoutingRequest(
        model.base,
        model.adapter,
        model.stored.size_bytes if model.stored is not None else 0,
        asked.prompt_tokens,
        (asked.output_tokens or EXPECTED_OUTPUT_TOKENS) * asked.choices,
        requester.tenant,
        requester.session,
        asked.prefix,
        requester.priority,
        request.t_start,
    )
