"""Pure. One request at the gateway: what was asked, what answers it, who asks, its state, and where
its answer goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import msgspec

from gateway.dispatch.lifecycle import RequestLifecycle
from gateway.dispatch.queue.admission import Flow, Ticket
from gateway.dispatch.streams.journal import SWITCHED_OFF, StreamJournal
from gateway.routing.policy import Choice, RoutingRequest
from gateway.telemetry.ended_request import EndedRequest
from shared.adapters.identity import AdapterKey, AdapterRef, StoredAdapter, key_of
from shared.errors import InvalidRequest, LoraplexError
from shared.link import messages

BYTES_PER_TOKEN = 4
"""The average for English text with a BPE vocabulary of 32,000 to 150,000. Routing needs only the
order of magnitude; the worker counts exactly.
"""
EXPECTED_OUTPUT_TOKENS = 128
"""What a request without `max_tokens` is expected to take until it has ended."""


class ClientRequest(msgspec.Struct, frozen=True, gc=False):
    """What the client asked for, as far as the gateway reads it.

    `prompt_tokens` is an estimate (see `estimated_tokens`). `output_tokens` is the client's limit
    for each of its `choices` (0: none). `prefix` is a hash of the prompt's first bytes (0:
    unknown). `streams` means that the client wants an event stream, so it can be told what it waits
    for.

    `created` is the time that the answer carries, in seconds since 1970 (0: the worker's).
    `movable` means that another worker may continue the answer if its worker is lost. `timeout_s`
    is the time that the client allows (0.0: any). `answer_id` is the id under which the answer is
    stored, the same at every attempt ("": it is not stored). With a `key`, the client may ask for
    the same answer again, and if it leaves, the answer goes on for `keep_s`. An answer in the
    `background` goes on to its end once its client has been told its id.
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
    answer_id: str = ""
    traceparent: str = ""
    key: messages.AnswerKey | None = None
    keep_s: float = 0.0
    tracestate: str = ""
    background: bool = False


class RequestedModel(msgspec.Struct, frozen=True, gc=False):
    """What answers the request. `stored` are the adapter's files. `shown_as` is the client's name
    for the model, if it is not `base:name`. `elsewhere` means that other workers may have the
    adapter even if this one cannot get it.
    """

    base: str
    adapter: AdapterRef | None = None
    stored: StoredAdapter | None = None
    shown_as: str = ""
    elsewhere: bool = False
    only_on: tuple[bytes, ...] = ()
    """The only lives of workers that can answer, because they store what the request refers to. The
    first that can take the request gets it. Empty: any worker can.
    """
    first_on: messages.WorkerId = ""
    """The worker that keeps the answer. It is tried first while it is there; after that, any
    worker.
    """


class Requester(msgspec.Struct, frozen=True, gc=False):
    """Who asks. A lower `priority` goes first. `weight` is the tenant's share when several tenants
    wait. Requests share the engine's prefix cache with those of the same `cache_salt` alone. One
    `in_batch` is asked again if its turn does not come.
    """

    tenant: str = ""
    session: str = ""
    priority: int = 0
    weight: float = 1.0
    cache_salt: str = ""
    in_batch: bool = False


class Sink(Protocol):
    """Where a request's answer goes. No method may wait. `more` returns False if the client cannot
    take the data. Of an answer that is no stream the client sees nothing before its end, so a
    second `head` begins it anew.
    """

    def comment(self, text: bytes) -> None:
        """A comment before the head of a stream. Clients skip it."""
        ...

    def head(self, status: int, sse: bool, data: bytes, end: bool) -> None: ...
    def more(self, data: bytes, end: bool) -> bool: ...
    def fail(self, error: LoraplexError) -> None: ...


class NoClient:
    """The Sink of a request whose client has left, while its answer goes on. It takes everything,
    so the request keeps its place on the worker and is charged like any other.
    """

    def comment(self, text: bytes) -> None:
        return None

    def head(self, status: int, sse: bool, data: bytes, end: bool) -> None:
        return None

    def more(self, data: bytes, end: bool) -> bool:
        return True

    def fail(self, error: LoraplexError) -> None:
        return None


NO_CLIENT = NoClient()


class UsedTokens(msgspec.Struct, frozen=True, gc=False):
    """The tokens that were worked on, whether or not the client saw the end."""

    prompt_tokens: int = 0
    output_tokens: int = 0


FIRST_IN_LINE = -(1 << 40)
"""The priority of a request that has lost its worker. No client can give one as low."""
ON_TRIAL: AdapterKey = ("", "on trial")
ON_TRIAL_THERE: AdapterKey = ("", "on trial where something is stored")
"""In place of an adapter in a flow. No adapter has an empty name."""
NOTHING_USED = UsedTokens()
MAX_MESSAGE = 400
UNKNOWN_REQUESTER = Requester()
NOT_SUBMITTED = RoutingRequest("")


class UsageSink(Protocol):
    """Told once what a request has used, when its `used` is final."""

    def settle(self, request: InFlightRequest) -> None: ...


class Trace(Protocol):
    """Who makes spans of a request when it has ended. `id` is the trace's, in W3C's writing."""

    @property
    def id(self) -> str: ...
    def ended(self, ended: EndedRequest) -> None: ...


class InFlightRequest(msgspec.Struct, eq=False):
    """One request at the gateway, from submit to its end.

    `moves` counts the workers that continued an answer that had begun. While one is waited for,
    `moving` is what ended the attempt before, as a reason of moves. `lost` says why no other worker
    could continue the answer. `code` is that of the error that its client got. `engine_status` and
    fields about its choice are as in EndedRequest. Times are set by the dispatcher, on its clock.
    Since `t_lost` no worker has the request. If trials of others keep it from workers, it waits
    until `wait_until`. `expected_service` is what it was expected to take at its sends, in weighted
    tokens. `answer_lines` are the worker's header lines, which stand before the gateway's own.
    `stopped` means that its worker was told to stop, and says what the request has used. `apart`:
    it waits because it may share no worker with others of which workers died. `suspicion`: so many
    workers died of it, or of a copy of it, as it seemed when it was placed last.
    `digest`: see key_of_request. It is made once somebody asks for it.

    Every request makes one of these, and a Struct is made in a third of the time that a class with
    as many attributes takes.
    """

    client_request: ClientRequest
    model: RequestedModel
    sink: Sink
    requester: Requester = UNKNOWN_REQUESTER
    key: AdapterKey | None = None
    routing_request: RoutingRequest = NOT_SUBMITTED
    lifecycle: RequestLifecycle = msgspec.field(default_factory=RequestLifecycle)
    journal: StreamJournal = msgspec.field(default_factory=StreamJournal)
    moves: int = 0
    moving: str = ""
    lost: str = ""
    sid: messages.StreamId = 0
    peer: bytes = b""
    answer_lines: bytes = b""
    choice: Choice | None = None
    ticket: Ticket[InFlightRequest] | None = None
    refused_by: frozenset[messages.WorkerId] = frozenset()
    done: messages.Done | None = None
    used: UsedTokens = NOTHING_USED
    stopped: bool = False
    expected_service: float = 0.0
    usage_sink: UsageSink | None = None
    trace: Trace | None = None
    code: str = ""
    message: str = ""
    engine_status: int = 0
    blocked: str = ""
    apart: bool = False
    suspicion: int = 0
    earlier: tuple[str, ...] = ()
    candidates: tuple[Mapping[str, object], ...] = ()
    t_start: float = 0.0
    t_sent: float = 0.0
    t_head: float = 0.0
    t_end: float = 0.0
    t_first_sent: float = 0.0
    t_lost: float = 0.0
    wait_until: float = 0.0
    moved_s: float = 0.0
    digest: bytes = b""

    def __post_init__(self) -> None:
        if self.model.adapter is not None:
            self.key = key_of(self.model.adapter)
        if not self.client_request.movable:
            self.journal.obstacle = SWITCHED_OFF

    @property
    def flow(self) -> Flow:
        """Whose turn in the queue it uses. One that has lost a worker goes first. All that wait for
        trials have one flow, whatever their adapters, and others pass them. So do those that may
        have any worker pass those that may not.
        """
        key = self.key
        if self.apart:
            key = ON_TRIAL_THERE if self.model.only_on else ON_TRIAL
        return (
            FIRST_IN_LINE if self.earlier else self.requester.priority,
            self.requester.tenant,
            key,
        )

    def note_error(self, error: LoraplexError) -> None:
        """What the client is told, for whoever asks later what became of the request."""
        self.code, self.message = error.code, message_of(error)


def cannot_go_on(request: InFlightRequest, error: LoraplexError, reason: str) -> LoraplexError:
    """Notes why no other worker continues an answer that its client has begun to see. Returns what
    its client is told.
    """
    request.lost = reason
    return type(error)(f"{error.message} It cannot be continued elsewhere: {reason}.")


def message_of(error: LoraplexError) -> str:
    """The error's message as it may be kept and shown to operators. Empty if the request was
    invalid, because the message may then quote a prompt.
    """
    return "" if isinstance(error, InvalidRequest) else error.message[:MAX_MESSAGE]


def estimated_tokens(body: bytes) -> int:
    """An estimate of the prompt's tokens from the length of the whole body."""
    return len(body) // BYTES_PER_TOKEN


BYTES_PER_AUDIO_TOKEN = 640
"""Of 16 kHz 16-bit sound, of which Whisper makes 50 positions a second. Compressed files hold more
sound in as many bytes.
"""


def audio_tokens(body: bytes) -> int:
    """An estimate of the tokens of an audio file."""
    return len(body) // BYTES_PER_AUDIO_TOKEN


def routing_request_of(request: InFlightRequest) -> RoutingRequest:
    """The request as routing gets it."""
    client_request, model = request.client_request, request.model
    return RoutingRequest(
        model.base,
        model.adapter,
        client_request.prompt_tokens,
        (client_request.output_tokens or EXPECTED_OUTPUT_TOKENS) * client_request.choices,
        request.requester.session,
        client_request.prefix,
    )
