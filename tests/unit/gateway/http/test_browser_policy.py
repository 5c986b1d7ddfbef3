"""Which web pages may call the gateway from a browser."""

from __future__ import annotations

import pytest

from gateway.http.browser_policy import BrowserPolicy
from shared.config.gateway import GatewayConfig
from shared.errors import Forbidden, LoraplexError, UnsupportedEncoding

PAGE = "https://page.example"


def refused(
    policy: BrowserPolicy, method: str, *, admin: bool, **header: str
) -> type[LoraplexError] | None:
    fields = {name.replace("_", "-"): value for name, value in header.items()}
    try:
        policy.check(method, fields.get, admin=admin)
    except LoraplexError as exc:
        return type(exc)
    return None


KEYLESS = BrowserPolicy(GatewayConfig())
KEYED = BrowserPolicy(GatewayConfig(api_keys_env="K"))
OPEN = BrowserPolicy(GatewayConfig(allowed_origins=(PAGE,)))
JSON = "application/json"


@pytest.mark.parametrize("policy", [KEYLESS, KEYED])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
@pytest.mark.parametrize("origin", [PAGE, "null", "http://127.0.0.1:9", "http://", ""])
def test_a_page_of_another_origin_changes_nothing_on_operators_paths(
    policy: BrowserPolicy, method: str, origin: str
) -> None:
    asked = {"host": "127.0.0.1:8000", "origin": origin, "content_type": JSON}
    assert refused(policy, method, admin=True, **asked) is Forbidden


def test_a_page_that_hides_its_origin_is_known_by_what_the_browser_says_of_it() -> None:
    asked = {"host": "localhost", "sec_fetch_site": "cross-site"}
    assert refused(KEYLESS, "POST", admin=True, **asked) is Forbidden


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1:8000", "[::1]:8000"])
def test_a_page_of_the_gateways_own_origin_may(host: str) -> None:
    for scheme in ("http", "https"):
        asked = {"host": host, "origin": f"{scheme}://{host}", "content_type": JSON}
        assert refused(KEYLESS, "POST", admin=True, **asked) is None


def test_an_allowed_page_may() -> None:
    asked = {"host": "localhost", "origin": PAGE, "content_type": JSON}
    assert refused(OPEN, "POST", admin=True, **asked) is None


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "a", ""])
def test_operators_paths_take_json_and_tools_may_leave_the_type_out(kind: str) -> None:
    asked = {"host": "localhost", "content_type": kind}
    expected = UnsupportedEncoding if kind else None
    assert refused(KEYLESS, "POST", admin=True, **asked) is expected
    assert refused(KEYLESS, "POST", admin=True, host="localhost") is None
    asked["content_type"] = "application/json; charset=utf-8"
    assert refused(KEYLESS, "POST", admin=True, **asked) is None


def test_a_page_uses_no_model_of_a_gateway_without_keys() -> None:
    asked = {"host": "localhost", "origin": PAGE, "content_type": "text/plain"}
    assert refused(KEYLESS, "POST", admin=False, **asked) is Forbidden
    assert refused(KEYED, "POST", admin=False, **asked) is None, "it has no key to send"


@pytest.mark.parametrize(
    "host",
    [
        "page.example",
        "page.example:8000",
        "10.0.0.1",
        "localhost.page.example",
        "",
        "[",
        "x" * 9_999,
    ],
)
def test_a_name_that_was_bound_to_loopback_reads_nothing_without_keys(host: str) -> None:
    for admin in (True, False):
        assert refused(KEYLESS, "GET", admin=admin, host=host) is Forbidden
    assert refused(KEYED, "GET", admin=False, host=host) is None
    named = BrowserPolicy(GatewayConfig(allowed_hosts=("page.example",)))
    expected = None if host.startswith("page.example") else Forbidden
    assert refused(named, "GET", admin=True, host=host) is expected
    anybody = BrowserPolicy(GatewayConfig(allowed_hosts=("*",)))
    assert refused(anybody, "GET", admin=True, host=host) is None


@pytest.mark.parametrize(
    "host", ["localhost", "a.localhost:1", "127.9.9.9", "[::1]:80", "LOCALHOST", "gateway:80", "x"]
)
def test_its_own_names_are_known(host: str) -> None:
    assert refused(KEYLESS, "GET", admin=True, host=host) is None


@pytest.mark.parametrize(
    "host",
    ["[::1].evil.com", "[::1", "127.0.0.1.evil.com", "evil.com@127.0.0.1", "evil.com.", "[::2]"],
)
def test_a_name_that_only_looks_like_its_own_is_not_known(host: str) -> None:
    assert refused(KEYLESS, "GET", admin=True, host=host) is not None


def test_a_preflight_is_answered_for_allowed_origins_alone() -> None:
    asked = {"origin": PAGE, "access-control-request-headers": "authorization,x-y"}
    allowed = OPEN.preflight(asked.get)
    assert allowed["Access-Control-Allow-Origin"] == PAGE
    assert allowed["Access-Control-Allow-Headers"] == "authorization,x-y"
    assert "DELETE" in allowed["Access-Control-Allow-Methods"], "of files"
    assert "Access-Control-Allow-Private-Network" not in allowed
    private = OPEN.preflight({**asked, "access-control-request-private-network": "true"}.get)
    assert private["Access-Control-Allow-Private-Network"] == "true"
    assert not OPEN.preflight({"origin": "https://other.example"}.get)
    assert not KEYLESS.cors_headers(PAGE) and not OPEN.cors_headers(None)
    every = BrowserPolicy(GatewayConfig(allowed_origins=("*",)))
    assert every.cors_headers("https://other.example")
    assert not every.cors_headers("https://a\r\nSet-Cookie: x"), "nothing gets into a head"
