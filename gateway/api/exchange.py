"""Shell. One request for tokens under way, from its head to its last byte: submit, wait, try once
more if the version has changed meanwhile, and write the account of it.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from gateway.accounts.account import Account
from gateway.accounts.keys import Keys
from gateway.adapters.resolver import Resolver, Target
from gateway.adapters.usage import AdapterUsage
from gateway.api import schema
from gateway.api.accounting import Accounting
from gateway.api.allowance import allowed_body
from gateway.api.kept import KeptAnswer, find_kept
from gateway.api.report import access_record, head_lines
from gateway.dispatch.dispatcher import Dispatcher
from gateway.dispatch.request import (
    ClientRequest,
    InFlightRequest,
    RequestedModel,
    Requester,
    audio_tokens,
    estimated_tokens,
)
from gateway.http.headers import (
    MAX_SESSION,
    RESUME_HEADER,
    TIMEOUT_HEADER,
    TIMEOUT_MS,
    IncomingRequest,
    RequestDeadline,
    request_id_of,
)
from gateway.http.response import ResponseWriter
from gateway.telemetry.access_log import AccessLog
from gateway.telemetry.prometheus import Metrics
from shared.endpoints import Endpoint, ErrorFamily, ModelIn, can_do, cannot_do, endpoint_of
from shared.errors import AdapterNotFound, InvalidRequest, LoraplexError, RouteNotFound
from shared.link.messages import owner_tag

_PRIORITY = re.compile(r"-?[0-9]{1,9}\Z")


@dataclass(frozen=True, slots=True)
class RequestLimits:
    max_body_bytes: int
    slow_reader_bytes: int
    request_timeout_s: float
    resume: bool = False
    bounds: schema.Bounds = schema.DEFAULT_BOUNDS
    max_unfinished_body_bytes: int = 256 << 20


@dataclass(frozen=True, slots=True)
class GenerationServices:
    """What requests for tokens need of the rest of this gateway process."""

    dispatcher: Dispatcher
    resolver: Resolver
    metrics: Metrics
    keys: Keys
    accounting: Accounting
    limits: RequestLimits
    access: AccessLog
    usage: AdapterUsage
    loop: asyncio.AbstractEventLoop


class Exchange:
    """What was asked, what answers, and where the answer goes. `fields` are those of a body that
    has been parsed already.

    Raises InvalidRequest for a body or a header that cannot be.
    """

    __slots__ = (
        "_asked",
        "_body",
        "_content_type",
        "_done",
        "_gone",
        "_kept",
        "_late",
        "_limit_lines",
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
        account: Account,
        asked: IncomingRequest,
        body: bytes,
        stream: ResponseWriter,
        kept: KeptAnswer | None = None,
        fields: schema.BodyFields | None = None,
    ) -> None:
        self._services, self._asked, self.stream = services, asked, stream
        self.account, self.endpoint = account, _endpoint(asked.path)
        self._content_type = asked.header("content-type") or schema.JSON_TYPE
        if kept is None:
            self.head = fields or schema.read_fields(
                self.endpoint, self._content_type, body, services.limits.bounds
            )
            self.model = self.head.model or services.resolver.default()
            previous = self.head.previous_response_id
            if previous and self.endpoint.errors is ErrorFamily.RESPONSES:
                kept = find_kept(services.dispatcher.fleet, account, previous)
        else:
            self.head, self.model = schema.BodyFields(stream=kept.streams), kept.base
        self._kept = kept
        self._path = asked.path if kept is None or not kept.path else kept.path
        services.resolver.check_scope(account, self.model)
        self._body = allowed_body(account, self.head, body, self.endpoint.limit_field)
        self.request_id = request_id_of(asked)
        self.deadline = self._deadline()
        self.target: Target
        self.inflight: InFlightRequest
        self._done: Callable[[], object] = bool  # nobody is told
        self._late: asyncio.TimerHandle | None = None
        self._retry: asyncio.Task[None] | None = None
        self._gone = False
        self._limit_lines = b""

    def attempt(self, target: Target, done: Callable[[], object]) -> None:
        """Has `target` answer the request. `done` is called once the answer has ended, in a later
        turn of the loop; it is not called after `cancel`.

        The version may have become outdated between the listing and the worker's fetch. Then the
        one that answers now is tried, once, before `done`.

        Raises Overloaded, RateLimited or WorkerUnavailable, and then it is over.
        """
        self._done = done
        try:
            self._submit(target)
        except LoraplexError as exc:
            self._services.resolver.ended(target, 0, exc)
            self._let_go()
            raise

    def cancel(self) -> None:
        """The client has left."""
        self._gone = True
        if self._retry is not None:
            self._retry.cancel()
        self._leave()
        self._log()
        self._let_go()

    def end_with_error(self) -> None:
        """For a client that has seen the status already; one that has not can still get another."""
        stream = self.stream
        assert stream.error is not None
        self._services.metrics.error(stream.error.code)
        if not stream.answered:
            stream.end_with(stream.error)

    async def in_time(self, asked: Awaitable[Target]) -> Target:
        """Raises DeadlineExceeded."""
        try:
            async with asyncio.timeout_at(self.deadline.at):
                return await asked
        except TimeoutError as exc:
            raise self.deadline.exceeded("looked up") from exc

    # ---- inside ----------------------------------------------------------------------------------

    def _submit(self, target: Target) -> None:
        services, ref = self._services, target.adapter
        self.target = target
        self._check_task(target)
        inflight = self._inflight(target)
        bill = services.accounting.admit(self.account, inflight)
        self.inflight = inflight
        self._limit_lines = bill.header_lines
        services.resolver.use(target)
        self.stream.on_finish = self._on_finish
        self.stream.describe(self._head_lines)
        if ref is not None:
            services.usage.used(ref, time.time())
        try:
            services.dispatcher.submit(inflight)
        except LoraplexError:
            bill.refuse()
            raise
        self._late = services.loop.call_at(self.deadline.at, self._too_late)

    def _check_task(self, target: Target) -> None:
        """Raises InvalidRequest if the model is known not to do what is asked."""
        for worker in self._services.dispatcher.fleet.routable(target.base)[:1]:
            tasks = worker.beat.tasks
            if tasks and not can_do(self.endpoint, tasks):
                raise InvalidRequest(cannot_do(self.model, self.endpoint, tasks), param="model")

    def _inflight(self, target: Target) -> InFlightRequest:
        asked, head, body, ref = self._asked, self.head, self._body, target.adapter
        header = asked.header
        return InFlightRequest(
            ClientRequest(
                self._path,
                self.request_id,
                body,
                audio_tokens(body)
                if self.endpoint.model_in is ModelIn.FORM
                else estimated_tokens(body),
                max(0, head.limit or 0),
                schema.prefix_hash(ref.digest if ref is not None else "", body),
                bool(head.stream) and self.endpoint.streams,
                int(time.time()),
                self._services.limits.resume and header(RESUME_HEADER) != "off",
                schema.sequences(head),
                self.deadline.after_s,
                asked.method,
                self._content_type,
                self._owner(),
            ),
            RequestedModel(
                target.base,
                ref,
                target.stored,
                self.model if target.alias or target.by_digest else "",
                target.elsewhere,
                self._kept.worker if self._kept is not None else "",
            ),
            self.stream,
            Requester(
                self.account.name,
                (header("x-session-id") or "")[:MAX_SESSION],
                self.account.clamped(_priority(header("x-loraplex-priority"), head)),
                self.account.weight,
            ),
        )

    def _owner(self) -> str:
        """For the ids of answers that are kept; "" where none is."""
        kept = self.endpoint.errors is ErrorFamily.RESPONSES
        return owner_tag(self.account.name) if kept else ""

    def _on_finish(self) -> None:
        # The dispatcher is still closing its books on this request, and the next request of the
        # connection may be waiting.
        self._services.loop.call_soon(self._on_answer_end)

    def _on_answer_end(self) -> None:
        if self._gone:
            return
        self._leave()
        self._note_usage()
        if self._retry is None and self._outdated:
            self._retry = self._services.loop.create_task(self._attempt_again(), name="look again")
        else:
            self._close()

    @property
    def _outdated(self) -> bool:
        """No worker could get the version that was resolved, and the client has seen nothing
        yet.
        """
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
        """All that there was to try has been tried."""
        self._services.resolver.ended(self.target, self.stream.status, self.stream.error)
        self._log()
        done = self._done
        self._let_go()
        done()

    def _let_go(self) -> None:
        """See ResponseWriter.let_go."""
        self._done = bool
        self.stream.let_go()

    def _leave(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
        self._services.dispatcher.cancel(self.inflight)

    def _note_usage(self) -> None:
        usage, ref, error = self._services.usage, self.inflight.model.adapter, self.stream.error
        if ref is not None and error is not None:
            usage.failed(ref, error)
        elif ref is not None:
            usage.worked(ref)

    def _too_late(self) -> None:
        phase = self.inflight.life.phase.value
        self._services.dispatcher.give_up(self.inflight, self.deadline.exceeded(phase))

    def _deadline(self) -> RequestDeadline:
        """Of the whole request: the client's own, but never beyond the server's."""
        after_s = self._services.limits.request_timeout_s
        given = self._asked.header(TIMEOUT_HEADER)
        if given is not None:
            if not TIMEOUT_MS.match(given):
                raise InvalidRequest(
                    f"The header {TIMEOUT_HEADER} must be a whole number of "
                    "milliseconds, at least 1.",
                    param=TIMEOUT_HEADER,
                )
            after_s = min(after_s, int(given) / 1e3)
        return RequestDeadline(self._services.loop.time() + after_s, after_s)

    def _head_lines(self) -> bytes:
        lines = head_lines(self.inflight, self._services.dispatcher.policy)
        return lines + self._limit_lines

    def _log(self) -> None:
        access = self._services.access
        if access.enabled:
            stream = self.stream
            access.write(access_record(self.inflight, self.model, stream.status, stream.error))


def _endpoint(path: str) -> Endpoint:
    found = endpoint_of(path)
    if found is None:
        raise RouteNotFound(f"There is no {path[:200]} here.")
    return found


def _priority(given: str | None, head: schema.BodyFields) -> int:
    """The header's, else the body's; lower goes first. Raises InvalidRequest."""
    if given is None:
        return head.priority or 0
    if not _PRIORITY.match(given):
        raise InvalidRequest(
            "The header x-loraplex-priority must be a whole number; lower goes first.",
            param="x-loraplex-priority",
        )
    return int(given)
