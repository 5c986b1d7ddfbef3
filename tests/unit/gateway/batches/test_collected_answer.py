"""Which answers can stand in a file of results."""

from __future__ import annotations

import json

import pytest

from gateway.batches.collected_answer import CollectingTransport, collected
from gateway.batches.records import Batch, answered, result_line
from gateway.http.response import ResponseWriter
from shared.api_endpoints import ErrorFamily

VECTORS = b"\x00\n\xff" * 8


def whole(status: int, body: bytes, lines: bytes = b"") -> bytes:
    """An answer as it is written to a client."""
    transport = CollectingTransport()
    stream = ResponseWriter(transport, 1 << 20, chunked=False)
    stream.describe(lambda: lines)
    stream.head(status, False, body, True)
    return bytes(transport.written)


@pytest.mark.parametrize("status", [200, 400, 503])
def test_a_json_answer_stands_in_its_line_as_it_is(status: int) -> None:
    assert collected(whole(status, b'{"a": 1}'), ErrorFamily.OPENAI) == (status, b'{"a": 1}', None)


@pytest.mark.parametrize(
    "written", [whole(200, VECTORS, b"content-type: application/octet-stream\r\n"), b""]
)
def test_an_answer_of_bytes_is_an_error_and_the_file_can_be_read(written: bytes) -> None:
    status, body, error = collected(written, ErrorFamily.OPENAI)
    assert error is not None and error.status == status >= 400
    line = result_line(Batch("b", "o", "/v1/embeddings", "f", 0), "r1", "q", status, body)
    assert answered(line) == ({"r1"}, len(line))
    assert json.loads(line)["response"]["body"]["error"]["code"] == error.code
