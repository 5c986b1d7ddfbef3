"""A Hugging Face hub for tests: a server on loopback that speaks the part of its API that a store
needs. Repositories are lists of commits; large files answer with a link to another host.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import quote

from aiohttp import web

from tests.store_servers import http_server

LARGE_BYTES = 1000  # files from this size on are kept elsewhere, as large files are
Files = dict[str, bytes]


@dataclass
class HubServer:
    """`refuse` may answer a request before the hub does. `asked` are the paths, with methods left
    out; `tokens` what each request sent as its authorization, by host.
    """

    url: str = ""
    page: int = 1000
    repos: dict[str, list[tuple[str, Files]]] = field(default_factory=dict)
    tags: dict[tuple[str, str], str] = field(default_factory=dict)
    proposals: set[str] = field(default_factory=set)
    """Commits of pull requests: the hub gives them out by their hash, but no branch has them."""
    gated: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    tokens: list[tuple[str, str]] = field(default_factory=list)
    refuse: Callable[[web.Request], web.StreamResponse | None] = lambda _: None

    def commit(self, repo: str, files: Files) -> str:
        """A new newest commit with exactly these files. Returns its hash."""
        history = self.repos.setdefault(repo, [])
        sha = hashlib.sha1(f"{repo} {len(history)}".encode()).hexdigest()
        history.insert(0, (sha, dict(files)))
        return sha

    async def respond(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.path)
        host = request.headers.get("Host", "").partition(":")[0]
        self.tokens.append((host, request.headers.get("Authorization", "")))
        refused = self.refuse(request)
        if refused is not None:
            return refused
        steps = request.path.strip("/").split("/")
        if steps[0] == "content":
            return _ranged(request, self._content(steps[1]))
        if steps[:2] == ["api", "models"] and len(steps) == 2:
            return self._listing(request)
        if steps[:2] == ["api", "models"]:
            repo, rest = "/".join(steps[2:4]), steps[4:]
            if rest[:1] == ["commits"]:
                return web.json_response([{"id": sha} for sha in self._main(repo)])
            return self._info(repo, rest[1] if rest else "main", "blobs" in request.query)
        repo, revision, path = "/".join(steps[:2]), steps[3], "/".join(steps[4:])
        return self._file(request, repo, revision, path)

    def _listing(self, request: web.Request) -> web.Response:
        author, start = request.query["author"], int(request.query.get("cursor", "0"))
        mine = sorted(repo for repo in self.repos if repo.startswith(f"{author}/"))
        rows = [
            {
                "id": repo,
                "sha": self.repos[repo][0][0],
                "siblings": _siblings(self.repos[repo][0][1]),
            }
            for repo in mine[start : start + self.page]
        ]
        headers = {}
        if start + self.page < len(mine):
            query = f"author={author}&full=true&cursor={start + self.page}"
            # as a mirror does, which passes on the links of the hub behind it
            headers["Link"] = f'<http://hub.invalid/api/models?{query}>; rel="next"'
        return web.json_response(rows, headers=headers)

    def _main(self, repo: str) -> list[str]:
        return [sha for sha, _ in self.repos.get(repo, []) if sha not in self.proposals]

    def _at(self, repo: str, revision: str) -> tuple[str, Files] | None:
        revision = self.tags.get((repo, revision), revision)
        history = self.repos.get(repo, [])
        if revision == "main":
            revision = next(iter(self._main(repo)), "")
        return next((one for one in history if one[0] == revision), None)

    def _info(self, repo: str, revision: str, blobs: bool) -> web.Response:
        found = self._at(repo, revision)
        if repo not in self.repos:
            return _error(401, "", "Invalid username or password.")
        if found is None:
            return _error(404, "RevisionNotFound", "Invalid rev id")
        sha, files = found
        siblings = _siblings(files, blobs)
        return web.json_response({"id": repo, "sha": sha, "siblings": siblings})

    def _file(
        self, request: web.Request, repo: str, revision: str, path: str
    ) -> web.StreamResponse:
        found = self._at(repo, revision)
        if repo in self.gated and request.headers.get("Authorization") != "Bearer accepted":
            return _error(403, "GatedRepo", "Access to this repository is restricted")
        if found is None or path not in found[1]:
            return _error(404, "EntryNotFound", "Entry not found")
        data, headers = found[1][path], {"X-Repo-Commit": found[0], "ETag": '"x"'}
        if len(data) < LARGE_BYTES:
            return _ranged(request, data, headers)
        name = hashlib.sha256(data).hexdigest()
        port = self.url.rpartition(":")[2]
        return web.Response(
            status=302,
            headers={
                **headers,
                "X-Linked-Size": str(len(data)),
                "Location": f"http://localhost:{port}/content/{quote(name)}",
            },
        )

    def _content(self, name: str) -> bytes:
        every = (data for history in self.repos.values() for _, f in history for data in f.values())
        return next(data for data in every if hashlib.sha256(data).hexdigest() == name)


def _siblings(files: Files, blobs: bool = False) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for path, data in files.items():
        row: dict[str, object] = {"rfilename": path}
        if blobs:
            row |= {"size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
            if len(data) >= LARGE_BYTES:
                row["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        rows.append(row)
    return rows


def _ranged(
    request: web.Request, data: bytes, headers: dict[str, str] | None = None
) -> web.Response:
    wanted = request.http_range
    if wanted.start is None and wanted.stop is None:
        return web.Response(body=data, headers=headers)
    return web.Response(status=206, body=data[wanted], headers=headers)


def _error(status: int, code: str, message: str) -> web.Response:
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return web.json_response({"error": message}, status=status, headers=headers)


@asynccontextmanager
async def hub_server() -> AsyncIterator[HubServer]:
    hub = HubServer()
    async with http_server(hub.respond) as url:
        hub.url = url
        yield hub
