"""Shell. Adapters in repositories of a Hugging Face hub.

A repository with an `adapter_config.json` is one adapter, and so is each of its folders with one.
All files of an adapter come from one commit, which the listing names and the fetch asks for.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from shared.adapters.identity import CONFIG_FILE, StoredAdapter, StoredFile, may_be_part
from shared.errors import ConfigError, LoraplexError
from shared.stores.hub_client import ANSWER_TIMEOUT_S, HubClient, may_be_repo
from shared.stores.listing import (
    Entry,
    Grouping,
    Skipped,
    SkipReason,
    group,
    join_skipped,
    valid_name,
)
from shared.stores.object_store import StoreFailure, StoreProblem, unavailable
from shared.stores.transfer import Transfer, fetch_adapter

# Longest time of one page of a listing, for which nobody waits.
PAGE_TIMEOUT_S = 40.0
# Repositories of a listing that are asked for at once, of those that changed.
QUESTIONS_AT_ONCE = 8
MAX_REPOSITORIES = 100_000
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


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """What one commit of a repository holds."""

    commit: str
    adapters: tuple[StoredAdapter, ...]
    skipped: Skipped


class HubStore:
    """`hf://org` has all repositories of an organisation or user, `hf://org/repo@revision` one of
    them, pinned. An adapter's name is its repository's, with the folder behind it if there is one.

    The digest is made of the contents, so a commit that changes only the README makes no new
    version.
    """

    def __init__(self, url: str, endpoint_url: str | None = None, anonymous: bool = False) -> None:
        found = _URL.match(url)
        if found is None:
            raise ConfigError("a hub store must look like hf://org or hf://org/repo@revision")
        self._org, self._repo, self._revision = found["org"], found["repo"], found["revision"]
        self._hub = HubClient(endpoint_url, anonymous)
        self.url = url.rstrip("/")
        self.skipped = Skipped()
        self._snapshots: dict[str, _Snapshot] = {}  # of the last listing, by repository

    async def __aenter__(self) -> HubStore:
        await self._hub.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._hub.__aexit__(*exc)

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
        return may_be_repo(f"{self._org}/{repo}")

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
            try:
                async with gate:
                    snapshot = await self._snapshot(repo, commit, PAGE_TIMEOUT_S)
            except StoreFailure as exc:
                if exc.trouble is not StoreProblem.BROKEN_REPLY:
                    raise
                # Its own doing, as with a list of files above all bounds. Others are listed, and
                # it stays what it was.
                snapshot = self._snapshots.get(repo)
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
            answer = await self._hub.ask(f"/api/models?{query}", PAGE_TIMEOUT_S)
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
            answer = await self._hub.ask(begin + query)
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
        answer = await self._hub.ask(f"/api/models/{self._org}/{repo}{at}?blobs=true", timeout_s)
        if answer is None:
            return None
        info = answer[0]
        if not isinstance(info, dict) or not _COMMIT.match(commit := _word(info.get("sha"))):
            raise unavailable(StoreProblem.BROKEN_REPLY)
        return _snapshot_of(repo, commit, info.get("siblings") or [])

    @asynccontextmanager
    async def _stream(
        self, adapter_name: str, file: StoredFile, offset: int, length: int
    ) -> AsyncIterator[AsyncGenerator[bytes, None]]:
        repo, _, folder = adapter_name.partition("/")
        path = f"{folder}/{file.path}" if folder else file.path
        repo_id = f"{self._org}/{repo}"
        async with self._hub.stream(adapter_name, repo_id, path, file, offset, length) as chunks:
            yield chunks


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


def _rows(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise unavailable(StoreProblem.BROKEN_REPLY)
    return value


def _word(value: Any) -> str:
    return value if isinstance(value, str) else ""
