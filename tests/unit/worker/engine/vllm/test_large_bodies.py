"""Large bodies are read as `json` reads them, and not in one turn of the loop."""

from __future__ import annotations

import asyncio
import json

import pytest

pytest.importorskip("starlette")
from starlette.requests import Request

from worker.engine.vllm.app import large_bodies

TEXT = b'{"text": "' + b"A" * large_bodies.LARGE_BODY_BYTES + b'"%b}'
SAME = (
    b"",
    b', "text": 2',
    b', "n": [1, 1.0, -0, 0.1, 1e400, 5e-324, 123456789012345678901234567890]',
    b', "n": [NaN, Infinity, -Infinity]',
    b', "s": "\\ud83d\\ude00 \\u0000"',
    b', "half": "\\ud83d"',
    b', "deep": ' + b"[" * 400 + b"]" * 400,
)
WRONG = (b",", b', "n": 01', b', "s": "\x01"', b', "s": "\\x"', b', "bytes": "\xff"')


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Request, "json", Request.json)
    large_bodies.install()


def request(body: bytes) -> Request:
    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": body, "more_body": False}

    return Request({"type": "http", "headers": []}, receive)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("more", SAME)
async def test_a_large_body_is_read_as_json_reads_it(more: bytes) -> None:
    body = TEXT % more
    assert repr(await request(body).json()) == repr(json.loads(body))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("more", WRONG)
async def test_a_large_body_that_is_no_json_gets_the_error_of_json(more: bytes) -> None:
    body = TEXT % more
    with pytest.raises(ValueError) as expected:
        json.loads(body)
    with pytest.raises(ValueError) as error:
        await request(body).json()
    assert (type(error.value), str(error.value)) == (type(expected.value), str(expected.value))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("more", [b"", b', "half": "\\ud83d"'])
async def test_others_get_a_turn_before_a_large_body_is_read(more: bytes) -> None:
    order: list[str] = []
    asked = request(TEXT % more)
    await asked.body()
    asyncio.get_running_loop().call_soon(order.append, "another's turn")
    await asked.json()
    order.append("read")
    assert order == ["another's turn", "read"]


@pytest.mark.usefixtures("installed")
async def test_a_body_is_read_once() -> None:
    asked = request(TEXT % b"")
    assert await asked.json() is await asked.json()
