"""Shell. How a Hugging Face hub is asked: its answers, its files, and what its statuses mean."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import msgspec
from huggingface_hub import constants, get_async_session, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, validate_repo_id

from shared.adapters.identity import StoredFile
from shared.errors import LoraplexError
from shared.stores.object_store import (
    StoreProblem,
    TransferCut,
    changed,
    transient,
    unavailable,
    unreachable,
)
from shared.stores.transfer import byte_range

CONNECT_TIMEOUT_S = 4.0
# Longest time between two pieces of a file. transfer.py bounds a file as a whole.
READ_TIMEOUT_S = 15.0
# Longest time of one question with its retries. A client waits for the answer.
ANSWER_TIMEOUT_S = 4.5
MAX_ATTEMPTS = 3
BACKOFF_S = 0.2
MAX_REPLY_BYTES = 64 << 20
CHUNK_BYTES = 256 * 1024

# The HTTP library behind huggingface_hub has another name in each major version.
_HTTP_ERROR = next(c for c in HfHubHTTPError.__mro__ if c.__name__ == "HTTPError")
_FOREIGN: tuple[type[Exception], ...] = (_HTTP_ERROR, OSError)


def may_be_repo(repo_id: str) -> bool:
    """Whether a hub would take `org/name` for the id of a repository."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        return False
    return True


class HubClient:
    """The connection to one hub. HF_ENDPOINT, HF_TOKEN and the token of `hf auth login` are
    respected; `anonymous` sends no token.
    """

    def __init__(self, endpoint_url: str | None, anonymous: bool) -> None:
        endpoint = endpoint_url or os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
        self._endpoint = endpoint.rstrip("/")
        self._anonymous = anonymous
        self._exit = AsyncExitStack()
        self._session: Any = None
        self._headers: dict[str, str] = {}

    async def __aenter__(self) -> HubClient:
        # reading the token may refresh it over the network
        self._headers = await asyncio.to_thread(
            build_hf_headers, token=False if self._anonymous else None, library_name="loraplex"
        )
        self._session = await self._exit.enter_async_context(get_async_session())
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._exit.aclose()

    async def ask(self, path: str, timeout_s: float = ANSWER_TIMEOUT_S) -> tuple[Any, str] | None:
        """The JSON of one answer, and the link to the page behind it. None: not found."""
        try:
            async with asyncio.timeout(timeout_s):
                for attempt in range(1, MAX_ATTEMPTS + 1):
                    try:
                        return await self._ask_once(path, timeout_s)
                    except LoraplexError as exc:
                        failure = exc
                        if attempt == MAX_ATTEMPTS or not _worth_another_try(exc):
                            raise
                    await asyncio.sleep(BACKOFF_S * 2 ** (attempt - 1))
                raise failure
        except TimeoutError as exc:
            raise unavailable(StoreProblem.UNREACHABLE, "no answer in time") from exc

    async def _ask_once(self, path: str, timeout_s: float) -> tuple[Any, str] | None:
        body = bytearray()
        waits = (CONNECT_TIMEOUT_S, timeout_s, timeout_s, timeout_s)
        try:
            async with self._session.stream(
                "GET", self._endpoint + path, headers=self._headers, timeout=waits
            ) as response:
                problem = _problem(response.status_code, response.headers)
                if problem is StoreProblem.NO_REPOSITORY:
                    return None
                if problem is not None:
                    raise unavailable(problem, _detail(problem, response.status_code))
                async for piece in response.aiter_bytes():
                    body += piece
                    if len(body) > MAX_REPLY_BYTES:
                        raise unavailable(StoreProblem.BROKEN_REPLY, "too long")
                return msgspec.json.decode(body), response.links.get("next", {}).get("url", "")
        except _FOREIGN as exc:
            raise _unreachable(exc) from exc
        except msgspec.DecodeError as exc:
            raise unavailable(StoreProblem.BROKEN_REPLY) from exc

    @asynccontextmanager
    async def stream(
        self, adapter_name: str, repo_id: str, path: str, file: StoredFile, offset: int, length: int
    ) -> AsyncIterator[AsyncGenerator[bytes, None]]:
        """The bytes of one file of an adapter, as the commit that is its version has it."""
        url = hf_hub_url(repo_id, path, revision=file.version, endpoint=self._endpoint)
        ranged = byte_range(file, offset, length)
        headers = {**self._headers, "accept-encoding": "identity"}
        waits = (CONNECT_TIMEOUT_S, READ_TIMEOUT_S, READ_TIMEOUT_S, READ_TIMEOUT_S)
        if ranged:
            headers["range"] = ranged
        opened = self._session.stream("GET", url, headers=headers, timeout=waits)
        try:
            response = await opened.__aenter__()
        except _FOREIGN as exc:
            raise _unreachable(exc) from exc
        try:
            problem = _problem(response.status_code, response.headers)
            if problem is StoreProblem.NO_REPOSITORY:
                raise changed(adapter_name)
            if problem is not None:
                raise unavailable(problem, _detail(problem, response.status_code))
            # A large file is a link to another host, and only the hub itself names the commit.
            first = (*response.history, response)[0]
            if first.headers.get("x-repo-commit") not in (None, file.version):
                raise changed(adapter_name)
            if ranged and response.status_code != 206:
                raise unavailable(StoreProblem.BROKEN_REPLY, "no range support")
            yield _chunks(response)
        finally:
            await opened.__aexit__(None, None, None)


async def _chunks(response: Any) -> AsyncGenerator[bytes, None]:
    try:
        async for chunk in response.aiter_raw(CHUNK_BYTES):
            yield chunk
    except _FOREIGN as exc:
        raise TransferCut from exc


def _problem(status: int, headers: Mapping[str, str]) -> StoreProblem | None:
    """What a status of the hub means. NO_REPOSITORY: not there, or not shown to this token."""
    code, message = headers.get("x-error-code"), headers.get("x-error-message", "")
    if status in (200, 206):
        return None
    if code == "GatedRepo":
        return StoreProblem.GATED
    # To clients without a token the hub says 401 of repositories that do not exist.
    hidden = code == "RepoNotFound" or message.startswith("Invalid username or password")
    if status == 404 or (status == 401 and hidden):
        return StoreProblem.NO_REPOSITORY
    if status in (401, 403):
        return StoreProblem.HUB_DENIED
    return StoreProblem.THROTTLED if status == 429 else StoreProblem.FAILED


def _detail(problem: StoreProblem, status: int) -> str:
    return str(status) if problem is StoreProblem.FAILED else ""


def _worth_another_try(error: LoraplexError) -> bool:
    trouble = getattr(error, "trouble", None)
    return trouble is not StoreProblem.THROTTLED and transient(error)  # type: ignore[arg-type]


def _unreachable(exc: Exception) -> LoraplexError:
    offline = isinstance(exc, OfflineModeIsEnabled)
    return unreachable(exc, "HF_HUB_OFFLINE is set" if offline else "")
