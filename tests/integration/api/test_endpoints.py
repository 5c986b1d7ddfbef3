"""Shell. The API's surface over real sockets: which paths exist, which shape errors have, and what
a model answers if it cannot do what it is asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from shared import errors
from shared.api_endpoints import ENDPOINTS, ErrorFamily, ModelIn
from tests.harness import Cluster, chat_body, cluster, make_adapter, sim_config

JSON_PATHS = [path for path, e in ENDPOINTS.items() if e.model_in is ModelIn.JSON]
UNSERVED = ["/invocations", "/ping", "/load", "/collective_rpc", "/sleep"]
"""Paths of vLLM's own server. None of them is for clients."""
PAGE, STRANGER = "http://localhost:3000", "https://other.example"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def small(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    folder: Path = tmp_path_factory.mktemp("endpoints")
    (folder / "adapters").mkdir()
    make_adapter(folder / "adapters", "pirate")
    config = sim_config(folder / "adapters", allowed_origins=[PAGE])
    async with cluster(config, folder) as c:
        await c.start_worker("w0")
        yield c


pytestmark = pytest.mark.asyncio(loop_scope="module")


def assert_error(body: object, family: ErrorFamily = ErrorFamily.OPENAI) -> None:
    assert isinstance(body, dict), body
    error = body["error"]
    assert {*error} == {"message", "type", "param", "code"}
    assert all(isinstance(error[key], str) and error[key] for key in ("message", "type", "code"))
    assert (family is ErrorFamily.ANTHROPIC) == (body.get("type") == "error")


@pytest.mark.parametrize("path", JSON_PATHS)
async def test_an_unknown_model_is_404_in_the_shape_of_the_path(small: Cluster, path: str) -> None:
    status, body, _ = await small.post(path, {"model": "nobody"})
    assert status == 404
    assert_error(body, ENDPOINTS[path].errors)


@pytest.mark.parametrize("path", JSON_PATHS)
async def test_a_body_that_is_no_json_is_400_in_the_shape_of_the_path(
    small: Cluster, path: str
) -> None:
    status, body, _ = await small.post(path, b"{")
    assert status == 400
    assert_error(body, ENDPOINTS[path].errors)


async def test_a_task_that_the_model_cannot_do_is_400_and_names_those_it_can(
    small: Cluster,
) -> None:
    for path in ("/v1/embeddings", "/v2/rerank", "/classify"):
        status, body, _ = await small.post(path, {"model": "sim", "input": "x"})
        assert status == 400 and body["error"]["param"] == "model"
        assert "generate" in body["error"]["message"]
        assert "/v1/chat/completions" in body["error"]["message"]


async def test_a_form_names_its_model_in_a_field(small: Cluster) -> None:
    form = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
        b'RIFF\r\n--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n--b--\r\n'
    )
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    path = "/v1/audio/transcriptions"
    assert (await small.post(path, form % b"nobody", kind))[0] == 404
    status, body, _ = await small.post(path, form % b"sim:pirate", kind)
    assert status == 400 and "sim:pirate" in body["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize", "/v2/embed", "/v1/files"])
@pytest.mark.parametrize("origin", [PAGE, STRANGER])
async def test_a_page_may_call_every_path_of_the_api_if_its_origin_may(
    small: Cluster, path: str, origin: str
) -> None:
    may = origin if origin == PAGE else None
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    async with small.http.options(small.url + path, headers=asked) as preflight:
        assert preflight.status == 204
        assert preflight.headers.get("Access-Control-Allow-Origin") == may
    _, body, headers = await small.post(path, {"model": "nobody"}, {"Origin": origin})
    assert_error(body)
    assert headers.get("Access-Control-Allow-Origin") == may


@pytest.mark.parametrize("path", ["/version", "/openapi.json", "/v1/models", "/v1/models/sim"])
async def test_a_page_may_read_what_the_api_says_of_itself(small: Cluster, path: str) -> None:
    async with small.http.get(small.url + path, headers={"Origin": PAGE}) as answer:
        assert answer.status == 200
        assert answer.headers.get("Access-Control-Allow-Origin") == PAGE


@pytest.mark.parametrize("path", ["/metrics", "/admin/adapters", "/health"])
async def test_no_page_reads_what_operators_ask_for(small: Cluster, path: str) -> None:
    async with small.http.get(small.url + path, headers={"Origin": PAGE}) as answer:
        assert "Access-Control-Allow-Origin" not in answer.headers


@pytest.mark.parametrize("path", UNSERVED)
async def test_what_is_not_in_the_table_is_not_served(small: Cluster, path: str) -> None:
    status, body, _ = await small.post(path, {"model": "sim"})
    assert status == 404
    assert_error(body)


@pytest.mark.parametrize("given", [{}, {"model": None}, {"model": ""}])
async def test_without_a_model_the_only_base_answers(
    small: Cluster, given: dict[str, object]
) -> None:
    body = {k: v for k, v in chat_body("", max_tokens=2).items() if k != "model"}
    status, answer, _ = await small.post("/v1/chat/completions", body | given)
    assert status == 200 and answer["model"] == "sim"


async def test_a_trailing_slash_and_an_encoded_id_say_nothing_new(small: Cluster) -> None:
    assert (await small.post("/v1/chat/completions/", chat_body("sim", max_tokens=2)))[0] == 200
    assert (await small.get("/v1/models/"))[0] == 200
    assert (await small.get("/v1/models/sim%3Apirate"))[1]["id"] == "sim:pirate"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", {"POST"}),
        ("PUT", "/tokenize", {"POST"}),
        ("POST", "/v1/models", {"GET", "HEAD"}),
        ("DELETE", "/v1/models/sim", {"GET", "HEAD"}),
        ("PUT", "/v1/responses/resp_1", {"GET"}),
    ],
)
async def test_a_405_names_the_methods_that_there_are(
    small: Cluster, method: str, path: str, allowed: set[str]
) -> None:
    async with small.http.request(method, small.url + path) as answer:
        assert answer.status == 405
        assert_error(await answer.json())
        assert {name.strip() for name in answer.headers["Allow"].split(",")} == allowed


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded"])
async def test_another_content_type_than_json_is_refused(small: Cluster, kind: str) -> None:
    given = {"Content-Type": kind}
    status, body, _ = await small.post("/v1/chat/completions", chat_body("sim"), given)
    assert status == 400
    assert_error(body)


async def test_models_tell_their_context_and_where_their_weights_are(small: Cluster) -> None:
    _, listed = await small.get("/v1/models")
    assert {m["max_model_len"] for m in listed["data"]} == {8192}
    assert listed["data"][0]["permission"]
    _, one = await small.get("/v1/models/sim:pirate")
    assert one["max_model_len"] == 8192 and one["parent"] == "sim"
    assert {"loraplex_state", "loraplex_tier"} <= {*one}
    by_id = {m["id"]: m for m in listed["data"]}
    assert by_id["sim"]["loraplex_state"] == "ready" and "loraplex_tier" not in by_id["sim"]
    assert {"loraplex_state", "loraplex_tier"} <= {*by_id["sim:pirate"]}
    await small.post("/v1/chat/completions", chat_body("sim:pirate", max_tokens=1))
    async with asyncio.timeout(30):
        while True:
            _, listed = await small.get("/v1/models")
            (found,) = (m for m in listed["data"] if m["id"] == "sim:pirate")
            if found["loraplex_tier"] == "gpu":
                break
            await asyncio.sleep(0.05)
    assert found["loraplex_state"] == "ready"
    assert found == (await small.get("/v1/models/sim:pirate"))[1]


async def test_every_answer_has_a_date(small: Cluster) -> None:
    for stream in (False, True):
        body = chat_body("sim", max_tokens=2, stream=stream)
        assert (await small.post("/v1/chat/completions", body))[2]["Date"]


async def test_a_response_that_is_not_kept_is_404(small: Cluster) -> None:
    for answer_id in ("resp_1", "resp_" + "0" * 40, "nonsense"):
        status, body = await small.get(f"/v1/responses/{answer_id}")
        assert status == 404
        assert_error(body)
    asked = {"model": "sim", "input": "x", "previous_response_id": "resp_" + "0" * 40}
    assert (await small.post("/v1/responses", asked))[0] == 404


async def test_the_api_describes_itself(small: Cluster) -> None:
    status, document = await small.get("/openapi.json")
    assert status == 200 and {*ENDPOINTS} <= {*document["paths"]}
    unready = document["paths"]["/ready"]["get"]["responses"]["503"]
    assert unready["content"] == {"application/json": {}}, "it has no error's shape"
    for error in vars(errors).values():
        if isinstance(error, type) and issubclass(error, errors.LoraplexError):
            assert str(error.status) in document["paths"]["/v1/completions"]["post"]["responses"]
    assert (await small.get("/version"))[1]["version"]
    status, page = await small.get("/docs")
    assert status == 200 and "/v1/messages" in page and "http" not in page.partition("<h1>")[2]
