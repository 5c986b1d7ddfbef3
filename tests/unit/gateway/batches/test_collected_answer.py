"""A line of a file waits behind everything else, and its answer stands in the results as JSON."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from gateway.accounts.account import LOWEST_PRIORITY, Account
from gateway.batches.collected_answer import (
    CollectingTransport,
    LineAnswer,
    LineRequest,
    answer_line,
    collected,
)
from gateway.batches.records import Batch, answered, result_line
from gateway.dispatch.queue.admission import Admission
from gateway.dispatch.request import InFlightRequest
from gateway.http.response import ResponseWriter
from shared.api_endpoints import ErrorFamily
from tests.unit.gateway.api.test_no_reference_cycles import services_in

VECTORS = b"\x00\n\xff" * 8


@pytest.mark.parametrize("priorities", [(0, 0), (-5, 10), (0, LOWEST_PRIORITY)])
async def test_a_line_has_the_lowest_priority(priorities: tuple[int, int], tmp_path: Path) -> None:
    services = services_in(tmp_path)
    incoming = LineRequest("/v1/completions", {"content-type": "application/json"})
    body = b'{"model":"base","prompt":"hello","priority":-5}'
    account = Account("a", priority=priorities)
    line = asyncio.create_task(answer_line(services, account, incoming, body))
    async with asyncio.timeout(10):
        while not services.dispatcher.open_requests:
            await asyncio.sleep(0)
    (open_request,) = services.dispatcher.each_open()
    assert open_request.requester.priority == LOWEST_PRIORITY
    line.cancel()
    with pytest.raises(asyncio.CancelledError):
        await line


async def test_a_line_whose_turn_does_not_come_has_not_failed(tmp_path: Path) -> None:
    """It is asked again, and alerts tell of requests that have failed."""
    admission: Admission[InFlightRequest] = Admission(1, timeout_s=0.0)
    services = services_in(tmp_path, admission=admission)
    incoming = LineRequest("/v1/completions", {"content-type": "application/json"})
    body = b'{"model":"base","prompt":"hello"}'
    for ask in range(1, 9):
        lines = [
            asyncio.create_task(answer_line(services, Account("a"), incoming, body))
            for _ in range(2)  # one waits in vain, the other finds the queue full
        ]
        async with asyncio.timeout(10):
            while not any(line.done() for line in lines):
                await asyncio.sleep(0)
        services.dispatcher.tick()
        assert [answer.status for answer in await asyncio.gather(*lines)] == [503, 503]
        shown = services.metrics.render([services.metrics.snapshot()], {}).decode()
        assert f'loraplex_requests_total{{base="base",outcome="aborted"}} {ask}.0' in shown
        assert f'loraplex_key_requests_total{{key="a",outcome="aborted"}} {2 * ask}.0' in shown
        assert 'outcome="failed"' not in shown and 'outcome="refused"' not in shown
    assert not admission.abandonment.newest_first("a")


def whole(status: int, body: bytes, lines: bytes = b"") -> bytes:
    """An answer as it is written to a client."""
    transport = CollectingTransport()
    stream = ResponseWriter(transport, 1 << 20, chunked=False)
    stream.describe(lambda: lines)
    stream.head(status, False, body, True)
    return bytes(transport.written)


@pytest.mark.parametrize("status", [200, 400, 503])
def test_a_json_answer_stands_in_its_line_as_it_is(status: int) -> None:
    found = collected(whole(status, b'{"a": 1}'), ErrorFamily.OPENAI)
    assert found == LineAnswer(status, b'{"a": 1}')


@pytest.mark.parametrize(
    "written",
    [whole(200, VECTORS, b"content-type: application/octet-stream\r\n"), b""],
    ids=["bytes", "nothing"],
)
def test_an_answer_of_bytes_is_an_error_and_the_file_can_be_read(written: bytes) -> None:
    found = collected(written, ErrorFamily.OPENAI)
    error = found.error
    assert error is not None and error.status == found.status >= 400
    batch = Batch("b", "o", "/v1/embeddings", "f", 0)
    line = result_line(batch, "r1", "q", found.status, found.body)
    assert answered([line]) == ({"r1"}, len(line))
    assert json.loads(line)["response"]["body"]["error"]["code"] == error.code
