"""Pure. The few request fields that the gateway reads, the OpenAI shapes that it writes itself, and the one table from errors to HTTP statuses."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from gateway.routing.policy import Candidate
from shared import errors
from shared.adapters.identity import check_name

GENERATE_PATHS = ("/v1/chat/completions", "/v1/completions")
"""Paths that are forwarded to a worker as they are."""

OWNER = "loraplex"
SORTED_AT_ONCE = 4096
_HOLE = "*name*"  # neither a base id after its colon nor an adapter's name may hold it


class RequestHead(msgspec.Struct, frozen=True):
    """What routing needs of a request body; everything else is passed on unread."""

    model: str
    stream: bool | None = False
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    priority: int | None = None
    user: msgspec.Raw = msgspec.Raw(b"")
    """As it came, unread: only its being the same counts."""


_decode_head = msgspec.json.Decoder(RequestHead).decode
_encode = msgspec.json.Encoder().encode

STATUS: dict[type[errors.LoraplexError], int] = {
    errors.InvalidRequest: 400,
    errors.InvalidApiKey: 401,
    errors.Forbidden: 403,
    errors.RouteNotFound: 404,
    errors.ModelNotFound: 404,
    errors.AdapterNotFound: 404,
    errors.TooManyPins: 409,
    errors.BodyTooLarge: 413,
    errors.InvalidAdapter: 422,
    errors.RateLimited: 429,
    errors.Overloaded: 503,
    errors.WorkerUnavailable: 503,
    errors.StoreUnavailable: 503,
    errors.DeadlineExceeded: 504,
    errors.NotDoneInTime: 504,
    errors.EngineFailure: 500,
}
_TYPE = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "invalid_request_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
}
_BY_CODE = {cls.code: cls for cls in STATUS}
RETRY_AFTER_S = 1.0
"""Where an error says nothing better; long enough not to hammer, short enough for a queue to have moved."""


def parse_head(body: bytes) -> RequestHead:
    """Raises InvalidRequest, with `param` where a field is at fault."""
    try:
        return _decode_head(body)
    except msgspec.ValidationError as exc:
        field = str(exc).rpartition("`$.")[2].rstrip("`") if "`$." in str(exc) else None
        if "missing required field `model`" in str(exc):
            field = "model"
        raise errors.InvalidRequest(str(exc), param=field) from exc
    except msgspec.MsgspecError as exc:
        raise errors.InvalidRequest(f"The request body is not valid JSON: {exc}", param=None) from exc
    except RecursionError as exc:
        raise errors.InvalidRequest("The request body is nested too deeply.") from exc
    except UnicodeDecodeError as exc:
        raise errors.InvalidRequest("The request body is not valid UTF-8.", param=None) from exc


def split_model(model: str, bases: Iterable[str]) -> tuple[str, str | None]:
    """(base, adapter name or None) of a model name `base` or `base:adapter`. Base ids may hold `/` but never `:`.

    Raises:
        ModelNotFound: no such base. AdapterNotFound: the adapter's name breaks the grammar.
    """
    base, colon, adapter = model.partition(":")
    known = list(bases)
    if base not in known:
        shown = ", ".join(f"`{b}`" for b in known[:5])
        raise errors.ModelNotFound(f"The model `{base[:200]}` does not exist. Base models here: {shown}.", param="model")
    if not colon:
        return base, None
    check_name(adapter)
    return base, adapter


def split_version(model: str, bases: Iterable[str]) -> tuple[str, str | None, str]:
    """As `split_model`, and what stands behind the `@` of `base:adapter@digest` ("": nothing)."""
    base, colon, adapter = model.partition(":")
    name, at, digest = adapter.partition("@")
    if at and not digest:
        raise errors.AdapterNotFound("Behind the @ of an adapter's name goes a digest, or at least its first 8 characters.", param="model")
    return *split_model(f"{base}{colon}{name}", bases), digest


def status_of(error: errors.LoraplexError) -> int:
    return next((STATUS[cls] for cls in type(error).__mro__ if cls in STATUS), 500)


def error_body(error: errors.LoraplexError) -> bytes:
    """OpenAI's error shape: `{"error": {"message", "type", "param", "code"}}`."""
    kind = _TYPE.get(status_of(error), "server_error")
    return _encode({"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}})


def error_event(error: errors.LoraplexError) -> bytes:
    """The same as the last events of a stream whose status has been sent; clients raise on it."""
    return b"data: " + error_body(error) + b"\n\ndata: [DONE]\n\n"


def answer_event(body: bytes) -> bytes:
    """A whole JSON answer (the engine's error, as a rule) as the last events of a stream. JSON's line ends stand between tokens only."""
    return b"data: " + body.replace(b"\r", b"").replace(b"\n", b"") + b"\n\ndata: [DONE]\n\n"


def from_refusal(code: str, message: str) -> errors.LoraplexError:
    """The error that a worker named by its code."""
    general, _, reason = code.partition(f"{errors.InvalidAdapter.code}_")
    if reason and not general:
        return errors.InvalidAdapter(message, reason)
    return _BY_CODE.get(code, errors.EngineFailure)(message)


PREFIX_BYTES = 512
"""Of the prompt, for prefix affinity: a system prompt's first hundred tokens tell conversations with different ones apart."""


def prefix_hash(digest: str, body: bytes) -> int:
    """Of the adapter's digest and the first bytes after the body's first prompt or message; 0 if there is none."""
    starts = [at for mark in (b'"messages"', b'"prompt"') if (at := body.find(mark)) >= 0]
    return hash((digest, body[min(starts) : min(starts) + PREFIX_BYTES])) or 1 if starts else 0


def candidate(found: Candidate) -> dict[str, object]:
    """One worker of an explanation."""
    t = found.terms
    terms = {"queue": t.queue_s, "slot": t.slot_s, "load": t.load_s, "stall": t.stall_s, "evict": t.evict_s, "prefix": -t.prefix_s}
    return {
        "worker": found.worker.id,
        "eligible": found.eligible,
        "note": found.note,
        "tier": found.tier.name.lower(),
        "load": found.worker.load,
        "open_slots": found.worker.open_slots,
        "cost_ms": round(t.total_s * 1e3, 2),
        "terms_ms": {name: round(s * 1e3, 2) for name, s in terms.items()},
    }


def model_card(model_id: str, created: int, parent: str | None = None, root: str | None = None, digest: str = "") -> dict[str, object]:
    """OpenAI's model object, with vLLM's `root` and `parent`; `loraplex_digest` is the version that answers."""
    card: dict[str, object] = {
        "id": model_id,
        "object": "model",
        "created": created,
        "owned_by": OWNER,
        "root": root or model_id,
        "parent": parent,
    }
    return card | {"loraplex_digest": digest} if digest else card


def model_list(adapters: Mapping[str, Mapping[str, str]], created: int) -> bytes:
    """Every base model and its adapters, name -> digest of the version that answers ("" for an alias).

    What repeats in each adapter's card is encoded once: names and digests have no character that JSON escapes.
    """
    cards = []
    for base, digests in adapters.items():
        cards.append(_encode(model_card(base, created)).decode())
        hole = _encode(model_card(f"{base}:{_HOLE}", created, parent=base, root=_HOLE)).decode()
        before, between, after = hole.split(_HOLE)
        for name in _sorted([*digests]):
            digest = digests[name]
            ending = f'{after[:-1]},"loraplex_digest":"{digest}"}}' if digest else after
            cards.append(f"{before}{name}{between}{name}{ending}")
    return ('{"object":"list","data":[' + ",".join(cards) + "]}").encode()


def _sorted(names: Sequence[str]) -> Iterable[str]:
    """In runs: one call that sorts a hundred thousand names would keep the interpreter from every other thread for 50 ms."""
    return heapq.merge(*(sorted(names[at : at + SORTED_AT_ONCE]) for at in range(0, len(names), SORTED_AT_ONCE)))


def to_json(value: object) -> bytes:
    return _encode(value)
