"""Shell. Answers a request that came from a file and not from a connection. It goes the way of all
other requests, and its answer is collected.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gateway.accounts.account import LOWEST_PRIORITY, Account
from gateway.api.exchange import Exchange
from gateway.api.generate import read_aside, user_of
from gateway.api.head_facts import HeadFacts
from gateway.api.services import GenerationServices
from gateway.api.stored_responses import ResponseFinder
from gateway.http.headers import request_id_of
from gateway.http.response import ResponseWriter
from shared.api_endpoints import ErrorFamily, errors_of
from shared.error_bodies import error_body
from shared.errors import DeadlineExceeded, InternalError, InvalidRequest, LoraplexError

MAX_ANSWER_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class LineAnswer:
    """The status and the JSON body of an answer. `error` is the gateway's own. `final`: it would be
    the same if the line were asked again.
    """

    status: int
    body: bytes
    error: LoraplexError | None = None
    final: bool = False


class LineRequest:
    """One line of a file, in place of a request that a parser has read."""

    def __init__(self, path: str, headers: Mapping[str, str]) -> None:
        self.path, self.method = path, "POST"
        self.header: Callable[[str], str | None] = headers.get


class CollectingTransport(asyncio.WriteTransport):
    """A transport that keeps what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self._closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def writelines(self, list_of_data: object) -> None:
        for data in list_of_data:  # type: ignore[attr-defined]
            self.write(data)

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self._closed

    def close(self) -> None:
        self._closed = True

    def abort(self) -> None:
        self._closed = True


async def answer_line(
    services: GenerationServices, account: Account, incoming: LineRequest, body: bytes
) -> LineAnswer:
    """The request waits behind all others. It is cancelled with the task that waits for it."""
    family = errors_of(incoming.path)
    transport = CollectingTransport()
    stream = ResponseWriter(transport, MAX_ANSWER_BYTES, chunked=False, errors=family)
    exchange: Exchange | None = None
    try:
        fields = await read_aside(services, incoming, body)
        facts = HeadFacts(account, incoming)
        facts.in_batch = True
        facts.priority = LOWEST_PRIORITY  # also beyond the account's range
        exchange = Exchange(services, facts, incoming, body, stream, fields=fields)
        if exchange.previous:
            dispatcher = services.dispatcher
            finder = ResponseFinder(dispatcher.answers, dispatcher.may_move)
            stored = finder.find(account, exchange.previous)
            exchange.goes_on_from(await exchange.in_time(stored))
        target = services.resolver.at_once(exchange.model)
        if target is None:
            resolver = services.resolver
            target = await exchange.in_time(
                resolver.resolve(exchange.model, lambda: user_of(exchange, incoming))
            )
        ended = asyncio.Event()
        exchange.attempt(target, ended.set)
        try:
            await ended.wait()
        except asyncio.CancelledError:
            exchange.cancel()
            raise
        if stream.error is not None:
            raise stream.error
    except LoraplexError as exc:
        exc.request_id = exc.request_id or request_id_of(incoming)
        late = isinstance(exc, DeadlineExceeded)
        final = late and exchange is not None and exchange.took_too_long
        return LineAnswer(exc.status, error_body(exc, family), exc, final)
    return collected(bytes(transport.written), family)


def collected(written: bytes, family: ErrorFamily) -> LineAnswer:
    """The same of the bytes of a whole answer. What is no JSON cannot stand in a line of it."""
    head, blank, body = written.partition(b"\r\n\r\n")
    error: LoraplexError | None = None
    if not blank:
        error = InternalError("The answer did not come to its end.")
    elif b"\r\ncontent-type: application/json" not in head.lower():
        error = InvalidRequest(
            "Answers that are no JSON have no place in a batch; leave `encoding_format` out or ask "
            "for another.",
            param="encoding_format",
        )
    if error is not None:
        return LineAnswer(error.status, error_body(error, family), error)
    return LineAnswer(int(head.split(b" ", 2)[1]), body)
