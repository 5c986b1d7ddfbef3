"""Pure. The records of stored files, batches and their lines: what is kept of them, what a client
is shown, and which requests a file holds.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import msgspec

from gateway.api.body.scan import check_large_body
from gateway.api.body.schema import parse_body_fields
from gateway.http.parser import MAX_ON_LOOP_BYTES
from shared.api_endpoints import ENDPOINTS, ModelIn
from shared.errors import InvalidRequest

BATCHED = tuple(path for path, e in ENDPOINTS.items() if e.model_in is ModelIn.JSON)
"""The paths that a line of a file may ask."""
WINDOW, WINDOW_S = "24h", 24 * 3600
MAX_LINES = 50_000
MAX_TOLD_ERRORS = 20
MAX_CUSTOM_ID = 512
LEAST_KEPT_S, MOST_KEPT_S = 3600, 30 * 24 * 3600
"""How long a file is kept: OpenAI's bounds. The longest is also the usual one."""
_encode = msgspec.json.Encoder().encode


class BatchStatus(Enum):
    """The statuses, in OpenAI's words."""

    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


ENDED = frozenset(
    (BatchStatus.COMPLETED, BatchStatus.FAILED, BatchStatus.EXPIRED, BatchStatus.CANCELLED)
)


class UserFile(msgspec.Struct, frozen=True):
    """`owner` is the name of an account. Times are in seconds of the Unix epoch."""

    id: str
    owner: str
    filename: str
    purpose: str
    size_bytes: int
    created_at: int
    kept_s: int = MOST_KEPT_S

    @property
    def expires_at(self) -> int:
        return self.created_at + self.kept_s


class LineError(msgspec.Struct, frozen=True):
    """Why a file cannot be a batch. `line` begins with 1. None: the error is about the whole
    file.
    """

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class Batch(msgspec.Struct, frozen=True):
    """`times` has, for each status, the time at which the batch came to it."""

    id: str
    owner: str
    endpoint: str
    input_file_id: str
    created_at: int
    status: BatchStatus = BatchStatus.VALIDATING
    metadata: dict[str, str] | None = None
    times: dict[str, int] = {}
    total: int = 0
    completed: int = 0
    failed: int = 0
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: tuple[LineError, ...] = ()
    results_kept_s: int = MOST_KEPT_S

    @property
    def expires_at(self) -> int:
        return self.created_at + WINDOW_S

    def is_past(self, now: float) -> bool:
        """Whether it ended so long ago that it is forgotten."""
        return self.status in ENDED and now >= max(self.times.values()) + MOST_KEPT_S

    def become(self, status: BatchStatus, now: int, **more: Any) -> Batch:
        times = {**self.times, status.value: now}
        return msgspec.structs.replace(self, status=status, times=times, **more)


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One request of a file. `body` is what its path gets."""

    custom_id: str
    body: bytes


class _WrittenLine(msgspec.Struct):
    custom_id: str
    url: str
    body: msgspec.Raw
    method: str = "POST"


_decode_line = msgspec.json.Decoder(_WrittenLine).decode
_STREAM = frozenset({"stream"})


def read_lines(
    data: bytes, endpoint: str, max_text_bytes: int
) -> tuple[list[BatchLine], list[LineError]]:
    """(the requests of a file in JSON lines, its errors). If there are errors, none of its requests
    may be answered. At most MAX_TOLD_ERRORS are returned. A request has at most `max_text_bytes` of
    text.
    """
    lines: list[BatchLine] = []
    errors: list[LineError] = []
    seen: set[str] = set()
    for number, text in enumerate(_split(data.removeprefix(codecs.BOM_UTF8)), 1):
        if number > 2 * MAX_LINES:
            errors = [LineError("too_many_lines", f"The file has more than {2 * MAX_LINES} lines.")]
            break
        if not text.strip():
            continue
        found = _read_line(text, endpoint, seen, max_text_bytes)
        if isinstance(found, BatchLine):
            lines.append(found)
            seen.add(found.custom_id)
        else:
            errors.append(msgspec.structs.replace(found, line=number))
        if len(errors) >= MAX_TOLD_ERRORS:
            break
        if len(lines) > MAX_LINES:
            errors = [LineError("too_many_lines", f"The file has more than {MAX_LINES} requests.")]
            break
    if not lines and not errors:
        errors = [LineError("empty_file", "The file holds no request.")]
    return lines, errors


def _split(data: bytes) -> Iterator[bytes]:
    """The lines one by one: a file may have as many as bytes."""
    start = 0
    while start < len(data):
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        yield data[start:end]
        start = end + 1


def _read_line(
    text: bytes, endpoint: str, seen: set[str], max_text_bytes: int
) -> BatchLine | LineError:
    try:
        if len(text) > MAX_ON_LOOP_BYTES:
            check_large_body(text, max_text_bytes)
        line = _decode_line(text)
        read = ENDPOINTS[endpoint].fields & _STREAM
        streams = parse_body_fields(bytes(line.body), names=read).stream
    except InvalidRequest as exc:
        return LineError(exc.code, exc.message, "body")
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        return LineError("invalid_json_line", f"This line is no request of a batch: {exc}")
    if not 0 < len(line.custom_id) <= MAX_CUSTOM_ID:
        return LineError(
            "invalid_custom_id",
            f"`custom_id` must have 1 to {MAX_CUSTOM_ID} characters.",
            "custom_id",
        )
    if line.custom_id in seen:
        return LineError(
            "duplicate_custom_id", "An earlier line has the same `custom_id`.", "custom_id"
        )
    if line.method != "POST":
        return LineError("invalid_method", "`method` must be POST.", "method")
    if line.url != endpoint:
        return LineError(
            "mismatched_url", f"`url` must be the endpoint of the batch, {endpoint}.", "url"
        )
    if streams:
        return LineError("invalid_request", "`stream` has no meaning in a batch.", "body.stream")
    return BatchLine(line.custom_id, bytes(line.body))


# ---- results -------------------------------------------------------------------------------------


class _WrittenResult(msgspec.Struct):
    custom_id: str


_decode_done = msgspec.json.Decoder(_WrittenResult).decode


def result_line(batch: Batch, custom_id: str, request_id: str, status: int, body: bytes) -> bytes:
    """One line of results. `body` is JSON, as the path answers it."""
    response = {"status_code": status, "request_id": request_id, "body": msgspec.Raw(body)}
    return _line(request_id, custom_id, response, None)


def expired_line(custom_id: str, request_id: str) -> bytes:
    error = {
        "code": "batch_expired",
        "message": f"This request was not answered within the window of {WINDOW}.",
    }
    return _line(request_id, custom_id, None, error)


def _line(request_id: str, custom_id: str, response: Any, error: Any) -> bytes:
    made = {
        "id": f"batch_req_{request_id}",
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
    return _encode(made) + b"\n"


def answered(lines: Iterable[bytes]) -> tuple[set[str], int]:
    """(the `custom_id` of each result, the bytes of them all). The lines have their ends. Behind
    the last whole one there may be what a killed process, or a host without power, has left of a
    line.
    """
    found: set[str] = set()
    whole = 0
    for text in lines:
        if not text.endswith(b"\n"):
            break
        try:
            found.add(_decode_done(text).custom_id)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            break
        whole += len(text)
    return found, whole


# ---- what clients are shown ----------------------------------------------------------------------

_SHOWN_TIMES = {
    "in_progress_at": BatchStatus.IN_PROGRESS,
    "finalizing_at": BatchStatus.FINALIZING,
    "completed_at": BatchStatus.COMPLETED,
    "failed_at": BatchStatus.FAILED,
    "expired_at": BatchStatus.EXPIRED,
    "cancelling_at": BatchStatus.CANCELLING,
    "cancelled_at": BatchStatus.CANCELLED,
}


def shown_file(file: UserFile) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": file.created_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "expires_at": file.expires_at,
        "status_details": None,
    }


def shown_batch(batch: Batch) -> dict[str, Any]:
    errors = [msgspec.structs.asdict(error) for error in batch.errors]
    times = {name: batch.times.get(status.value) for name, status in _SHOWN_TIMES.items()}
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": {"object": "list", "data": errors} if errors else None,
        "input_file_id": batch.input_file_id,
        "completion_window": WINDOW,
        "status": batch.status.value,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": batch.created_at,
        "expires_at": batch.expires_at,
        **times,
        "request_counts": {
            "total": batch.total,
            "completed": batch.completed,
            "failed": batch.failed,
        },
        "metadata": batch.metadata,
    }


def shown_list(
    items: Iterable[Mapping[str, Any]], after: str | None, limit: int, newest_first: bool = True
) -> dict[str, Any]:
    """One page of a list. It begins after the item with the id `after`."""
    found = sorted(items, key=lambda item: (item["created_at"], item["id"]), reverse=newest_first)
    if after:
        at = next((n for n, item in enumerate(found) if item["id"] == after), len(found))
        found = found[at + 1 :]
    page = found[:limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(found) > len(page),
    }
