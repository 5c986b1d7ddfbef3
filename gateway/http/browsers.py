"""Pure. What a gateway lets web browsers do. A browser carries requests of any page to any address
that its user reaches, loopback included, so being reached from there is no permission.

- What changes state needs `application/json` or no body, and no foreign `Origin`.
- A loopback listener without keys answers under its own names alone, so that a page whose name was
  re-bound to 127.0.0.1 reads nothing.
- Pages of `allowed_origins` may call `/v1` and read the answers (CORS).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping

from shared.config.gateway import GatewayConfig, is_loopback
from shared.errors import Forbidden, UnsupportedEncoding

SAFE_METHODS = frozenset(("GET", "HEAD", "OPTIONS"))
MAX_HOST_CHARACTERS = 300
PREFLIGHT_AGE_S = 600
_HEADER_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~, -]{0,1000}\Z")

Header = Callable[[str], str | None]
NO_HEADERS: Mapping[str, str] = {}


class BrowserPolicy:
    """Of one gateway. `header` yields a request's header by its name in lower case."""

    def __init__(self, gateway: GatewayConfig) -> None:
        self._origins = frozenset(gateway.allowed_origins)
        admin_keys = bool(gateway.admin_keys_env or gateway.admin_keys_file)
        local = is_loopback(gateway.host)
        self.keyless = not gateway.asks_for_keys
        self.checks_host = local and self.keyless and "*" not in gateway.allowed_hosts
        self._checks_host_of_admin = self.checks_host and not admin_keys
        self._hosts = frozenset(h.lower() for h in (gateway.host, *gateway.allowed_hosts))
        self.knows_host = functools.lru_cache(256)(self._knows_host)

    @property
    def allows_pages(self) -> bool:
        return bool(self._origins)

    def check(self, method: str, header: Header, *, admin: bool) -> None:
        """Raises Forbidden, or UnsupportedEncoding for a body that any page may send."""
        host = header("host") or ""
        if (self._checks_host_of_admin if admin else self.checks_host) and not self.knows_host(
            host
        ):
            raise Forbidden(
                "This gateway has no keys and is not known by this Host; name it in "
                "gateway.allowed_hosts."
            )
        if method in SAFE_METHODS or not (admin or self.keyless):
            return
        origin = header("origin")
        foreign = origin is None and header("sec-fetch-site") in ("cross-site", "same-site")
        if foreign or (origin is not None and not self._welcome(origin, host)):
            raise Forbidden(
                "A page of another origin may not do this; name it in gateway.allowed_origins."
            )
        kind = (header("content-type") or "application/json").partition(";")[0].strip().lower()
        if admin and kind != "application/json":
            raise UnsupportedEncoding("Send this with Content-Type: application/json.")

    def cors_headers(self, origin: str | None) -> Mapping[str, str]:
        """Of an answer to that origin; none for a page that is not allowed."""
        if origin is None or not self._allows(origin):
            return NO_HEADERS
        return {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Expose-Headers": "*",
            "Vary": "Origin",
        }

    def preflight(self, header: Header) -> Mapping[str, str]:
        """The headers of the answer to a browser that asks whether it may."""
        allowed = self.cors_headers(header("origin"))
        if not allowed:
            return NO_HEADERS
        names = header("access-control-request-headers") or ""
        return {
            **allowed,
            "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
            "Access-Control-Allow-Headers": names if _HEADER_NAMES.match(names) else "",
            "Access-Control-Max-Age": str(PREFLIGHT_AGE_S),
        }

    def _allows(self, origin: str) -> bool:
        if "\r" in origin or "\n" in origin or not origin.isascii():
            return False
        return origin in self._origins or "*" in self._origins

    def _welcome(self, origin: str, host: str) -> bool:
        """One that is allowed, or that of the gateway itself."""
        return self._allows(origin) or origin.lower().partition("://")[2] == host.lower() != ""

    def _knows_host(self, host: str) -> bool:
        if len(host) > MAX_HOST_CHARACTERS:
            return False
        name = host.lower()
        if name.startswith("["):
            return is_loopback(name.partition("]")[0][1:])
        name = name.partition(":")[0]
        if name and "." not in name:
            return True  # of this machine or its network: nobody can own such a name in public
        return name in self._hosts or name.endswith(".localhost") or is_loopback(name)
