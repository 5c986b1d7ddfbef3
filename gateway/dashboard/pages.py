"""Shell. `GET /ui`: the dashboard's static files. The page holds no data; it asks /admin for
everything, with the key that its user types.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from aiohttp import web

from gateway.accounts.keys import Keys
from shared.errors import InvalidApiKey

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
STATIC = Path(__file__).resolve().parent / "static"
TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Pages:
    """Serves the files, which are read once at the start."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._files = {
            f"/ui/{path.relative_to(STATIC).as_posix()}": (path.read_bytes(), TYPES[path.suffix])
            for path in STATIC.rglob("*")
            if path.suffix in TYPES
        }
        self._files["/ui"] = self._files["/ui/index.html"]

    def routes(self) -> Mapping[tuple[str, str], Handler]:
        return {("GET", path): self.page for path in self._files}

    async def page(self, request: web.BaseRequest) -> web.Response:
        """Raises Forbidden if /admin is closed to everybody: then the page is off, too."""
        with contextlib.suppress(InvalidApiKey):  # the page asks for one
            self._keys.check_admin("")
        body, kind = self._files[request.path]
        return web.Response(body=body, content_type=kind, charset="utf-8", headers=HEADERS)
