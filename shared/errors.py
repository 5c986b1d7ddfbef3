"""Pure. One tree of errors.

`code` goes to clients and logs, and `status` is the HTTP status of the answer. `retryable` says
whether another worker or a later moment may succeed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class LoraplexError(Exception):
    """Root of every error that Loraplex raises on purpose.

    `message` is written for the person who gets it, without paths and credentials. `param` names
    the request field or the config key at fault. `retry_after_s` is set if waiting helps.
    `request_id` is set once the failed request has one. `headers` go into the answer. `limit` names
    the limit of its account that a request has hit.
    """

    code: str = "internal_error"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.request_id = ""
        self.headers: Mapping[str, str] = {}
        self.limit = ""


class InternalError(LoraplexError):
    """A bug: our code raised an unexpected exception. Only this request ends with it."""


class ConfigError(LoraplexError):
    """The configuration cannot work. The message says what is wrong, where (file, line) and what to
    do.
    """

    code = "invalid_config"


class InvalidRequest(LoraplexError):
    """The request is malformed; `param` names the field."""

    code = "invalid_request"
    status = 400


class BodyTooLarge(LoraplexError):
    code = "body_too_large"
    status = 413


class HeadersTooLarge(LoraplexError):
    """The line and the headers of a request are longer than anybody needs."""

    code = "headers_too_large"
    status = 431


class BodyTimeout(LoraplexError):
    """The client was too slow to send its request."""

    code = "body_timeout"
    status = 408


class UnsupportedEncoding(LoraplexError):
    """The body is compressed, or is of a type that nothing here reads."""

    code = "unsupported_encoding"
    status = 415


class InvalidApiKey(LoraplexError):
    code = "invalid_api_key"
    status = 401


class Forbidden(LoraplexError):
    """This client may not do it, or nobody may with the gateway's configuration."""

    code = "forbidden"
    status = 403


class RouteNotFound(LoraplexError):
    code = "not_found"
    status = 404


class MethodNotAllowed(LoraplexError):
    code = "method_not_allowed"
    status = 405


class ResponseNotFound(LoraplexError):
    """No answer is kept under this id, or it belongs to another account."""

    code = "response_not_found"
    status = 404


class FileNotFound(LoraplexError):
    """There is no such file of requests, or it belongs to another key. Both have the same words."""

    code = "file_not_found"
    status = 404


class BatchNotFound(LoraplexError):
    """There is no such batch, or it belongs to another key. Both have the same words."""

    code = "batch_not_found"
    status = 404


class RequestNotFound(LoraplexError):
    """No request with this id is remembered."""

    code = "request_not_found"
    status = 404


class ModelNotFound(LoraplexError):
    """No base model has this id."""

    code = "model_not_found"
    status = 404


class AdapterNotFound(LoraplexError):
    """The base model exists, but the adapter does not (in no store of the model)."""

    code = "adapter_not_found"
    status = 404


class InvalidAdapter(LoraplexError):
    """The adapter exists but cannot be served: wrong format, rank, shapes or base model. `reason`
    is one word that makes the code specific.
    """

    code = "invalid_adapter"
    status = 422

    def __init__(
        self,
        message: str,
        reason: str = "",
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, param=param, retry_after_s=retry_after_s)
        self.reason = reason
        if reason:
            self.code = f"{InvalidAdapter.code}_{reason}"


class TooManyPins(LoraplexError):
    """Every slot is pinned, except the one that must stay for other adapters."""

    code = "too_many_pins"
    status = 409


class StoreUnavailable(LoraplexError):
    """The adapter store did not answer, refused us, or cut the transfer. What is cached can still
    be served.
    """

    code = "store_unavailable"
    status = 503
    retryable = True


class Overloaded(LoraplexError):
    """A queue is full, or no worker may take this request before its deadline."""

    code = "overloaded"
    status = 503
    retryable = True


class RateLimited(Overloaded):
    """Like Overloaded, if the config wants a full queue to count as the client's limit (429) and
    not as the server's trouble (503).
    """

    code = "rate_limit_exceeded"
    status = 429


class TooManyPages(Overloaded):
    """So many pages at /ui are open already. That says nothing of the load by clients."""

    code = "too_many_pages"


class DeadlineExceeded(LoraplexError):
    """The request took longer than the client allowed (`x-loraplex-timeout-ms`), or than the server
    allows any request.

    The status is 504, which proxies use for what is behind them. Ray Serve answers 408, which means
    that the client was slow to send.
    """

    code = "deadline_exceeded"
    status = 504
    retryable = True


class NotDoneInTime(LoraplexError):
    """The worker has not answered yet. It goes on with what it was asked for."""

    code = "not_done_in_time"
    status = 504
    retryable = True


class WorkerUnavailable(LoraplexError):
    """The worker is draining, gone, or was lost before it answered."""

    code = "worker_unavailable"
    status = 503
    retryable = True


REUSED_KEY = "This Idempotency-Key was used for another request; send a new key with a new request."


class IdempotencyKeyReused(LoraplexError):
    """The client has used its `Idempotency-Key` for another request. 422 is what
    draft-ietf-httpapi-idempotency-key-header says.
    """

    code = "idempotency_key_reused"
    status = 422


class IdempotencyKeyInUse(LoraplexError):
    """The first request with this `Idempotency-Key` still waits for a worker: there is no answer to
    join yet.
    """

    code = "idempotency_key_in_use"
    status = 409


class ModelUnavailable(LoraplexError):
    """No worker of the model serves, and each one that tried to start has failed. Waiting would not
    help soon.
    """

    code = "model_unavailable"
    status = 503


class EngineFailure(LoraplexError):
    """The engine died or failed on this request."""

    code = "engine_error"


class OnTrial(WorkerUnavailable):
    """The worker has another request that may kill workers. If both were there and it died, nobody
    could tell of which.
    """

    code = "on_trial"


class WorkersDied(EngineFailure):
    """Workers died of the request, or of the same one a while ago, so no other one gets it. Clients
    of OpenAI's kind are told not to ask again by themselves.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.headers = {"x-should-retry": "false"}


class CannotContinue(LoraplexError):
    """An answer that began on another worker cannot go on on this one as it would have gone on
    there.
    """

    code = "cannot_continue"


class AnswerIncomplete(LoraplexError):
    """The engine ended an answer in its middle. The engine itself goes on."""

    code = "answer_incomplete"


class LinkError(LoraplexError):
    """The ZeroMQ link cannot be opened as configured."""

    code = "link_error"


def _descendants(cls: type[LoraplexError]) -> list[type[LoraplexError]]:
    return [c for child in cls.__subclasses__() for c in (child, *_descendants(child))]


# workers never send these
_OWN_PROCESS = (ConfigError, LinkError, InternalError, WorkersDied)
_BY_CODE = {c.code: c for c in _descendants(LoraplexError) if c not in _OWN_PROCESS}


UNFINISHED = frozenset({"missing_file", "header", "incomplete"})
"""Reasons of InvalidAdapter that an unfinished upload has. They disappear when the upload is
complete.
"""
UNFINISHED_RETRY_AFTER_S = 2.0


def from_refusal(code: str, message: str) -> LoraplexError:
    """The error that a worker named by its code."""
    general, _, reason = code.partition(f"{InvalidAdapter.code}_")
    if reason and not general:
        wait_s = UNFINISHED_RETRY_AFTER_S if reason in UNFINISHED else None
        return InvalidAdapter(message, reason, retry_after_s=wait_s)
    return _BY_CODE.get(code, EngineFailure)(message)
