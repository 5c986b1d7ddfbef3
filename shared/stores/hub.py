"""Shell. Adapters in repositories of a Hugging Face hub. No other module imports huggingface_hub.

A repository with an `adapter_config.json` is one adapter, and so is each of its folders with one.
All files of an adapter come from one commit, which the listing names and the fetch asks for.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import msgspec
from huggingface_hub import constants, get_async_session, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, validate_repo_id

from shared.adapters.identity import CONFIG_FILE, StoredAdapter, StoredFile, may_be_part
from shared.errors import ConfigError, LoraplexError
from shared.stores.listing import (
    Entry,
    Grouping,
    Skipped,
    SkipReason,
    group,
    join_skipped,
    valid_name,
)
from shared.stores.object_store import (
    StoreProblem,
    TransferCut,
    changed,
    transient,
    unavailable,
    unreachable,
)
from shared.stores.transfer import Transfer, byte_range, fetch_adapter

CONNECT_TIMEOUT_S = 4.0
# Longest time between two pieces of a file. transfer.py bounds a file as a whole.
READ_TIMEOUT_S = 15.0
# Longest time of one question with its retries. A client waits for the answer.
ANSWER_TIMEOUT_S = 4.5
# Longest time of one page of a listing, for which nobody waits.
PAGE_TIMEOUT_S = 40.0
MAX_ATTEMPTS = 3
BACKOFF_S = 0.2
# Repositories of a listing that are asked for at once, of those that changed.
QUESTIONS_AT_ONCE = 8
MAX_REPOSITORIES = 100_000
MAX_REPLY_BYTES = 64 << 20
CHUNK_BYTES = 256 * 1024
# Commits that are looked through for a version by its digest, the newest first.
MAX_COMMITS = 30
MAX_COMMIT_PAGES = 10

_URL = re.compile(
    r"hf://(?P<org>[A-Za-z0-9][\w.-]{0,95})(?:/(?P<repo>[A-Za-z0-9][\w.-]{0,95})"
    r"(?:@(?P<revision>[\w./-]{1,200}))?)?/?\Z",
    re.ASCII,
)
_COMMIT = re.compile(r"[0-9a-f]{40}\Z")
# what a hub would take for a commit, whole or abbreviated
_HEXADECIMAL = re.compile(r"[0-9a-f]{4,40}\Z")
_REVISION = re.compile(r"[\w./-]{1,200}\Z", re.ASCII)
# The HTTP library behind huggingface_hub has another name in each major version.
_HTTP_ERROR = next(c for c in HfHubHTTPError.__mro__ if c.__name__ == "HTTPError")
_FOREIGN: tuple[type[Exception], ...] = (_HTTP_ERROR, OSError)


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """What one commit of a repository holds."""

    commit: str
    adapters: tuple[StoredAdapter, ...]
    skipped: Skipped


class HubStore:
    """`hf://org` has all repositories of an organisation or user, `hf://org/repo@revision` one of
    them, pinned. An adapter's name is its repository's, with the folder behind it if there is one.

    HF_ENDPOINT, HF_TOKEN and the token of `hf auth login` are respected. The digest is made of the
    contents, so a commit that changes only the README makes no new version.
    """

    def __init__(self, url: str, endpoint_url: str | None = None, anonymous: bool = False) -> None:
        found = _URL.match(url)
        if found is None:
            raise ConfigError("a hub store must look like hf://org or hf://org/repo@revision")
        self._org, self._repo, self._revision = found["org"], found["repo"], found["revision"]
        endpoint = endpoint_url or os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
        self._endpoint = endpoint.rstrip("/")
        self._anonymous = anonymous
        self.url = url.rstrip("/")
        self.skipped = Skipped()
        self._exit = AsyncExitStack()
        self._session: Any = None
        self._headers: dict[str, str] = {}
        self._snapshots: dict[str, _Snapshot] = {}  # of the last listing, by repository

    async def __aenter__(self) -> HubStore:
        # reading the token may refresh it over the network
        self._headers = await asyncio.to_thread(
            build_hf_headers, token=False if self._anonymous else None, library_name="loraplex"
        )
        self._session = await self._exit.enter_async_context(get_async_session())
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._exit.aclose()

    async def exists(self) -> bool:
        if self._repo is not None:
            return bool((await self._pinned_repo()).adapters)
        async for _ in self._repositories():
            return True
        return False

    async def list(self) -> AsyncIterator[StoredAdapter]:
        if self._repo is not None:
            snapshots = {self._repo: await self._pinned_repo()}
            lost = Grouping()
        else:
            snapshots, lost = await self._all()
        for repo in sorted(snapshots):
            for adapter in snapshots[repo].adapters:
                yield adapter
        self._snapshots = snapshots
        self.skipped = join_skipped([lost.skipped, *(s.skipped for s in snapshots.values())])

    async def find(self, name: str) -> StoredAdapter | None:
        return await self._at(name, self._revision)

    async def find_version(self, name: str, version: str) -> StoredAdapter | None:
        """`version` is a tag, a branch, a commit of the main branch, or a digest of one of its last
        commits. Anybody may propose commits to a public repository, so no others are served. A
        pinned store has its revision only.
        """
        if _REVISION.match(version) is None or ".." in version or not valid_name(name):
            return None
        if self._revision is not None:
            only = await self.find(name)
            names = () if only is None else (self._revision, only.files[0].version)
            known = only is not None and (version in names or only.digest.startswith(version))
            return only if known else None
        if _HEXADECIMAL.match(version) is None:
            return None if version.startswith("refs/") else await self._at(name, version)
        commits = [c async for c in self._commits(name.partition("/")[0])]
        for commit in commits:
            if commit.startswith(version):
                return await self._at(name, commit)
        for commit in commits[:MAX_COMMITS]:
            found = await self._at(name, commit)
            if found is not None and found.digest.startswith(version):
                return found
        return None

    async def fetch(
        self, adapter: StoredAdapter, into: Path, transfer: Transfer | None = None
    ) -> None:
        await fetch_adapter(adapter, into, self._stream, transfer)

    # ---- what the hub shows ----------------------------------------------------------------------

    def _may_be(self, repo: str) -> bool:
        try:
            validate_repo_id(f"{self._org}/{repo}")
        except HFValidationError:
            return False
        return True

    async def _pinned_repo(self) -> _Snapshot:
        snapshot = await self._snapshot(self._repo, self._revision)
        if snapshot is None:
            raise unavailable(StoreProblem.NO_REPOSITORY)
        return snapshot

    async def _at(self, name: str, revision: str | None) -> StoredAdapter | None:
        """The adapter as this revision has it. None: the newest one of the main branch."""
        repo = name.partition("/")[0]
        if not valid_name(name) or not self._may_be(repo) or self._repo not in (None, repo):
            return None
        snapshot = await self._snapshot(repo, revision)
        if snapshot is None and self._repo is not None and revision == self._revision:
            raise unavailable(StoreProblem.NO_REPOSITORY)
        found = () if snapshot is None else snapshot.adapters
        return next((adapter for adapter in found if adapter.name == name), None)

    async def _all(self) -> tuple[dict[str, _Snapshot], Grouping]:
        """Every repository with an adapter. Only those are asked for that have changed since the
        last listing. The second part counts those that could not be looked at.
        """
        lost, gate = Grouping(), asyncio.Semaphore(QUESTIONS_AT_ONCE)
        found: dict[str, _Snapshot] = {}

        async def look(repo: str, commit: str) -> None:
            async with gate:
                snapshot = await self._snapshot(repo, commit, PAGE_TIMEOUT_S)
            if snapshot is None:
                lost.skip(repo, SkipReason.UNREADABLE)
            else:
                found[repo] = snapshot

        try:
            async with asyncio.TaskGroup() as questions:
                async for repo, commit in self._repositories():
                    known = self._snapshots.get(repo)
                    if known is not None and known.commit == commit:
                        found[repo] = known
                    else:
                        questions.create_task(look(repo, commit), name=f"look at {repo}")
        except ExceptionGroup as failures:
            # The next listing goes on from here. A hub limits how often it may be asked.
            self._snapshots = {**self._snapshots, **found}
            known_ones = [e for e in failures.exceptions if isinstance(e, LoraplexError)]
            raise (known_ones[0] if known_ones else failures) from failures
        return found, lost

    async def _repositories(self) -> AsyncGenerator[tuple[str, str], None]:
        """(name, newest commit) of each repository that may hold an adapter."""
        query, seen = urlencode({"author": self._org, "full": "true", "limit": 1000}), 0
        while True:
            answer = await self._request(f"/api/models?{query}", PAGE_TIMEOUT_S)
            if answer is None:
                return
            rows, link = answer
            for row in _rows(rows):
                repo = _word(row.get("id") or row.get("modelId")).rpartition("/")[2]
                files = row.get("siblings")
                # an old hub lists no files; then only the repository itself can tell
                names = None if files is None else [_word(f.get("rfilename")) for f in _rows(files)]
                seen += 1
                if self._may_be(repo) and (
                    names is None or any(n.rpartition("/")[2] == CONFIG_FILE for n in names)
                ):
                    yield repo, _word(row.get("sha"))
            if not link or seen >= MAX_REPOSITORIES:
                return
            # Only the query counts: a mirror of a hub names the hub itself in its links.
            following = urlsplit(link).query
            if following == query:
                raise unavailable(StoreProblem.BROKEN_REPLY, "a listing without end")
            query = following

    async def _commits(self, repo: str) -> AsyncGenerator[str, None]:
        """The commits of the main branch, the newest first."""
        if not self._may_be(repo):
            return
        begin, query = f"/api/models/{self._org}/{repo}/commits/main", ""
        for _ in range(MAX_COMMIT_PAGES):
            answer = await self._request(begin + query)
            if answer is None:
                return
            for row in _rows(answer[0]):
                yield _word(row.get("id"))
            if not answer[1]:
                return
            query = f"?{urlsplit(answer[1]).query}"

    async def _snapshot(
        self, repo: str, revision: str | None, timeout_s: float = ANSWER_TIMEOUT_S
    ) -> _Snapshot | None:
        """None: the hub has no such repository or revision, or does not show it."""
        at = f"/revision/{quote(revision, safe='')}" if revision else ""
        answer = await self._request(f"/api/models/{self._org}/{repo}{at}?blobs=true", timeout_s)
        if answer is None:
            return None
        info = answer[0]
        if not isinstance(info, dict) or not _COMMIT.match(commit := _word(info.get("sha"))):
            raise unavailable(StoreProblem.BROKEN_REPLY)
        return _snapshot_of(repo, commit, info.get("siblings") or [])

    # ---- how it is asked -------------------------------------------------------------------------

    async def _request(
        self, path: str, timeout_s: float = ANSWER_TIMEOUT_S
    ) -> tuple[Any, str] | None:
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
    async def _stream(
        self, adapter_name: str, file: StoredFile, offset: int, length: int
    ) -> AsyncIterator[AsyncGenerator[bytes, None]]:
        repo, _, folder = adapter_name.partition("/")
        path = f"{folder}/{file.path}" if folder else file.path
        url = hf_hub_url(
            f"{self._org}/{repo}", path, revision=file.version, endpoint=self._endpoint
        )
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


def _snapshot_of(repo: str, commit: str, siblings: Any) -> _Snapshot:
    entries: list[Entry] = []
    for file in _rows(siblings):
        path = _word(file.get("rfilename"))
        lfs = file.get("lfs")
        content = lfs.get("sha256") if isinstance(lfs, dict) else file.get("blobId")
        size = file.get("size")
        if not may_be_part(path.rpartition("/")[2]):
            continue
        if not isinstance(size, int) or size < 0:
            raise unavailable(StoreProblem.BROKEN_REPLY, "a file without a size")
        entries.append(Entry(f"{repo}/{path}", size, _word(content) or commit))
    adapters, skipped = group(entries)
    return _Snapshot(commit, tuple(_pinned(adapter, commit) for adapter in adapters), skipped)


def _pinned(adapter: StoredAdapter, commit: str) -> StoredAdapter:
    """The digest follows the contents; where the files come from is the commit."""
    files = tuple(StoredFile(f.path, f.size_bytes, commit) for f in adapter.files)
    return StoredAdapter(adapter.name, adapter.digest, files)


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


def _rows(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise unavailable(StoreProblem.BROKEN_REPLY)
    return value


def _word(value: Any) -> str:
    return value if isinstance(value, str) else ""
