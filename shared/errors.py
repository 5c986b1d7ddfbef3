"""Pure. One tree of errors.

`code` goes to clients and logs, `status` is the HTTP status of the answer, `retryable` says whether
another worker or a later moment may succeed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class LoraplexError(Exception):
    """Root of every error that Loraplex raises on purpose.

    `message` is written for the person who gets it (no paths, no credentials); `param` names the
    request field or the config key at fault; `retry_after_s` is set where waiting helps;
    `request_id` once the request that failed has one. `headers` go into the answer.
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


class InternalError(LoraplexError):
    """Code of ours raised what it should not have; this request ends with it, and no other one."""


class ConfigError(LoraplexError):
    """The configuration cannot work. The message says what, where (file, line) and what to do."""

    code = "invalid_config"


class InvalidRequest(LoraplexError):
    """The request is malformed; `param` names the field."""

    code = "invalid_request"
    status = 400


class BodyTooLarge(LoraplexError):
    code = "body_too_large"
    status = 413


class BodyTimeout(LoraplexError):
    """The client was too slow to send its request."""

    code = "body_timeout"
    status = 408


class UnsupportedEncoding(LoraplexError):
    """A body that is compressed, or of a type, as nothing here reads it."""

    code = "unsupported_encoding"
    status = 415


class InvalidApiKey(LoraplexError):
    code = "invalid_api_key"
    status = 401


class Forbidden(LoraplexError):
    """Whoever it is may not do this, or nobody may as the gateway is configured."""

    code = "forbidden"
    status = 403


class RouteNotFound(LoraplexError):
    code = "not_found"
    status = 404


class MethodNotAllowed(LoraplexError):
    code = "method_not_allowed"
    status = 405


class ResponseNotFound(LoraplexError):
    """No answer is kept under this id, or it is another account's."""

    code = "response_not_found"
    status = 404


class RequestNotFound(LoraplexError):
    """No request of this id is remembered."""

    code = "request_not_found"
    status = 404


class ModelNotFound(LoraplexError):
    """No base model has this id."""

    code = "model_not_found"
    status = 404


class AdapterNotFound(LoraplexError):
    """The base model exists, the adapter does not (in any store known to it)."""

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
    """Every slot but the one that must stay for other adapters is pinned."""

    code = "too_many_pins"
    status = 409


class StoreUnavailable(LoraplexError):
    """The adapter store did not answer, refused us, or cut the transfer; what is cached keeps
    working.
    """

    code = "store_unavailable"
    status = 503
    retryable = True


class Overloaded(LoraplexError):
    """A queue is full, or no worker may take this request within its deadline."""

    code = "overloaded"
    status = 503
    retryable = True


class RateLimited(Overloaded):
    """The same, where the config wants a full queue to be the client's limit (429), not the
    server's trouble (503).
    """

    code = "rate_limit_exceeded"
    status = 429


class DeadlineExceeded(LoraplexError):
    """The request's own time is over: what the client asked for (`x-loraplex-timeout-ms`), or the
    server's bound for any request.

    504, as proxies answer for what is behind them; 408, which Ray Serve gives, means a client that
    was slow to send.
    """

    code = "deadline_exceeded"
    status = 504
    retryable = True


class NotDoneInTime(LoraplexError):
    """The worker has not answered yet; what it was asked for goes on."""

    code = "not_done_in_time"
    status = 504
    retryable = True


class WorkerUnavailable(LoraplexError):
    """The worker is draining, gone, or was lost before it answered."""

    code = "worker_unavailable"
    status = 503
    retryable = True


class ModelUnavailable(LoraplexError):
    """No worker of the model serves, and each one that tried to start has failed: waiting would not
    help soon.
    """

    code = "model_unavailable"
    status = 503


class EngineFailure(LoraplexError):
    """The engine died or failed on this request."""

    code = "engine_error"


class CannotContinue(LoraplexError):
    """An answer that has begun cannot go on at this worker as it went on at the one before."""

    code = "cannot_continue"


class AnswerIncomplete(LoraplexError):
    """The engine ended an answer in its middle; the engine itself goes on."""

    code = "answer_incomplete"


class LinkError(LoraplexError):
    """The ZeroMQ link cannot be opened as configured."""

    code = "link_error"


def _descendants(cls: type[LoraplexError]) -> list[type[LoraplexError]]:
    return [c for child in cls.__subclasses__() for c in (child, *_descendants(child))]


_OWN_PROCESS = (ConfigError, LinkError, InternalError)  # no worker sends their codes
_BY_CODE = {c.code: c for c in _descendants(LoraplexError) if c not in _OWN_PROCESS}


UNFINISHED = frozenset({"missing_file", "header", "incomplete"})
"""Reasons of InvalidAdapter that an upload in progress has, and that its end cures."""
UNFINISHED_RETRY_AFTER_S = 2.0


def from_refusal(code: str, message: str) -> LoraplexError:
    """The error that a worker named by its code."""
    general, _, reason = code.partition(f"{InvalidAdapter.code}_")
    if reason and not general:
        wait_s = UNFINISHED_RETRY_AFTER_S if reason in UNFINISHED else None
        return InvalidAdapter(message, reason, retry_after_s=wait_s)
    return _BY_CODE.get(code, EngineFailure)(message)
