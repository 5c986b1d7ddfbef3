"""What the response writer puts on the connection, read by an independent client."""

from __future__ import annotations

import asyncio
import json

import h11
import pytest
from aiohttp.test_utils import make_mocked_request

from gateway.http.response import AlreadySent, ResponseWriter
from shared.errors import EngineFailure, Overloaded

LIMIT_BYTES = 1000


class Pipe(asyncio.Transport):
    """A transport that keeps what is written. `unread_bytes` is what the client has not read."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.unread_bytes = 0
        self.aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def get_write_buffer_size(self) -> int:
        return self.unread_bytes

    def abort(self) -> None:
        self.aborted = True

    def is_closing(self) -> bool:
        return self.aborted


def stream_on(pipe: Pipe, *, chunked: bool = True, close: bool = False) -> ResponseWriter:
    return ResponseWriter(pipe, LIMIT_BYTES, chunked=chunked, keep_alive=chunked and not close)


class Client:
    """What an independent HTTP/1.1 client reads from the pipe."""

    def __init__(self, data: bytes, closed: bool = False) -> None:
        self.connection = h11.Connection(h11.CLIENT)
        self.connection.send(
            h11.Request(method="POST", target="/", headers=[("Host", "x"), ("Content-Length", "0")])
        )
        self.connection.send(h11.EndOfMessage())
        self.connection.receive_data(data)
        if closed:
            self.connection.receive_data(b"")
        self.response: h11.Response | None = None
        self.body = b""
        self.complete = False
        while True:
            event = self.connection.next_event()
            if isinstance(event, h11.Response):
                self.response = event
            elif isinstance(event, h11.Data):
                self.body += event.data
            elif isinstance(event, h11.EndOfMessage):
                self.complete = True
                return
            else:
                return

    @property
    def headers(self) -> dict[str, str]:
        assert self.response is not None
        return {k.decode(): v.decode() for k, v in self.response.headers}

    @property
    def status(self) -> int:
        assert self.response is not None
        return self.response.status_code

    @property
    def may_go_on(self) -> bool:
        """Whether the connection can carry another request, by the client's own rules."""
        return self.connection.their_state is h11.DONE and not self.connection.trailing_data[0]


@pytest.fixture
def pipe() -> Pipe:
    return Pipe()


async def test_a_stream_arrives_whole_and_the_connection_can_be_used_again(pipe: Pipe) -> None:
    stream = stream_on(pipe)
    stream.head(200, True, b"data: 1\n\n", False)
    assert stream.more(b"data: 2\n\n", False) and stream.more(b"data: [DONE]\n\n", True)
    assert stream.finished and stream.keep_alive
    client = Client(pipe.written)
    assert client.response is not None and client.response.status_code == 200
    assert client.body == b"data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"
    assert client.complete and client.may_go_on
    assert client.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert client.headers["transfer-encoding"] == "chunked" and "connection" not in client.headers


async def test_an_answer_that_another_worker_begins_anew_has_the_status_of_that_one(
    pipe: Pipe,
) -> None:
    stream = stream_on(pipe)
    stream.head(200, False, b'{"half', False)
    stream.head(400, False, b'{"error": {}}', True)
    client = Client(pipe.written)
    assert (client.status, stream.status, client.body) == (400, 400, b'{"error": {}}')


async def test_nothing_is_written_before_the_first_frame_and_the_head_leaves_with_it(
    pipe: Pipe,
) -> None:
    stream = stream_on(pipe)
    assert pipe.written == b"" and not stream.started
    stream.head(200, True, b"first", False)
    client = Client(pipe.written)
    assert client.response is not None and client.body == b"first" and not client.complete
    assert stream.started and not stream.finished


async def test_a_head_that_is_also_the_end_is_a_complete_answer(pipe: Pipe) -> None:
    stream = stream_on(pipe)
    stream.head(200, True, b"all", True)
    client = Client(pipe.written)
    assert client.body == b"all" and client.complete and client.may_go_on and stream.finished


async def test_empty_frames_do_not_end_the_body(pipe: Pipe) -> None:
    stream = stream_on(pipe)
    stream.head(200, True, b"", False)
    stream.more(b"", False)
    stream.more(b"x", False)
    assert not Client(pipe.written).complete
    stream.more(b"", True)
    client = Client(pipe.written)
    assert client.body == b"x" and client.complete and client.may_go_on


async def test_an_answer_without_any_byte_is_complete(pipe: Pipe) -> None:
    stream = stream_on(pipe)
    stream.head(200, True, b"", True)
    client = Client(pipe.written)
    assert client.body == b"" and client.complete


@pytest.mark.parametrize("size", [1, 9, 10, 15, 16, 17, 255, 256, 65_536, 1_000_003])
async def test_frames_of_any_size_and_content_arrive_as_they_are(pipe: Pipe, size: int) -> None:
    data = (b"\r\n0\r\n\r\n" + bytes(range(256))) * (size // 263 + 1)
    stream = stream_on(pipe)
    stream.head(200, True, data[:size], False)
    stream.more(data[:size], True)
    client = Client(pipe.written)
    assert client.body == data[:size] * 2 and client.complete


@pytest.mark.parametrize("status", [200, 400, 404, 422, 500, 503])
async def test_a_stream_has_the_status_that_the_worker_gave_it(pipe: Pipe, status: int) -> None:
    stream = stream_on(pipe)
    stream.head(status, True, b"x", True)
    client = Client(pipe.written)
    assert client.response is not None and client.response.status_code == status == stream.status


@pytest.mark.parametrize("status", [218, 299, 499, 520, 599])
async def test_a_status_that_has_no_phrase_is_passed_on_all_the_same(
    pipe: Pipe, status: int
) -> None:
    stream = stream_on(pipe)
    stream.head(status, True, b"x", True)
    client = Client(pipe.written)
    assert client.response is not None and client.response.status_code == status


async def test_headers_are_asked_for_when_the_head_leaves(pipe: Pipe) -> None:
    stream = stream_on(pipe)
    worker = ["nobody"]
    stream.describe(lambda: f"x-loraplex-worker: {worker[0]}\r\n".encode())
    worker[0] = "w7"
    stream.head(200, True, b"x", True)
    assert Client(pipe.written).headers["x-loraplex-worker"] == "w7"


async def test_a_client_that_asks_to_close_is_told_so_and_gets_chunks(pipe: Pipe) -> None:
    stream = stream_on(pipe, close=True)
    stream.head(200, True, b"x", False)
    stream.more(b"y", True)
    client = Client(pipe.written)
    assert client.headers["connection"] == "close" and client.complete and client.body == b"xy"
    assert not stream.keep_alive and not client.may_go_on


@pytest.mark.parametrize("close", [True, False])
async def test_an_http_1_0_client_gets_plain_bytes_and_a_closed_connection(
    pipe: Pipe, close: bool
) -> None:
    stream = stream_on(pipe, chunked=False, close=close)
    stream.head(200, True, b"x", False)
    stream.more(b"", False)
    stream.more(b"y", True)
    assert pipe.written.endswith(b"\r\n\r\nxy")
    client = Client(pipe.written, closed=True)
    assert "transfer-encoding" not in client.headers and client.headers["connection"] == "close"
    assert client.body == b"xy" and client.complete and not stream.keep_alive


# ---- answers that are no stream ------------------------------------------------------------------


async def test_an_answer_that_is_no_stream_leaves_whole_in_one_write(pipe: Pipe) -> None:
    stream = stream_on(pipe)
    stream.head(400, False, b'{"error":', False)
    assert not stream.finished and not pipe.written
    stream.more(b" 1}", True)
    client = Client(pipe.written)
    assert stream.finished and stream.started and stream.status == 400
    assert (client.status, client.body, client.headers["content-length"]) == (
        400,
        b'{"error": 1}',
        "12",
    )
    assert client.headers["content-type"] == "application/json; charset=utf-8" and client.may_go_on


async def test_an_answer_in_one_frame_to_a_client_that_closes_says_so(pipe: Pipe) -> None:
    stream = stream_on(pipe, close=True)
    stream.head(200, False, b"{}", True)
    client = Client(pipe.written)
    assert (client.status, client.body, client.headers["connection"]) == (
        200,
        b"{}",
        "close",
    ) and stream.finished


# ---- errors --------------------------------------------------------------------------------------


async def test_an_error_before_the_head_leaves_the_answer_to_the_handler(pipe: Pipe) -> None:
    stream = stream_on(pipe)
    error = Overloaded("busy")
    stream.fail(error)
    assert stream.error is error and stream.finished and not stream.started and pipe.written == b""


async def test_an_error_in_an_unfinished_answer_that_is_no_stream_is_left_to_the_handler_too(
    pipe: Pipe,
) -> None:
    stream = stream_on(pipe)
    stream.head(200, False, b'{"half', False)
    stream.fail(EngineFailure("gone"))
    assert (
        stream.error is not None and not stream.started and pipe.written == b"" and stream.finished
    )


@pytest.mark.parametrize("chunked", [True, False])
async def test_an_error_after_the_head_is_an_event_that_ends_the_stream(
    pipe: Pipe, chunked: bool
) -> None:
    stream = stream_on(pipe, chunked=chunked)
    stream.head(200, True, b"data: 1\n\n", False)
    stream.fail(EngineFailure("the engine died"))
    client = Client(pipe.written, closed=not chunked)
    assert client.complete
    first, error, done, rest = client.body.split(b"\n\n")
    assert (first, done, rest) == (b"data: 1", b"data: [DONE]", b"")
    assert json.loads(error.removeprefix(b"data: "))["error"]["message"] == "the engine died"
    assert stream.finished


async def test_an_error_after_the_client_was_cut_off_is_not_written(pipe: Pipe) -> None:
    stream = stream_on(pipe)
    stream.head(200, True, b"x", False)
    before = pipe.written
    pipe.aborted = True
    stream.fail(EngineFailure("gone"))
    assert pipe.written == before and stream.finished


# ---- slow and absent clients ---------------------------------------------------------------------


async def test_a_client_may_leave_as_much_unread_as_the_bound_and_no_byte_more(pipe: Pipe) -> None:
    stream = stream_on(pipe)
    stream.head(200, True, b"x", False)
    pipe.unread_bytes = LIMIT_BYTES
    assert stream.more(b"y", False) and not pipe.aborted
    pipe.unread_bytes = LIMIT_BYTES + 1
    assert not stream.more(b"z", False)
    assert pipe.aborted


async def test_a_client_that_is_cut_off_does_not_get_an_end_that_it_could_take_for_a_whole_answer(
    pipe: Pipe,
) -> None:
    stream = stream_on(pipe)
    stream.head(200, True, b"x", False)
    pipe.unread_bytes = LIMIT_BYTES + 1
    stream.more(b"y", False)
    assert not Client(pipe.written).complete


async def test_a_refusal_is_a_whole_answer(pipe: Pipe) -> None:
    stream = stream_on(pipe)
    stream.refuse(503, b"Retry-After: 2\r\n", b'{"error":{}}')
    client = Client(pipe.written)
    assert (
        client.status == 503
        and client.headers["retry-after"] == "2"
        and client.body == b'{"error":{}}'
    )
    assert client.complete and client.may_go_on


async def test_the_end_is_told_once(pipe: Pipe) -> None:
    stream, ends = stream_on(pipe), []
    stream.on_finish = lambda: ends.append(1)
    stream.head(200, True, b"x", False)
    assert not ends
    stream.more(b"y", True)
    stream.fail(EngineFailure("late"))
    assert ends == [1]


async def test_aiohttp_gets_a_response_that_writes_nothing_more(pipe: Pipe) -> None:
    request = make_mocked_request("POST", "/", transport=pipe)
    response = AlreadySent(request, 200, keep_alive=True)
    assert await response.prepare(request) is None
    await response.write_eof()
    assert pipe.written == b"" and response.keep_alive is True and response.status == 200
    assert AlreadySent(request, 200, keep_alive=False).keep_alive is False


# ---- comments while it waits ---------------------------------------------------------------------

COMMENT = b": queued, position about 3\n\n"


@pytest.mark.parametrize("chunked", [True, False])
async def test_comments_come_before_the_stream_and_do_not_change_it(
    pipe: Pipe, chunked: bool
) -> None:
    stream = stream_on(pipe, chunked=chunked)
    stream.comment(COMMENT)
    stream.comment(COMMENT)
    assert stream.started and not stream.answered and not Client(pipe.written).complete
    stream.head(200, True, b"data: 1\n\n", False)
    stream.more(b"data: [DONE]\n\n", True)
    client = Client(pipe.written, closed=not chunked)
    assert (client.status, client.body) == (200, COMMENT * 2 + b"data: 1\n\ndata: [DONE]\n\n")
    assert (
        client.complete
        and client.headers["content-type"].startswith("text/event-stream")
        and pipe.written.count(b"HTTP/1.1") == 1
    )
    assert client.may_go_on == chunked


async def test_an_error_after_comments_waits_for_the_handler_which_ends_the_stream_with_it(
    pipe: Pipe,
) -> None:
    stream = stream_on(pipe)
    stream.comment(COMMENT)
    before = pipe.written
    stream.fail(Overloaded("busy"))
    assert stream.finished and not stream.answered and pipe.written == before
    assert stream.error is not None
    stream.end_with(stream.error)
    client = Client(pipe.written)
    comment, error, done, rest = client.body.split(b"\n\n")
    assert (comment + b"\n\n", done, rest) == (COMMENT, b"data: [DONE]", b"") and client.complete
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "overloaded"


async def test_after_comments_another_attempt_may_still_answer(pipe: Pipe) -> None:
    stream = stream_on(pipe)
    stream.comment(COMMENT)
    stream.fail(Overloaded("busy"))
    stream.again()
    assert stream.error is None and not stream.finished
    stream.head(200, True, b"data: 1\n\n", True)
    client = Client(pipe.written)
    assert client.body == COMMENT + b"data: 1\n\n" and client.complete and stream.finished


async def test_what_the_engine_answers_instead_of_a_stream_is_an_event_after_comments(
    pipe: Pipe,
) -> None:
    stream = stream_on(pipe)
    stream.comment(COMMENT)
    stream.head(400, False, b'{"error":\n', False)
    stream.more(b' {"message": "too long"}}', True)
    client = Client(pipe.written)
    assert client.status == 200 and client.complete and client.may_go_on and stream.finished
    assert client.body == COMMENT + b'data: {"error": {"message": "too long"}}\n\ndata: [DONE]\n\n'


async def test_a_comment_for_a_client_that_was_cut_off_is_not_written(pipe: Pipe) -> None:
    stream = stream_on(pipe)
    stream.comment(COMMENT)
    before, pipe.aborted = pipe.written, True
    stream.comment(COMMENT)
    assert pipe.written == before


def test_a_whole_answer_in_pieces_is_one_body_and_a_new_attempt_begins_it_anew() -> None:
    pipe = Pipe()
    stream = stream_on(pipe)
    stream.head(200, False, b'{"lost":', False)
    stream.more(b"1", False)
    stream.again()
    stream.head(200, False, b'{"a":', False)
    assert stream.more(b"2", False) and stream.more(b"}", True) and stream.finished
    found = Client(pipe.written)
    assert found.complete and found.body == b'{"a":2}'
