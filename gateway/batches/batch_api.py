"""Shell. `/v1/files` and `/v1/batches`, as OpenAI's clients call them. A key sees only its own
files and batches.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import msgspec
from aiohttp import web
from aiohttp.payload import BufferedReaderPayload

from gateway.accounts.keys import Keys
from gateway.api.body.multipart import form_file
from gateway.api.body.schema import BYTE_ORDER_MARK
from gateway.batches.records import (
    BATCHED,
    LEAST_KEPT_S,
    MOST_KEPT_S,
    WINDOW,
    shown_batch,
    shown_file,
    shown_list,
)
from gateway.batches.store import BatchStore
from gateway.http.body_reader import aside
from gateway.http.headers import AiohttpRequest, authorization_of
from gateway.http.json_responses import to_json
from shared.errors import BodyTooLarge, ConfigError, InvalidRequest, Overloaded
from shared.lenient_values import integer

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
T = TypeVar("T")

FILES, BATCHES = "/v1/files", "/v1/batches"
PURPOSE = "batch"
ANCHOR = "created_at"
"""The only moment from which a file's time can be counted, as at OpenAI."""
FULL_RETRY_AFTER_S = 30.0
"""A disk that is full is so for a while."""
DEFAULT_PAGE, MAX_PAGE, MAX_FILE_PAGE = 20, 100, 10_000
MAX_METADATA, MAX_METADATA_KEY, MAX_METADATA_TEXT = 16, 64, 512
"""The most metadata of a batch: keys, and characters of a key and of its text, as at OpenAI."""


MAX_NEW_BATCH_BYTES = 128 << 10
"""Of a request for a batch: as much as its metadata may take with every character escaped. It is
read on the loop.
"""


class _ExpiresAfter(msgspec.Struct):
    seconds: int | float | str | bool = MOST_KEPT_S  # in all forms that other numbers may have
    anchor: str = ANCHOR


class _NewBatch(msgspec.Struct):
    input_file_id: str
    endpoint: str
    completion_window: str = WINDOW
    metadata: dict[str, str] | None = None
    output_expires_after: _ExpiresAfter | None = None


_decode_new = msgspec.json.Decoder(_NewBatch).decode


class BatchAPI:
    """The handlers. Routes has checked the key before it calls one."""

    def __init__(self, store: BatchStore, keys: Keys) -> None:
        self._store, self._keys = store, keys

    def routes(self) -> dict[tuple[str, str], Handler]:
        return {
            ("POST", FILES): self.upload,
            ("GET", FILES): self.files,
            ("POST", BATCHES): self.create,
            ("GET", BATCHES): self.batches,
        }

    def below(self, method: str, path: str) -> Handler | None:
        """The handler for a path with an id in it. None: there is no such path."""
        root, _, rest = path.removeprefix("/v1/").partition("/")
        _, _, what = rest.partition("/")
        table: dict[tuple[str, str, str], Handler] = {
            ("files", "GET", ""): self.file,
            ("files", "DELETE", ""): self.delete,
            ("files", "GET", "content"): self.content,
            ("batches", "GET", ""): self.batch,
            ("batches", "POST", "cancel"): self.cancel,
        }
        return table.get((root, method, what)) if rest else None

    # ---- files -----------------------------------------------------------------------------------

    async def upload(self, request: web.BaseRequest) -> web.Response:
        body = await request.read()
        found = await aside(request, form_file, request.headers.get("Content-Type", ""), body)
        if found.fields.get("purpose") != PURPOSE:
            raise InvalidRequest(f"`purpose` must be `{PURPOSE}`.", param="purpose")
        owner, kept_s = self._owner(request), _kept_s(found.fields)
        file = await _stored(
            request,
            lambda: self._store.add_file(owner, found.filename, PURPOSE, found.data, kept_s),
        )
        return _json(shown_file(file))

    async def files(self, request: web.BaseRequest) -> web.Response:
        owner = self._owner(request)
        files = await _stored(request, lambda: [*self._store.files(owner)])
        purpose = request.query.get("purpose")
        items = [shown_file(f) for f in files if purpose in (None, f.purpose)]
        return _json(_page(request, items, MAX_FILE_PAGE, MAX_FILE_PAGE))

    async def file(self, request: web.BaseRequest) -> web.Response:
        file = await _stored(request, self._store.file, self._owner(request), _id(request))
        return _json(shown_file(file))

    async def content(self, request: web.BaseRequest) -> web.Response:
        """The content goes out as fast as its client reads it, and is not held meanwhile."""
        file = await _stored(request, self._store.open_content, self._owner(request), _id(request))
        body = BufferedReaderPayload(file, filename=None, content_type="application/jsonl")
        return web.Response(body=body)

    async def delete(self, request: web.BaseRequest) -> web.Response:
        file_id = _id(request)
        await _stored(request, self._store.delete_file, self._owner(request), file_id)
        return _json({"id": file_id, "object": "file", "deleted": True})

    # ---- batches ---------------------------------------------------------------------------------

    async def create(self, request: web.BaseRequest) -> web.Response:
        new = _new_batch((await request.read()).removeprefix(BYTE_ORDER_MARK))
        kept_s = _seconds("output_expires_after", new.output_expires_after or _ExpiresAfter())
        owner = self._owner(request)
        batch = await _stored(
            request,
            lambda: self._store.add_batch(
                owner, new.endpoint, new.input_file_id, new.metadata, kept_s
            ),
        )
        return _json(shown_batch(batch))

    async def batches(self, request: web.BaseRequest) -> web.Response:
        owner = self._owner(request)
        batches = await _stored(request, lambda: [*self._store.batches(owner)])
        return _json(_page(request, [*map(shown_batch, batches)], DEFAULT_PAGE, MAX_PAGE))

    async def batch(self, request: web.BaseRequest) -> web.Response:
        batch = await _stored(request, self._store.batch, self._owner(request), _id(request))
        return _json(shown_batch(batch))

    async def cancel(self, request: web.BaseRequest) -> web.Response:
        await request.read()  # nothing in it is of use; what is unread would be the next head
        owner, batch_id = self._owner(request), _id(request)
        work = functools.partial(self._store.cancel, owner, batch_id)
        return _json(shown_batch(await _stored(request, work)))

    def _owner(self, request: web.BaseRequest) -> str:
        return self._keys.account_of(authorization_of(AiohttpRequest(request))).name


async def _stored(request: web.BaseRequest, use: Callable[..., T], *args: Any) -> T:
    """What `use` returns, which uses the disk, once it is the tenant's turn. Raises what it raises,
    and Overloaded if nothing can be read or written now.
    """
    try:
        return await aside(request, use, *args)
    except (OSError, ConfigError) as exc:
        cause = exc if isinstance(exc, OSError) else exc.__cause__
        why = cause.strerror if isinstance(cause, OSError) else "a record is broken"
        raise Overloaded(
            f"Files and batches cannot be used now: {why}.", retry_after_s=FULL_RETRY_AFTER_S
        ) from exc


def _new_batch(body: bytes) -> _NewBatch:
    """Raises InvalidRequest or BodyTooLarge."""
    if len(body) > MAX_NEW_BATCH_BYTES:
        raise BodyTooLarge(f"A request for a batch may have at most {MAX_NEW_BATCH_BYTES} bytes.")
    try:
        new = _decode_new(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise InvalidRequest(f"The request body is not what this path takes: {exc}") from exc
    if new.endpoint not in BATCHED:
        raise InvalidRequest(f"`endpoint` must be one of {', '.join(BATCHED)}.", param="endpoint")
    if new.completion_window != WINDOW:
        raise InvalidRequest(f"`completion_window` must be {WINDOW}.", param="completion_window")
    found = new.metadata or {}
    if len(found) > MAX_METADATA or any(
        len(key) > MAX_METADATA_KEY or len(text) > MAX_METADATA_TEXT for key, text in found.items()
    ):
        raise InvalidRequest(
            f"`metadata` has at most {MAX_METADATA} keys of {MAX_METADATA_KEY} characters, with "
            f"texts of {MAX_METADATA_TEXT} characters.",
            param="metadata",
        )
    return new


def _kept_s(fields: Mapping[str, str]) -> int:
    """How long an uploaded file is kept. Raises InvalidRequest."""
    after = _ExpiresAfter(
        fields.get("expires_after[seconds]", MOST_KEPT_S),
        fields.get("expires_after[anchor]", ANCHOR),
    )
    return _seconds("expires_after", after)


def _seconds(field: str, after: _ExpiresAfter) -> int:
    """Raises InvalidRequest."""
    if after.anchor != ANCHOR:
        raise InvalidRequest(f"`{field}.anchor` must be `{ANCHOR}`.", param=field)
    seconds = integer(after.seconds)
    if seconds is None or not LEAST_KEPT_S <= seconds <= MOST_KEPT_S:
        raise InvalidRequest(
            f"`{field}.seconds` must be a whole number from {LEAST_KEPT_S} to {MOST_KEPT_S}.",
            param=field,
        )
    return seconds


def _page(
    request: web.BaseRequest, items: list[dict[str, Any]], usual: int, most: int
) -> dict[str, Any]:
    """Raises InvalidRequest for a limit or an order that is not allowed."""
    limit = integer(request.query.get("limit", usual))
    if limit is None or not 1 <= limit <= most:
        raise InvalidRequest(f"`limit` must be a whole number from 1 to {most}.", param="limit")
    order = request.query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequest("`order` must be `asc` or `desc`.", param="order")
    return shown_list(items, request.query.get("after"), limit, order == "desc")


def _id(request: web.BaseRequest) -> str:
    return request.path.split("/")[3]


def _json(value: object) -> web.Response:
    return web.Response(body=to_json(value), content_type="application/json")
