"""Pure. What an account's limits refuse in a body, on every path and by whatever field."""

from __future__ import annotations

import msgspec
import pytest

from gateway.accounts.account import Account, AccountLimits
from gateway.api.account_limits import allowed_body
from gateway.api.body.multipart import form_values
from gateway.api.body.schema import BodyFields, parse_body_fields, read_fields
from shared.api_endpoints import ENDPOINTS, ModelIn, endpoint_of
from shared.errors import InvalidRequest

LIMITED = Account("a", limits=AccountLimits(output_tokens=10, n=2))
FIELDS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
GENERATING = [
    path for path, e in ENDPOINTS.items() if e.limit_fields and e.model_in is ModelIn.JSON
]
FORM = "multipart/form-data; boundary=b"


def sent_on(account: Account, path: str, body: bytes) -> bytes:
    head, endpoint = parse_body_fields(body), ENDPOINTS[path]
    return allowed_body(account, head, body, endpoint, head.limit(endpoint))


def allowed(path: str, body: bytes) -> dict[str, object]:
    found = sent_on(LIMITED, path, body)
    return msgspec.json.decode(found, type=dict[str, object])


@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize("decoy", FIELDS)
def test_no_field_of_another_path_hides_a_limit_that_is_too_large(path: str, decoy: str) -> None:
    for field in ENDPOINTS[path].limit_fields:
        body = msgspec.json.encode({decoy: 1, field: 11})
        first = ENDPOINTS[path].limit_fields[0]
        if decoy != field and decoy == first:
            continue  # the engine takes the small one
        with pytest.raises(InvalidRequest, match="at most 10 output tokens"):
            allowed(path, body)


@pytest.mark.parametrize("path", GENERATING)
def test_a_request_that_gives_no_limit_of_its_path_gets_the_accounts(path: str) -> None:
    fields = ENDPOINTS[path].limit_fields
    for given in [{}, {fields[-1]: None}, {f: 1 for f in FIELDS if f not in fields}]:
        assert allowed(path, msgspec.json.encode(given))[fields[-1]] == 10


@pytest.mark.parametrize(
    "body",
    [
        b'{"max_tokens":1,"max_tokens":11}',
        b'{"max_tok\\u0065ns":11}',
        b'{"max_tokens":"11"}',
        b'{"max_tokens":11.0}',
        b'{"n":3}',
        b'{"\\u006e":3}',
        b'{"n":1,"n":3}',
    ],
)
def test_no_spelling_of_a_field_hides_it(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="at most"):
        allowed("/v1/completions", body)


def test_who_asks_for_a_stored_answer_sends_no_fields_that_could_be_fixed() -> None:
    endpoint = endpoint_of("/v1/responses/resp_1")
    assert endpoint is not None and endpoint.limit_fields
    assert allowed_body(LIMITED, BodyFields(), b"", endpoint, None) == b""


def test_a_body_with_a_name_that_is_no_text_is_refused_where_a_field_is_fixed() -> None:
    body = b'{"model":"m","priority":-1,"\xff":1}'
    with pytest.raises(InvalidRequest, match="UTF-8"):
        sent_on(Account(), GENERATING[0], body)


def form(preamble: bytes = b"", **fields: str) -> bytes:
    part = '--b\r\nContent-Disposition: form-data; name="{}"\r\n\r\n{}\r\n'
    return preamble + "".join(part.format(*it) for it in fields.items()).encode() + b"--b--\r\n"


def form_on(path: str, body: bytes) -> bytes:
    head, endpoint = read_fields(ENDPOINTS[path], FORM, body), ENDPOINTS[path]
    return allowed_body(LIMITED, head, body, endpoint, head.limit(endpoint), FORM)


@pytest.mark.parametrize("path", ["/v1/audio/transcriptions", "/v1/audio/translations"])
@pytest.mark.parametrize("preamble", [b"", b"a word before\r\n"])
def test_a_form_gets_the_accounts_limit_and_is_refused_beyond_it(
    path: str, preamble: bytes
) -> None:
    found = form_on(path, form(preamble, model="m"))
    assert form_values(FORM, found) == {"model": "m", "max_completion_tokens": "10"}
    small = form(preamble, model="m", max_completion_tokens="3.0")
    assert form_on(path, small) == small
    for wrong in ("11", "11.0", "x", "-1"):
        with pytest.raises(InvalidRequest) as caught:
            form_on(path, form(preamble, max_completion_tokens=wrong))
        assert caught.value.param == "max_completion_tokens"
