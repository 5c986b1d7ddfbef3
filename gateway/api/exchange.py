"""Shell. One request for tokens, from its head to its last byte. It is submitted, waits, is tried
again if the adapter's version has changed meanwhile, and is logged at its end.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from gateway.accounts.owned_ids import stored_id
from gateway.adapters.resolver import ResolvedModel
from gateway.api.access_record import access_record, head_lines
from gateway.api.account_limits import allowed_body
from gateway.api.accounting import RequestCharge
from gateway.api.body import schema
from gateway.api.body.bounds import sequences
from gateway.api.head_facts import HeadFacts
from gateway.api.services import GenerationServices
from gateway.api.stored_responses import StoredResponse
from gateway.dispatch.request import (
    ClientRequest,
    InFlightRequest,
    RequestedModel,
    Requester,
    audio_tokens,
    estimated_tokens,
)
from gateway.dispatch.workers.commands import KeptOn
from gateway.http.headers import (
    IncomingRequest,
    RequestDeadline,
    new_request_id,
)
from gateway.http.response import ResponseWriter
from gateway.telemetry.traces import RequestTrace, Traces
from shared.adapters.identity import AdapterRef
from shared.api_endpoints import (
    ENDPOINTS,
    RESPONSES_PATH,
    Endpoint,
    ErrorFamily,
    ModelIn,
    can_do,
    cannot_do,
    endpoint_of,
)
from shared.errors import (
    AdapterNotFound,
    InvalidRequest,
    LoraplexError,
    RouteNotFound,
    WorkerUnavailable,
)
from shared.link.messages import AnswerKey, WorkerId

T = TypeVar("T")
SECRET_BYTES = 12
MAX_LOOKS = 3
"""How often the version of one request is looked up again. A second time is needed where the worker
that had it was lost meanwhile.
"""


class Exchange:
    """What was asked, what answers it, and where the answer goes. `fields` are those of a body that
    was parsed already.

    Raises InvalidRequest for a body or a header that cannot be served.
    """

    __slots__ = (
        "_body",
        "_charge",
        "_created",
        "_done",
        "_facts",
        "_gone",
        "_incoming",
        "_keeper",
        "_kept_by",
        "_key",
        "_limit_lines",
        "_looks",
        "_most_tokens",
        "_path",
        "_retry",
        "_services",
        "account",
        "deadline",
        "endpoint",
        "head",
        "inflight",
        "model",
        "request_id",
        "stream",
        "target",
    )

    def __init__(
        self,
        services: GenerationServices,
        facts: HeadFacts,
        incoming: IncomingRequest,
        body: bytes,
        stream: ResponseWriter,
        kept: StoredResponse | None = None,
        fields: schema.BodyFields | None = None,
    ) -> None:
        self._services, self._incoming, self.stream = services, incoming, stream
        self._facts = facts
        self.account = account = facts.account
        self.endpoint = ENDPOINTS.get(incoming.path) or _endpoint(incoming.path)
        if kept is None:
            self.head = fields or schema.read_fields(
                self.endpoint, facts.content_type, body, services.limits.bounds
            )
            self.model = self.head.model or services.resolver.default(account)
        else:
            self.head, self.model = schema.BodyFields(stream=kept.streams), kept.base
        self._kept_by = kept.workers if kept is not None else ()
        self._key: AnswerKey | None = None
        self._keeper: WorkerId = ""
        self._created = 0
        self._path = incoming.path if kept is None or not kept.path else kept.path
        services.resolver.check_scope(account, self.model)
        self._most_tokens = asked = self.head.limit(self.endpoint)
        self._body = allowed_body(
            account, self.head, body, self.endpoint, asked, facts.content_type
        )
        self.request_id = facts.given_id or new_request_id()
        self.deadline = self._deadline()
        self.target: ResolvedModel
        self.inflight: InFlightRequest
        self._charge: RequestCharge
        self._done: Callable[[], object] = bool  # nobody is told
        self._retry: asyncio.Task[None] | None = None
        self._looks = 0
        self._gone = False
        self._limit_lines = b""

    @property
    def previous(self) -> str:
        """The id of the stored answer that this request goes on from. Empty: of none."""
        previous = self.head.previous_response_id
        return previous if previous and self.endpoint.errors is ErrorFamily.RESPONSES else ""

    def goes_on_from(self, previous: StoredResponse) -> None:
        """Before `attempt`: only these workers know what the request refers to."""
        self._kept_by = previous.workers

    def repeat(self, key: AnswerKey, found: KeptOn | None) -> None:
        """Before `attempt`: the client may ask for the same answer again, or does so."""
        self._key = key
        if found is not None:
            self._keeper, self._created = found.worker, found.created
            self.request_id = found.request_id

    @property
    def submitted(self) -> bool:
        """Whether the dispatcher has seen it."""
        inflight = getattr(self, "inflight", None)
        return inflight is not None and bool(inflight.t_start)

    @property
    def age_s(self) -> float:
        """How long ago its head was read."""
        return self._services.loop.time() - (self.deadline.at - self.deadline.after_s)

    @property
    def on_worker(self) -> bool:
        """See Repeatable."""
        inflight = getattr(self, "inflight", None)
        return inflight is not None and bool(inflight.t_sent)

    @property
    def took_too_long(self) -> bool:
        """Of one whose time is over: whether most of it went by on its worker. So more time in the
        queue was not what it lacked.
        """
        inflight: InFlightRequest | None = getattr(self, "inflight", None)
        if inflight is None or not inflight.t_sent:
            return False
        return inflight.t_end - inflight.t_sent > self.deadline.after_s / 2

    def attempt(self, target: ResolvedModel, done: Callable[[], object]) -> None:
        """Has `target` answer the request. `done` is called once the answer has ended, in a later
        turn of the event loop. It is not called after `cancel`.

        The version may have become outdated after it was listed. Then the current version is tried
        before `done` is called, MAX_LOOKS times at most.

        Raises Overloaded, RateLimited, WorkerUnavailable or WorkersDied. The exchange is then over.
        """
        self._done = done
        try:
            self._submit(target)
        except LoraplexError as exc:
            self._services.resolver.ended(target, 0, exc)
            self._done = bool
            raise

    def cancel(self) -> None:
        """The client has left."""
        self._gone = True
        if self._retry is not None:
            self._retry.cancel()
        self._leave()
        client_request = self.inflight.client_request
        # its answer goes on, for who asks for it again
        if not self.inflight.lifecycle.over and not client_request.background:
            until = self._services.loop.time() + client_request.keep_s
            self._services.deadlines.enter(self, min(until, self.deadline.at))
        self._log()
        self._done = bool
        self.stream.let_go()

    def end_with_error(self) -> None:
        """Ends the answer with its error if the client has seen the status already. Otherwise the
        client can still get another answer.
        """
        stream = self.stream
        assert stream.error is not None
        self._services.metrics.error(stream.error.code)
        if not stream.answered:
            stream.end_with(stream.error)

    async def in_time(self, awaited: Awaitable[T]) -> T:
        """Waits for `awaited`, but not beyond the request's deadline. Raises DeadlineExceeded."""
        try:
            async with asyncio.timeout_at(self.deadline.at):
                return await awaited
        except TimeoutError as exc:
            raise self.deadline.exceeded("looked up") from exc

    # ---- inside ----------------------------------------------------------------------------------

    def _submit(self, target: ResolvedModel) -> None:
        services, ref = self._services, target.adapter
        self.target = target
        self._check_task(target)
        inflight = self._inflight(target)
        services.dispatcher.check_deadly(inflight)
        charge = self._charge = services.accounting.admit(self.account, inflight)
        self.inflight = inflight
        self._limit_lines = charge.header_lines or b""
        self.stream.on_finish = self._on_finish
        self.stream.describe(self._head_lines)
        if ref is not None:
            services.resolver.use(target)
            services.usage.used(ref, time.time())
        try:
            services.dispatcher.submit(inflight)
        except LoraplexError:
            charge.refuse()
            self.stream.let_go()
            raise
        services.deadlines.enter(self, self.deadline.at)

    def _check_task(self, target: ResolvedModel) -> None:
        """Raises InvalidRequest if the model is known not to support the endpoint."""
        workers = self._services.dispatcher.fleet.pool(target.base).workers
        if workers:
            tasks = workers[0].heartbeat.tasks
            if tasks and not can_do(self.endpoint, tasks):
                raise InvalidRequest(cannot_do(self.model, self.endpoint, tasks), param="model")

    def _inflight(self, target: ResolvedModel) -> InFlightRequest:
        facts, head, body, ref = self._facts, self.head, self._body, target.adapter
        services, account = self._services, facts.account
        trace, traceparent, tracestate = None, "", ""
        if services.traces is not None:
            trace = self._trace(services.traces)
            traceparent, tracestate = services.traces.for_engine(trace, self._incoming.header)
        background = self._path == RESPONSES_PATH and bool(head.background)
        salt = account.name if services.limits.private_prefix_cache else ""
        inflight = InFlightRequest(
            ClientRequest(
                self._path,
                self.request_id,
                body,
                audio_tokens(body)
                if self.endpoint.model_in is ModelIn.FORM
                else estimated_tokens(body),
                self._most_tokens or 0,
                schema.prefix_hash(
                    salt + (ref.digest if ref is not None else ""), body, self.endpoint
                ),
                bool(head.stream) and self.endpoint.streams,
                self._created or int(time.time()),
                services.limits.resume and facts.may_move,
                sequences(head),
                self.deadline.after_s,
                self._incoming.method,
                facts.content_type,
                self._answer_id() if self._path == RESPONSES_PATH else "",
                traceparent,
                self._key,
                services.limits.keep_answers_s if self._key is not None else 0.0,
                tracestate,
                background,
            ),
            RequestedModel(
                target.base,
                ref,
                target.stored,
                self.model if target.alias or target.by_digest else "",
                target.elsewhere,
                self._kept_by,
                self._keeper or target.first_on,
            ),
            self.stream,
            Requester(
                account.name,
                facts.session,
                account.clamped(head.priority or 0) if facts.priority is None else facts.priority,
                account.weight,
                salt,
                facts.in_batch,
            ),
        )
        inflight.trace = trace
        return inflight

    def _trace(self, traces: Traces) -> RequestTrace | None:
        arrived = self.deadline.at - self.deadline.after_s
        return traces.begin(self._incoming.header, arrived, self._body)

    def _answer_id(self) -> str:
        """Made here, so that it stays when another worker goes on."""
        return stored_id(self.account.name, secrets.token_hex(SECRET_BYTES))

    def _on_finish(self) -> None:
        # The dispatcher is still closing its books on this request, and the next request of the
        # connection may be waiting.
        self._services.loop.call_soon(self._on_answer_end)

    def _on_answer_end(self) -> None:
        if self._gone:
            return
        self._leave()
        adapter = self.inflight.model.adapter
        if adapter is not None:
            self._note_usage(adapter)
        if self.stream.error is None or not self._outdated:
            self._close()
        elif self._looks < MAX_LOOKS:
            self._looks += 1
            self._retry = self._services.loop.create_task(self._attempt_again(), name="look again")
        else:  # the adapter exists, but each time the worker that had it was lost
            self.stream.error = WorkerUnavailable(
                "The workers that have this adapter could not take the request.", retry_after_s=1.0
            )
            self._close()

    @property
    def _outdated(self) -> bool:
        """Whether no worker could get the resolved version, and the client has seen nothing yet."""
        return (
            isinstance(self.stream.error, AdapterNotFound)
            and self.target.adapter is not None
            and not self.stream.answered
        )

    async def _attempt_again(self) -> None:
        under_way = False
        try:
            target = await self.in_time(self._services.resolver.again(self.target))
            self.stream.again()
            self._submit(target)
            under_way = True
        except LoraplexError as exc:
            self.stream.error = exc
        finally:
            if not under_way and not self._gone:
                self._close()

    def _close(self) -> None:
        """The end: nothing is tried any more."""
        self._services.resolver.ended(self.target, self.stream.status, self.stream.error)
        self._log()
        done, self._done = self._done, bool
        done()

    def _leave(self) -> None:
        self._services.deadlines.leave(self)
        if not self.inflight.lifecycle.over:  # the client has left, or its end was broken off
            self._services.dispatcher.cancel(self.inflight)

    def _note_usage(self, adapter: AdapterRef) -> None:
        error = self.stream.error
        if error is None:
            self._services.usage.worked(adapter)
        else:
            self._services.usage.failed(adapter, error)

    def too_late(self) -> None:
        """See Expiring."""
        phase = self.inflight.lifecycle.phase.value
        self._services.dispatcher.give_up(self.inflight, self.deadline.exceeded(phase))

    def _deadline(self) -> RequestDeadline:
        """The deadline of the whole request: the client's own, but never later than the
        server's.
        """
        after_s = self._services.limits.request_timeout_s
        if self._facts.timeout_s is not None:
            after_s = min(after_s, self._facts.timeout_s)
        return RequestDeadline(self._services.loop.time() + after_s, after_s)

    def _head_lines(self) -> bytes:
        lines = head_lines(self.inflight, self._services.dispatcher.policy)
        if self._keeper:
            lines += b"idempotent-replayed: true\r\n"
        return lines + self._limit_lines

    def _log(self) -> None:
        self._body = b""  # it may be large, and the line may wait for the worker's count
        self._charge.once_settled(self._write_line)

    def _write_line(self) -> None:
        self._services.deadlines.leave(self)
        access = self._services.access
        if access.enabled:
            stream = self.stream
            access.write(access_record(self.inflight, self.model, stream.status, stream.error))


def _endpoint(path: str) -> Endpoint:
    found = endpoint_of(path)
    if found is None:
        raise RouteNotFound(f"There is no {path[:200]} here.")
    return found
