"""Pure. What web browsers may do here. A browser sends requests of any web page to any address that
its user can reach, loopback included. So a request that arrives is not by itself allowed.

- A request that changes state needs `application/json` or no body, and no foreign `Origin`.
- A loopback listener without keys answers only under its own host names. Otherwise a page could
  re-bind its own name to 127.0.0.1 (DNS rebinding) and read the answers.
- Pages of `allowed_origins` may call the API and read the answers (CORS).
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
PRIVATE_NETWORK: Mapping[str, str] = {"Access-Control-Allow-Private-Network": "true"}
"""A page from the internet asks for it before it calls an address of the user's own network."""


class BrowserPolicy:
    """The policy of one gateway. `header` returns a request's header by its name in lower case."""

    def __init__(self, gateway: GatewayConfig) -> None:
        self.configure(gateway)

    def configure(self, gateway: GatewayConfig) -> None:
        """Takes changed settings."""
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
        """Raises Forbidden, or UnsupportedEncoding for a body type that any page could send."""
        self.check_host(header, admin=admin)
        host = header("host") or ""
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

    def check_host(self, header: Header, *, admin: bool = False) -> None:
        """Raises Forbidden."""
        checks = self._checks_host_of_admin if admin else self.checks_host
        if checks and not self.knows_host(header("host") or ""):
            raise Forbidden(
                "This gateway has no keys and is not known by this Host; name it in "
                "gateway.allowed_hosts."
            )

    def cors_headers(self, origin: str | None) -> Mapping[str, str]:
        """The headers of an answer to this origin. Empty: the origin is not allowed."""
        if origin is None or not self._allows(origin):
            return NO_HEADERS
        return {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Expose-Headers": "*",
            "Vary": "Origin",
        }

    def preflight(self, header: Header) -> Mapping[str, str]:
        """The headers of the answer to a CORS preflight request."""
        allowed = self.cors_headers(header("origin"))
        if not allowed:
            return NO_HEADERS
        names = header("access-control-request-headers") or ""
        private = header("access-control-request-private-network") == "true"
        return {
            **allowed,
            **(PRIVATE_NETWORK if private else NO_HEADERS),
            "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
            "Access-Control-Allow-Headers": names if _HEADER_NAMES.match(names) else "",
            "Access-Control-Max-Age": str(PREFLIGHT_AGE_S),
        }

    def _allows(self, origin: str) -> bool:
        if "\r" in origin or "\n" in origin or not origin.isascii():
            return False
        return origin in self._origins or "*" in self._origins

    def _welcome(self, origin: str, host: str) -> bool:
        """Whether the origin is allowed, or is the gateway itself."""
        return self._allows(origin) or origin.lower().partition("://")[2] == host.lower() != ""

    def _knows_host(self, host: str) -> bool:
        if len(host) > MAX_HOST_CHARACTERS:
            return False
        name = host.lower()
        if name.startswith("["):
            inside, end, port = name[1:].partition("]")
            return bool(end) and port[:1] in ("", ":") and is_loopback(inside)
        name = name.partition(":")[0]
        if name and "." not in name:
            return True  # of this machine or its network: nobody can own such a name in public
        return name in self._hosts or name.endswith(".localhost") or is_loopback(name)
