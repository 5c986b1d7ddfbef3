"""The dispatcher: from admission to the end of each request, with real parts and a link that is
played.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

import msgspec
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway.api.access_record import access_record
from gateway.dispatch.deadly.requests import DeadlyRequests
from gateway.dispatch.dispatcher import Dispatcher
from gateway.dispatch.lifecycle import MAX_ATTEMPTS, RequestPhase
from gateway.dispatch.queue.admission import Admission
from gateway.dispatch.request import ClientRequest, InFlightRequest, RequestedModel
from gateway.dispatch.settings import DispatchSettings, TimeAndChance
from gateway.dispatch.streams.journal import JournalBounds
from gateway.fleet.fleet import Fleet
from gateway.routing.registry import POLICIES, make_policy
from gateway.supervisor.autoscaling.reports import ModelStatus
from gateway.telemetry.prometheus import Metrics
from shared.adapters.identity import AdapterRef, StoredAdapter
from shared.errors import (
    DeadlineExceeded,
    EngineFailure,
    InvalidAdapter,
    LoraplexError,
    Overloaded,
    WorkerUnavailable,
)
from shared.link import messages
from shared.link.sockets import SendResult

LEASE_S, QUEUE_S = 3.0, 10.0
PIRATE = AdapterRef("tiny", "pirate", "d")
STORED = StoredAdapter("pirate", "d", ())
HEAD = 200 << messages.STATUS_SHIFT | messages.SSE


class Wires:
    """A Transport. It keeps what each worker gets. `state` says what the worker's data socket
    answers.
    """

    def __init__(self) -> None:
        self.data: list[tuple[str, messages.GatewayData]] = []
        self.control: list[tuple[bytes, messages.GatewayControl]] = []
        self.state: dict[bytes, SendResult] = {}
        self.forgotten: list[bytes] = []

    def send_data(self, peer: bytes, data: bytes) -> SendResult:
        sent = self.state.get(peer, SendResult.OK)
        if sent is SendResult.OK:
            self.data.append((peer.decode().partition("#")[0], messages.decode_gateway_data(data)))
        return sent

    def welcome(self, peer: bytes) -> messages.Welcome:
        return messages.Welcome("g0", "ipc:///data", LEASE_S, 0.5)

    def forget(self, peer: bytes) -> None:
        self.forgotten.append(peer)

    def send_control(self, peer: bytes, data: bytes) -> SendResult:
        self.control.append((peer, messages.decode_gateway_control(data)))
        return SendResult.OK

    def generated(self) -> list[tuple[str, messages.Generate]]:
        return [(w, m) for w, m in self.data if isinstance(m, messages.Generate)]

    def cancelled(self) -> list[tuple[str, int]]:
        return [(w, m.sid) for w, m in self.data if isinstance(m, messages.Cancel)]


class Kept:
    """A Sink that checks the order of its calls. With `takes` False the client does not read."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.parts: list[bytes] = []
        self.comments: list[bytes] = []
        self.error: LoraplexError | None = None
        self.ended = self.takes = self.sse = False
        self.takes = True

    def comment(self, text: bytes) -> None:
        assert not self.over, "a comment after the end"
        self.comments.append(text)

    def head(self, status: int, sse: bool, data: bytes, end: bool) -> None:
        assert not self.sse and not self.over, "a second head of a stream, or a head after the end"
        self.status, self.sse = status, sse
        self.parts = [data]
        self.ended = end

    def more(self, data: bytes, end: bool) -> bool:
        assert self.status is not None and not self.over, "more before the head or after the end"
        if not self.takes:
            return False
        self.parts.append(data)
        self.ended = end
        return True

    def fail(self, error: LoraplexError) -> None:
        assert not self.over, "told twice how it ended"
        self.error = error

    @property
    def over(self) -> bool:
        return self.ended or self.error is not None


JOURNALS = JournalBounds(1000, 1 << 20)


class Room:
    """A dispatcher with real parts, except for the link and the clock."""

    def __init__(
        self,
        max_queued: int = 10,
        max_requests: int = 100,
        seed: int = 0,
        policy: str = "residency-p2c",
        keepalive_s: float = 0.0,
        max_body_bytes: int = 1 << 20,
        deadly: DeadlyRequests | None = None,
    ) -> None:
        self.now = 100.0
        self.wires = Wires()
        self.fleet = Fleet(LEASE_S)
        self.queue: Admission[InFlightRequest] = Admission(max_queued, QUEUE_S)
        self.metrics = Metrics()
        self.dispatcher = Dispatcher(
            self.fleet,
            make_policy(policy),
            self.queue,
            self.wires,
            self.metrics,
            DispatchSettings(max_requests, keepalive_s, JOURNALS, max_body_bytes),
            TimeAndChance(lambda: self.now, random.Random(seed)),
            deadly,
        )
        self._seq = itertools.count(1)

    def heartbeat(
        self,
        worker: str,
        epoch: int = 1,
        capacity: int = 1,
        state: messages.WorkerState = messages.WorkerState.SERVING,
        **more: object,
    ) -> None:
        heartbeat = messages.Heartbeat(
            worker, epoch, next(self._seq), "tiny", state, capacity=capacity
        )
        heartbeat = msgspec.structs.replace(heartbeat, **more)
        self.dispatcher.inbox.on_control(
            messages.identity(worker, epoch), messages.encode(heartbeat)
        )

    def attach(self, worker: str, epoch: int = 1) -> None:
        self.dispatcher.inbox.on_data(
            messages.identity(worker, epoch), messages.encode(messages.Attach(worker, epoch))
        )

    def worker(self, worker: str, epoch: int = 1, capacity: int = 1, **more: object) -> None:
        self.heartbeat(worker, epoch, capacity, **more)  # type: ignore[arg-type]
        self.attach(worker, epoch)

    def frames(
        self,
        worker: str,
        *frames: messages.Frame | tuple[int, int, bytes],
        done: list[messages.Done] | None = None,
        epoch: int = 1,
    ) -> None:
        self.dispatcher.inbox.on_data(
            messages.identity(worker, epoch),
            messages.encode(messages.Step([(*f, b"")[:4] for f in frames], done or [])),
        )

    def takes(self, worker: str) -> None:
        """The worker says that it begins the requests of which others died."""
        for request in [*self.dispatcher._streams]:
            sent = request.lifecycle.phase is RequestPhase.SENT
            if sent and request.lifecycle.deaths and request.peer == f"{worker}#1".encode():
                self.frames(worker, (request.sid, messages.TAKEN, b""))

    def dies(self, worker: str) -> None:
        """It has taken all its requests before."""
        self.takes(worker)
        self.heartbeat(worker, state=messages.WorkerState.STOPPED)

    def refuse(
        self,
        worker: str,
        sid: int,
        code: str = "worker_unavailable",
        retryable: bool = True,
        epoch: int = 1,
        leaving: bool = False,
    ) -> None:
        step = messages.Step([], [], [messages.Refused(sid, code, "why", retryable, leaving)])
        self.dispatcher.inbox.on_data(messages.identity(worker, epoch), messages.encode(step))

    def inflight(
        self,
        adapter: AdapterRef | None = None,
        *,
        streams: bool = False,
        elsewhere: bool = False,
        movable: bool = False,
    ) -> tuple[InFlightRequest, Kept]:
        sink = Kept()
        return InFlightRequest(
            ClientRequest(
                "/v1/completions", "r", b"{}", prompt_tokens=0, streams=streams, movable=movable
            ),
            RequestedModel("tiny", adapter, STORED if adapter else None, elsewhere=elsewhere),
            sink,
        ), sink

    def submit(
        self,
        adapter: AdapterRef | None = None,
        *,
        streams: bool = False,
        elsewhere: bool = False,
        movable: bool = False,
    ) -> tuple[InFlightRequest, Kept]:
        inflight, sink = self.inflight(
            adapter, streams=streams, elsewhere=elsewhere, movable=movable
        )
        self.dispatcher.submit(inflight)
        return inflight, sink

    def reserved(self) -> dict[str, int]:
        return {w.id: len(w.reserved) for w in self.fleet}

    def counted(self, name: str, **labels: str) -> float:
        return self.metrics.value(name, labels) or 0.0


MakeRoom = Callable[..., Room]


@pytest.fixture
def make_room() -> Iterator[MakeRoom]:
    """Makes rooms. At the end of the test nothing of ours may have raised, and the books must
    agree.
    """
    rooms: list[Room] = []

    def make(*args: object, **settings: object) -> Room:
        rooms.append(Room(*args, **settings))  # type: ignore[arg-type]
        return rooms[-1]

    yield make
    for room in rooms:
        assert not room.counted("loraplex_internal_errors_total")
        assert room.dispatcher.audit()


@pytest.fixture
def room(make_room: MakeRoom) -> Room:
    return make_room()


# ---- the plain way -------------------------------------------------------------------------------


def test_a_request_goes_to_a_worker_and_its_answer_to_the_client(room: Room) -> None:
    room.worker("w0")
    inflight, sink = room.submit()
    assert room.wires.generated() == [
        ("w0", messages.Generate(inflight.sid, "/v1/completions", "r", b"{}"))
    ]
    assert room.reserved() == {"w0": 1} and inflight.lifecycle.phase is RequestPhase.SENT
    room.frames("w0", (inflight.sid, HEAD, b"a"), (inflight.sid, 0, b"b"))
    assert inflight.lifecycle.phase is RequestPhase.STREAMING and room.reserved() == {"w0": 1}
    room.frames("w0", (inflight.sid, messages.END, b"c"), done=[messages.Done(inflight.sid, 3, 4)])
    assert (sink.status, b"".join(sink.parts), sink.ended) == (200, b"abc", True)
    assert (
        inflight.lifecycle.phase is RequestPhase.FINISHED
        and room.reserved() == {"w0": 0}
        and room.dispatcher.open_requests == 0
    )
    assert inflight.done is not None and inflight.done.output_tokens == 4
    assert room.counted("loraplex_requests_total", base="tiny", outcome="finished") == 1


def test_an_answer_in_one_frame_is_head_and_end(room: Room) -> None:
    room.worker("w0")
    inflight, sink = room.submit()
    room.frames("w0", (inflight.sid, 400 << messages.STATUS_SHIFT | messages.END, b"{}"))
    assert (
        (sink.status, sink.ended) == (400, True)
        and inflight.lifecycle.phase is RequestPhase.FINISHED
        and room.reserved() == {"w0": 0}
    )


@pytest.mark.parametrize(
    ("status", "outcome"), [(400, "invalid"), (404, "invalid"), (500, "failed"), (200, "finished")]
)
def test_what_the_engine_refuses_is_counted_as_what_it_is_and_has_no_first_token(
    room: Room, status: int, outcome: str
) -> None:
    room.worker("w0")
    inflight, _ = room.submit()
    room.now += 0.1
    room.frames("w0", (inflight.sid, status << messages.STATUS_SHIFT | messages.END, b"{}"))
    assert room.counted("loraplex_requests_total", base="tiny", outcome=outcome) == 1
    ttft = room.counted("loraplex_ttft_seconds_count", base="tiny", cold="no", streamed="no")
    assert ttft == (outcome == "finished")
    assert access_record(inflight, "tiny", status, None).outcome == outcome


def test_the_files_of_an_adapter_travel_unless_it_is_on_the_gpu(room: Room) -> None:
    room.worker("w0", capacity=9)
    room.submit(PIRATE)
    loading = (messages.AdapterState("pirate", "d", messages.Tier.DISK, True),)
    room.heartbeat("w0", capacity=9, adapters=loading)
    room.submit(PIRATE)
    room.heartbeat(
        "w0", capacity=9, adapters=(messages.AdapterState("pirate", "d", messages.Tier.GPU),)
    )
    room.submit(PIRATE)
    room.submit()
    sent = [(m.adapter, m.stored) for _, m in room.wires.generated()]
    assert sent == [(PIRATE, STORED), (PIRATE, STORED), (PIRATE, None), (None, None)]


def test_a_first_heartbeat_is_welcomed_once(room: Room) -> None:
    room.heartbeat("w0")
    room.heartbeat("w0")
    assert [(p, type(m)) for p, m in room.wires.control] == [(b"w0#1", messages.Welcome)]
    room.heartbeat("w0", epoch=2)
    assert [p for p, _ in room.wires.control] == [b"w0#1", b"w0#2"]


def test_frames_for_a_stream_that_nobody_waits_for_are_answered_with_cancel_unless_it_ends(
    room: Room,
) -> None:
    room.worker("w0")
    room.frames("w0", (77, HEAD, b"x"), (78, messages.END, b"x"), (79, 0, b""))
    assert room.wires.cancelled() == [("w0", 77), ("w0", 79)]
    room.refuse("w0", 80)
    assert len(room.wires.cancelled()) == 2


def test_messages_that_do_not_decode_are_counted_and_dropped(room: Room) -> None:
    room.worker("w0")
    inflight, sink = room.submit()
    for junk in (b"", b"\xc1", b"junk", messages.encode(messages.Alive("g"))):
        room.dispatcher.inbox.on_control(b"x", junk)
        room.dispatcher.inbox.on_data(b"x", junk)
    assert room.counted("loraplex_undecodable_messages_total", socket="control") == 4
    assert room.counted("loraplex_undecodable_messages_total", socket="data") == 4
    room.frames("w0", (inflight.sid, HEAD | messages.END, b"x"))
    assert sink.ended


def test_a_message_with_broken_text_is_counted_and_dropped_too(room: Room) -> None:
    attach = messages.encode(messages.Attach("aaaa", 1)).replace(b"aaaa", b"\xff\xff\xff\xff")
    room.dispatcher.inbox.on_data(b"x", attach)
    assert room.counted("loraplex_undecodable_messages_total", socket="data") == 1


def test_a_heartbeat_of_another_protocol_is_counted_and_joins_nobody(room: Room) -> None:
    room.heartbeat("w0", protocol=messages.PROTOCOL_VERSION + 1)
    assert (
        len(room.fleet) == 0
        and room.counted("loraplex_undecodable_messages_total", socket="protocol") == 1
    )


# ---- the queue -----------------------------------------------------------------------------------


def test_requests_without_room_wait_in_order_and_each_end_lets_the_next_one_go(room: Room) -> None:
    room.worker("w0")
    requests = [room.submit()[0] for _ in range(3)]
    assert room.dispatcher.queued("tiny") == 2 and len(room.wires.generated()) == 1
    for i, inflight in enumerate(requests):
        assert (
            len(room.wires.generated()) == i + 1 and inflight.lifecycle.phase is RequestPhase.SENT
        )
        room.frames("w0", (inflight.sid, HEAD | messages.END, b"x"))
    assert room.dispatcher.open_requests == 0 and room.dispatcher.queued("tiny") == 0


@pytest.mark.parametrize("news", ["heartbeat", "attach"])
def test_a_worker_that_comes_gets_what_waits(room: Room, news: str) -> None:
    if news == "heartbeat":
        room.worker("w0", state=messages.WorkerState.JOINING, capacity=0)
    else:
        room.heartbeat("w0")
    inflight, _ = room.submit()
    assert inflight.lifecycle.phase is RequestPhase.QUEUED
    if news == "heartbeat":
        room.heartbeat("w0")
    else:
        room.attach("w0")
    assert inflight.lifecycle.phase is RequestPhase.SENT and inflight.ticket is None


def test_a_full_queue_is_overloaded_and_says_when_to_come_back(make_room: MakeRoom) -> None:
    room = make_room(max_queued=1)
    room.worker("w0")
    room.submit()
    room.submit()
    inflight, sink = room.inflight()
    with pytest.raises(Overloaded) as caught:
        room.dispatcher.submit(inflight)
    assert caught.value.retry_after_s is not None and 1.0 <= caught.value.retry_after_s <= 60.0
    assert room.dispatcher.open_requests == 2 and not sink.over


def test_without_any_worker_a_full_queue_still_says_when_to_come_back(make_room: MakeRoom) -> None:
    room = make_room(max_queued=0)
    with pytest.raises(Overloaded) as caught:
        room.submit()
    assert caught.value.retry_after_s


def test_who_is_turned_away_while_no_worker_serves_counts_as_load_until_it_is_to_come_back(
    make_room: MakeRoom,
) -> None:
    room = make_room(max_queued=0)
    asked: list[None] = []
    room.dispatcher.on_nobody_serves = lambda: asked.append(None)
    with pytest.raises(Overloaded) as caught:
        room.submit()
    assert asked and caught.value.retry_after_s
    assert room.dispatcher.loads(["tiny"])["tiny"].queued == 1
    room.now += caught.value.retry_after_s
    assert room.dispatcher.loads(["tiny"])["tiny"].queued == 0
    room.worker("w0")
    room.submit()
    with pytest.raises(Overloaded):
        room.submit()
    assert room.dispatcher.loads(["tiny"])["tiny"].queued == 0, "a busy worker is no missing one"


def test_more_open_requests_than_allowed_are_overloaded_at_once(make_room: MakeRoom) -> None:
    room = make_room(max_requests=2)
    room.worker("w0", capacity=9)
    room.submit()
    room.submit()
    with pytest.raises(Overloaded):
        room.submit()
    assert len(room.wires.generated()) == 2


def test_bodies_of_waiting_and_running_requests_are_bounded_together(make_room: MakeRoom) -> None:
    room = make_room(max_body_bytes=5)  # each has two bytes
    room.worker("w0", capacity=1)
    running, _ = room.submit()
    room.submit()
    with pytest.raises(Overloaded):
        room.submit()
    room.dispatcher.cancel(running)
    room.submit()


def test_a_request_that_waits_too_long_is_overloaded_and_was_never_sent(room: Room) -> None:
    inflight, sink = room.submit()
    room.now += QUEUE_S - 0.001
    room.dispatcher.tick()
    assert not sink.over
    room.now += 0.001
    room.dispatcher.tick()
    assert isinstance(sink.error, Overloaded) and sink.error.retry_after_s
    assert (
        inflight.lifecycle.phase is RequestPhase.FAILED
        and room.dispatcher.open_requests == 0
        and not room.wires.data
    )


# ---- refusals and losses -------------------------------------------------------------------------


def test_a_retryable_refusal_is_tried_again_under_a_new_stream(room: Room) -> None:
    room.worker("w0")
    inflight, sink = room.submit()
    first = inflight.sid
    room.refuse("w0", first)
    assert inflight.sid != first and inflight.lifecycle.phase is RequestPhase.SENT and not sink.over
    assert room.counted("loraplex_retries_total") == 1 and room.reserved() == {"w0": 1}
    room.frames("w0", (first, HEAD, b"late"))
    assert sink.status is None and ("w0", first) in room.wires.cancelled()
    room.frames("w0", (inflight.sid, HEAD | messages.END, b"x"))
    assert sink.parts == [b"x"]


def test_a_request_is_tried_a_bounded_number_of_times_and_then_fails_with_the_last_reason(
    room: Room,
) -> None:
    room.worker("w0")
    inflight, sink = room.submit()
    for _ in range(MAX_ATTEMPTS):
        assert not sink.over
        room.refuse("w0", inflight.sid)
    assert isinstance(sink.error, WorkerUnavailable) and len(room.wires.generated()) == MAX_ATTEMPTS
    assert room.reserved() == {"w0": 0} and room.dispatcher.open_requests == 0


@pytest.mark.parametrize("seed", range(8))
def test_a_refused_request_goes_to_another_worker_if_there_is_one_with_room(
    make_room: MakeRoom, seed: int
) -> None:
    """The worker that refused has the least load, and it is the adapter's only holder. So it would
    be asked again and refuse again.
    """
    room = make_room(seed=seed)
    room.worker(
        "w0", capacity=8, adapters=(messages.AdapterState("pirate", "d", messages.Tier.GPU),)
    )
    room.worker("w1", capacity=8)
    inflight, _ = room.submit(PIRATE)
    assert room.wires.generated()[-1][0] == "w0"
    room.refuse("w0", inflight.sid, "engine_error")
    assert room.wires.generated()[-1][0] == "w1"


def test_a_request_that_a_leaving_worker_gives_back_waits_for_another_one(
    room: Room,
) -> None:
    """The end of the worker is reported on two sockets. Before its heartbeats say it, the same
    worker would be asked until no attempt is left.
    """
    room.worker("w0", capacity=8)
    requests = [room.submit() for _ in range(3)]
    for inflight, _ in requests:
        room.refuse("w0", inflight.sid, "engine_error", leaving=True)
        room.heartbeat("w0", capacity=8)  # it left the worker before the end did
    assert [inflight.lifecycle.phase for inflight, _ in requests] == [
        RequestPhase.QUEUED
    ] * 3 and len(room.wires.generated()) == 3
    later, _ = room.submit()
    assert later.lifecycle.phase is RequestPhase.QUEUED
    room.worker("w0", epoch=2, capacity=8)
    assert [inflight.lifecycle.phase for inflight, _ in [*requests, (later, None)]] == [
        RequestPhase.SENT
    ] * 4


def test_a_refusal_that_is_final_is_told_to_the_client(room: Room) -> None:
    room.worker("w0")
    inflight, sink = room.submit(PIRATE)
    room.refuse("w0", inflight.sid, "invalid_adapter", retryable=False)
    assert (
        isinstance(sink.error, InvalidAdapter) and inflight.lifecycle.phase is RequestPhase.FAILED
    )
    assert len(room.wires.generated()) == 1 and room.reserved() == {"w0": 0}


def test_a_version_that_the_store_does_not_show_is_looked_for_on_another_worker(
    make_room: MakeRoom,
) -> None:
    room = make_room()
    for worker in ("w0", "w1"):
        room.worker(worker)
    for elsewhere, phase in ((False, RequestPhase.FAILED), (True, RequestPhase.SENT)):
        inflight, _ = room.submit(PIRATE, elsewhere=elsewhere)
        first = inflight.choice.worker.id  # type: ignore[union-attr]
        room.refuse(first, inflight.sid, "adapter_not_found", retryable=False)
        assert inflight.lifecycle.phase is phase
        assert (inflight.choice.worker.id != first) is elsewhere  # type: ignore[union-attr]


def test_a_refusal_after_the_first_frame_fails_the_stream_and_is_not_retried(room: Room) -> None:
    room.worker("w0")
    inflight, sink = room.submit()
    room.frames("w0", (inflight.sid, HEAD, b"x"))
    room.refuse("w0", inflight.sid)
    assert (
        sink.error is not None
        and len(room.wires.generated()) == 1
        and room.dispatcher.open_requests == 0
    )


def lose_by_lease(room: Room) -> None:
    room.now += LEASE_S
    room.heartbeat("w1")
    room.dispatcher.tick()


def lose_by_restart(room: Room) -> None:
    room.heartbeat("w0", epoch=2, capacity=0)


def lose_by_word(room: Room) -> None:
    room.heartbeat("w0", state=messages.WorkerState.STOPPED)


losses = pytest.mark.parametrize("lose", [lose_by_lease, lose_by_restart, lose_by_word])


@losses
def test_a_worker_lost_before_the_first_frame_costs_time_only(
    room: Room, lose: Callable[[Room], None]
) -> None:
    room.worker("w0")
    inflight, sink = room.submit()
    room.worker("w1")
    lose(room)
    assert [w for w, _ in room.wires.generated()] == [
        "w0",
        "w1",
    ] and inflight.lifecycle.phase is RequestPhase.SENT
    room.frames("w1", (inflight.sid, HEAD | messages.END, b"x"))
    assert sink.ended and sink.error is None


@losses
def test_a_worker_lost_after_the_first_frame_ends_the_stream_with_an_error(
    room: Room, lose: Callable[[Room], None]
) -> None:
    room.worker("w0")
    inflight, sink = room.submit()
    room.worker("w1")
    room.frames("w0", (inflight.sid, HEAD, b"x"))
    lose(room)
    assert (
        isinstance(sink.error, EngineFailure)
        and sink.parts == [b"x"]
        and inflight.lifecycle.phase is RequestPhase.FAILED
    )
    assert len(room.wires.generated()) == 1 and room.dispatcher.open_requests == 0


def test_a_request_of_a_lost_worker_waits_if_nobody_else_has_room_and_goes_with_the_next_one(
    room: Room,
) -> None:
    room.worker("w0")
    inflight, sink = room.submit()
    lose_by_word(room)
    assert inflight.lifecycle.phase is RequestPhase.QUEUED and room.dispatcher.queued("tiny") == 1
    room.worker("w1")
    assert inflight.lifecycle.phase is RequestPhase.SENT and not sink.over


def test_a_request_of_a_lost_worker_waits_even_if_the_queue_is_full(make_room: MakeRoom) -> None:
    """It has been admitted already."""
    room = make_room(max_queued=0)
    room.worker("w0")
    inflight, sink = room.submit()
    lose_by_word(room)
    assert inflight.lifecycle.phase is RequestPhase.QUEUED and not sink.over
    room.worker("w1")
    assert inflight.lifecycle.phase is RequestPhase.SENT


# ---- what the link answers -----------------------------------------------------------------------


def test_a_worker_that_the_link_says_is_gone_is_removed_and_the_next_one_tried(room: Room) -> None:
    room.worker("w0")
    room.wires.state[b"w0#1"] = SendResult.GONE
    inflight, _ = room.submit()
    assert inflight.lifecycle.phase is RequestPhase.QUEUED and len(room.fleet) == 0
    room.worker("w1")
    assert room.wires.generated() == [
        ("w1", messages.Generate(inflight.sid, "/v1/completions", "r", b"{}"))
    ]


def test_what_a_gone_worker_had_is_given_to_others(room: Room) -> None:
    room.worker("w0", capacity=3)
    held, _ = room.submit()
    room.worker("w1", capacity=3, running=2)
    room.wires.state[b"w0#1"] = SendResult.GONE
    inflight, _ = room.submit()
    assert held.lifecycle.phase is inflight.lifecycle.phase or RequestPhase.QUEUED in (
        held.lifecycle.phase,
        inflight.lifecycle.phase,
    )
    assert room.reserved() == {"w1": 1} and room.dispatcher.queued("tiny") == 1


def test_a_gone_worker_found_while_the_queue_moves_sends_no_request_twice(room: Room) -> None:
    """Its stream fails, which moves the queue inside the move that found the worker gone."""
    room.worker("gone", capacity=1)
    streaming, sink = room.submit()
    room.frames("gone", (streaming.sid, HEAD, b"x"))
    room.wires.state[b"good#1"] = SendResult.FULL
    room.worker("good", capacity=8, running=5)
    waiting = [room.submit()[0] for _ in range(2)]
    assert [f.lifecycle.phase for f in waiting] == [RequestPhase.QUEUED] * 2
    room.wires.state[b"good#1"] = SendResult.OK
    room.wires.state[b"gone#1"] = SendResult.GONE
    # it has room and the lower load, so the head of the queue is offered to it first
    room.heartbeat("gone", capacity=4)
    assert isinstance(sink.error, EngineFailure)
    assert [f.lifecycle.phase for f in waiting] == [RequestPhase.SENT] * 2 and room.reserved() == {
        "good": 2
    }
    assert [w for w, _ in room.wires.generated()] == ["gone", "good", "good"]


def test_a_worker_whose_link_is_full_keeps_its_lease_and_gets_the_request_later(room: Room) -> None:
    room.worker("w0")
    room.wires.state[b"w0#1"] = SendResult.FULL
    inflight, _ = room.submit()
    assert (
        inflight.lifecycle.phase is RequestPhase.QUEUED
        and room.reserved() == {"w0": 0}
        and len(room.fleet) == 1
    )
    room.wires.state[b"w0#1"] = SendResult.OK
    room.heartbeat("w0")
    assert inflight.lifecycle.phase is RequestPhase.SENT


@pytest.mark.parametrize("seed", range(4))
def test_a_full_link_to_one_worker_does_not_keep_requests_from_another_with_room(
    make_room: MakeRoom, seed: int
) -> None:
    room = make_room(seed=seed)
    room.worker("stuck", capacity=8)
    room.worker("free", capacity=8, running=4)
    room.wires.state[b"stuck#1"] = SendResult.FULL
    inflight, _ = room.submit()
    assert inflight.lifecycle.phase is RequestPhase.SENT and room.reserved() == {
        "stuck": 0,
        "free": 1,
    }


# ---- clients that leave --------------------------------------------------------------------------


def test_to_cancel_a_waiting_request_frees_its_place_and_tells_no_worker(room: Room) -> None:
    inflight, sink = room.submit()
    room.dispatcher.cancel(inflight)
    assert (
        inflight.lifecycle.phase is RequestPhase.ABORTED
        and room.dispatcher.queued("tiny") == 0
        and not room.wires.data
        and not sink.over
    )
    room.worker("w0")
    assert not room.wires.generated() and room.dispatcher.open_requests == 0


@pytest.mark.parametrize("streaming", [False, True])
def test_to_cancel_a_running_request_tells_its_worker_and_frees_the_room(
    room: Room, streaming: bool
) -> None:
    room.worker("w0")
    inflight, sink = room.submit()
    waiting, _ = room.submit()
    sid = inflight.sid
    if streaming:
        room.frames("w0", (sid, HEAD, b"x"))
    room.dispatcher.cancel(inflight)
    assert (
        room.wires.cancelled() == [("w0", sid)]
        and inflight.lifecycle.phase is RequestPhase.ABORTED
        and not sink.over
    )
    assert waiting.lifecycle.phase is RequestPhase.SENT and room.reserved() == {"w0": 1}


def test_to_cancel_twice_or_after_the_end_is_nothing(room: Room) -> None:
    room.worker("w0")
    inflight, _ = room.submit()
    room.frames("w0", (inflight.sid, HEAD | messages.END, b"x"))
    room.dispatcher.cancel(inflight)
    assert inflight.lifecycle.phase is RequestPhase.FINISHED and not room.wires.cancelled()
    other, _ = room.submit()
    room.dispatcher.cancel(other)
    room.dispatcher.cancel(other)
    assert len(room.wires.cancelled()) == 1 and room.dispatcher.open_requests == 0


def test_to_cancel_a_request_that_waits_for_its_second_try_tells_no_worker(room: Room) -> None:
    room.worker("w0")
    inflight, _ = room.submit()
    lose_by_word(room)
    room.dispatcher.cancel(inflight)
    assert (
        inflight.lifecycle.phase is RequestPhase.ABORTED
        and not room.wires.cancelled()
        and room.dispatcher.queued("tiny") == 0
    )


def test_a_client_that_does_not_read_is_cut_off_and_its_worker_told(room: Room) -> None:
    room.worker("w0")
    inflight, sink = room.submit()
    room.frames("w0", (inflight.sid, HEAD, b"x"))
    sink.takes = False
    room.frames("w0", (inflight.sid, 0, b"y"), (inflight.sid, 0, b"z"))
    assert inflight.lifecycle.phase is RequestPhase.ABORTED and room.wires.cancelled()[0] == (
        "w0",
        inflight.sid,
    )
    assert room.counted("loraplex_slow_readers_total") == 1 and room.reserved() == {"w0": 0}


# ---- the end -------------------------------------------------------------------------------------


def test_a_drain_serves_what_is_still_asked_until_its_time_is_over(room: Room) -> None:
    room.worker("w0")
    running, _ = room.submit()
    room.dispatcher.drain()
    assert room.dispatcher.draining
    waiting, _ = room.submit()
    room.frames("w0", (running.sid, HEAD | messages.END, b"x"))
    assert waiting.lifecycle.phase is RequestPhase.SENT and room.dispatcher.open_requests == 1
    room.dispatcher.abort_all()
    assert room.dispatcher.open_requests == 0
    with pytest.raises(WorkerUnavailable):
        room.submit()


def test_when_the_drains_time_is_over_whatever_is_open_ends(room: Room) -> None:
    room.worker("w0", capacity=2)
    sent, streaming = room.submit(), room.submit()
    room.frames("w0", (streaming[0].sid, HEAD, b"x"))
    waiting = [room.submit() for _ in range(3)]
    room.dispatcher.drain()
    room.dispatcher.abort_all()
    for inflight, sink in (sent, streaming, *waiting):
        assert (
            isinstance(sink.error, WorkerUnavailable)
            and inflight.lifecycle.phase is RequestPhase.FAILED
        )
    assert room.dispatcher.open_requests == 0 and room.reserved() == {"w0": 0}
    assert {w for w, _ in room.wires.cancelled()} == {"w0"}


def test_to_abort_all_gives_no_waiting_request_to_a_worker(room: Room) -> None:
    room.worker("w0")
    room.submit()
    room.submit()
    room.dispatcher.drain()
    room.dispatcher.abort_all()
    assert len(room.wires.generated()) == 1


# ---- anything, in any order ----------------------------------------------------------------------

WORKERS = ["w0", "w1", "w2"]
worker_ids = st.sampled_from(WORKERS)


class DispatcherMachine(RuleBasedStateMachine):
    """Clients, workers and the link act in any order. The Sink fails the test if a call is out of
    order or comes twice.
    """

    @initialize(
        max_queued=st.integers(0, 4),
        seed=st.integers(0, 3),
        policy=st.sampled_from(["residency-p2c", *POLICIES]),
    )
    def start(self, max_queued: int, seed: int, policy: str) -> None:
        self.room = Room(max_queued=max_queued, max_requests=12, seed=seed, policy=policy)
        self.requests: list[tuple[InFlightRequest, Kept]] = []
        self.cancelled: set[int] = set()
        self.epoch = dict.fromkeys(WORKERS, 1)
        for worker in WORKERS[:2]:
            self.room.worker(worker, capacity=2)

    @rule(
        adapters=st.lists(
            st.sampled_from([None, PIRATE, AdapterRef("tiny", "haiku", "d")]),
            min_size=1,
            max_size=5,
        )
    )
    def clients_come(self, adapters: list[AdapterRef | None]) -> None:
        for adapter in adapters:
            self.client_comes(adapter)

    def client_comes(self, adapter: AdapterRef | None) -> None:
        inflight, sink = self.room.inflight(adapter)
        before = self.room.dispatcher.open_requests
        try:
            self.room.dispatcher.submit(inflight)
        except Overloaded as exc:
            assert exc.retry_after_s and not sink.over
        else:
            self.requests.append((inflight, sink))
            assert self.room.dispatcher.open_requests <= before + 1

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def client_leaves(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.requests) - 1))
        inflight, _ = self.requests[index]
        if not inflight.lifecycle.over:
            self.cancelled.add(index)
        self.room.dispatcher.cancel(inflight)
        assert inflight.lifecycle.over

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), takes=st.booleans())
    def client_reads_or_does_not(self, data: st.DataObject, takes: bool) -> None:
        data.draw(st.sampled_from(self.requests))[1].takes = takes

    @rule(
        worker=worker_ids,
        capacity=st.integers(0, 3),
        running=st.integers(0, 2),
        state=st.sampled_from([1, 1, 1, 2, 3]),
    )
    def worker_heartbeats(self, worker: str, capacity: int, running: int, state: int) -> None:
        self.room.heartbeat(
            worker, self.epoch[worker], capacity, messages.WorkerState(state), running=running
        )
        if state == 3:
            self.epoch[worker] += 1

    @rule(worker=worker_ids, capacity=st.integers(1, 3))
    def worker_serves(self, worker: str, capacity: int) -> None:
        self.room.heartbeat(worker, self.epoch[worker], capacity)
        self.worker_attaches(worker)

    @rule(worker=worker_ids)
    def worker_attaches(self, worker: str) -> None:
        self.room.wires.state[messages.identity(worker, self.epoch[worker])] = SendResult.OK
        self.room.attach(worker, self.epoch[worker])

    @rule(worker=worker_ids)
    def worker_restarts(self, worker: str) -> None:
        self.epoch[worker] += 1

    @rule(worker=worker_ids, sent=st.sampled_from(list(SendResult)))
    def link_changes(self, worker: str, sent: SendResult) -> None:
        self.room.wires.state[messages.identity(worker, self.epoch[worker])] = sent

    @rule(
        data=st.data(),
        what=st.lists(
            st.sampled_from(["frame", "frame", "end", "end", "refuse", "refuse for good"]),
            min_size=1,
            max_size=5,
        ),
    )
    def worker_answers(self, data: st.DataObject, what: list[str]) -> None:
        """One message about any streams that were ever sent, late and unknown ones too."""
        sent = self.room.wires.generated()
        if not sent:
            return
        live = [m.sid for _, m in sent if self.room.dispatcher._streams.get(m.sid)] or [
            m.sid for _, m in sent
        ]
        step = messages.Step([], [], [])
        ended: set[int] = set()
        for kind in what:
            sid = data.draw(st.sampled_from(live) | st.sampled_from([m.sid for _, m in sent]))
            if sid in ended:
                continue
            inflight = self.room.dispatcher._streams.get(sid)
            begun = inflight is not None and (
                inflight.lifecycle.phase is RequestPhase.STREAMING
                or any(f[0] == sid for f in step.frames)
            )
            if kind.startswith("refuse"):
                step.refused.append(
                    messages.Refused(sid, "worker_unavailable", "no", kind == "refuse")
                )
                ended.add(sid)
            else:
                step.frames.append(
                    (sid, (0 if begun else HEAD) | (messages.END if kind == "end" else 0), b"x")
                )
                if kind == "end":
                    ended.add(sid)
        peer = messages.identity(data.draw(worker_ids), 1)
        self.room.dispatcher.inbox.on_data(peer, messages.encode(step))

    @rule(seconds=st.sampled_from([0.1, LEASE_S, QUEUE_S]))
    def time_passes(self, seconds: float) -> None:
        self.room.now += seconds
        self.room.dispatcher.tick()

    @invariant()
    def the_books_balance(self) -> None:
        if not hasattr(self, "room"):
            return
        room = self.room
        assert not room.counted("loraplex_internal_errors_total") and room.dispatcher.audit()
        open_ = [f for f, _ in self.requests if not f.lifecycle.over]
        assert room.dispatcher.open_requests == len(open_)
        assert room.dispatcher.queued("tiny") == sum(
            f.lifecycle.phase is RequestPhase.QUEUED for f in open_
        )
        on_workers = {f.sid: f for f in open_ if f.lifecycle.phase is not RequestPhase.QUEUED}
        assert room.dispatcher._streams._requests == on_workers
        assert {sid for w in room.fleet for sid in w.reserved} == on_workers.keys()
        sids = [m.sid for _, m in room.wires.generated()]
        assert len(sids) == len(set(sids)) == sum(f.lifecycle.attempts for f, _ in self.requests), (
            "sent twice, or sent and not known"
        )
        for index, (inflight, sink) in enumerate(self.requests):
            assert inflight.lifecycle.attempts <= MAX_ATTEMPTS
            match inflight.lifecycle.phase:
                case RequestPhase.FINISHED:
                    assert sink.ended and sink.error is None
                case RequestPhase.FAILED:
                    assert sink.error is not None
                case RequestPhase.ABORTED:
                    assert not sink.over and (index in self.cancelled or not sink.takes)
                case _:
                    assert not sink.over

    def teardown(self) -> None:
        if not hasattr(self, "room"):
            return
        self.room.dispatcher.drain()
        self.room.dispatcher.abort_all()
        self.the_books_balance()
        assert all(f.lifecycle.over for f, _ in self.requests)
        assert self.room.dispatcher.open_requests == 0
        assert all(not w.reserved for w in self.room.fleet) and len(self.room.queue) == 0


TestDispatcherMachine = DispatcherMachine.TestCase


# ---- while it waits, and when its time is over ---------------------------------------------------


def wait(room: Room, seconds: float) -> None:
    """Time goes by in ticks; workers whose heartbeats come stay."""
    for _ in range(round(seconds / 0.5)):
        room.now += 0.5
        for worker in list(room.fleet):
            room.heartbeat(
                worker.id,
                capacity=worker.heartbeat.capacity,
                adapters=worker.heartbeat.adapters,
                yours=len(worker.reserved),
            )
        room.dispatcher.tick()


def test_a_stream_for_a_model_at_zero_waits_for_a_gpu_and_hears_it(make_room: MakeRoom) -> None:
    room = make_room(keepalive_s=QUEUE_S)
    waits = ModelStatus(wanted=1, max_replicas=2, scales=True, without_gpus=1)
    room.dispatcher.on_scaling({"tiny": waits})
    _, sink = room.submit(streams=True)
    wait(room, 2 * QUEUE_S + 1)
    assert set(sink.comments) == {b": waiting for a free GPU to start a worker\n\n"}
    assert not sink.over


def test_a_queued_stream_hears_where_it_stands_and_one_that_is_no_stream_hears_nothing(
    make_room: MakeRoom,
) -> None:
    room = make_room(keepalive_s=2.0)
    room.worker("w0")
    room.submit()
    _, mute = room.submit()
    _, second = room.submit(streams=True)
    _, third = room.submit(streams=True)
    wait(room, 1.5)
    assert not second.comments, "too early: an error would lose its status"
    wait(room, 3.0)
    assert (
        second.comments == [b": queued, position about 2\n\n"] * 2
        and third.comments == [b": queued, position about 3\n\n"] * 2
    )
    assert not mute.comments


def test_a_stream_hears_that_its_adapter_loads_and_then_that_its_first_token_is_on_its_way(
    make_room: MakeRoom,
) -> None:
    room = make_room(keepalive_s=1.0)
    room.worker("w0")
    _, sink = room.submit(PIRATE, streams=True)
    wait(room, 1.0)
    assert sink.comments == [b": loading adapter pirate\n\n"]
    room.heartbeat(
        "w0",
        adapters=(messages.AdapterState("pirate", "d", messages.Tier.GPU, in_flight=1),),
        yours=1,
    )
    wait(room, 1.0)
    assert sink.comments[1:] == [b": waiting for the first token\n\n"]


def test_nobody_hears_anything_after_the_first_frame_or_the_end(make_room: MakeRoom) -> None:
    room = make_room(keepalive_s=1.0)
    room.worker("w0", capacity=3)
    streaming, first = room.submit(streams=True)
    ended, second = room.submit(streams=True)
    left, third = room.submit(streams=True)
    room.frames("w0", (streaming.sid, HEAD, b"x"), (ended.sid, HEAD | messages.END, b"y"))
    room.dispatcher.cancel(left)
    wait(room, 5.0)
    assert not first.comments and not second.comments and not third.comments
    assert len(room.dispatcher._keepalive) == 0


def test_a_stream_that_is_given_back_hears_that_it_is_queued_again(make_room: MakeRoom) -> None:
    room = make_room(keepalive_s=1.0)
    room.worker("w0")
    inflight, sink = room.submit(streams=True)
    room.refuse("w0", inflight.sid)  # and w0 is asked again, as nobody else is there
    lose_by_word(room)
    wait(room, 1.0)
    assert sink.comments == [b": queued, position about 1\n\n"]


def test_a_queued_request_whose_time_is_over_leaves_the_queue_at_once(room: Room) -> None:
    room.worker("w0")
    room.submit()
    inflight, sink = room.submit()
    room.dispatcher.give_up(inflight, DeadlineExceeded("late"))
    assert (
        isinstance(sink.error, DeadlineExceeded)
        and room.dispatcher.queued("tiny") == 0
        and inflight.lifecycle.phase is RequestPhase.FAILED
    )
    room.dispatcher.give_up(inflight, DeadlineExceeded("again"))
    assert sink.error.message == "late" and not room.wires.cancelled()


def test_a_request_on_a_worker_whose_time_is_over_frees_its_place_and_the_worker_is_told(
    room: Room,
) -> None:
    room.worker("w0")
    inflight, sink = room.submit()
    waiting, _ = room.submit()
    room.dispatcher.give_up(inflight, DeadlineExceeded("late"))
    assert isinstance(sink.error, DeadlineExceeded) and room.wires.cancelled() == [
        ("w0", inflight.sid)
    ]
    assert waiting.lifecycle.phase is RequestPhase.SENT and room.reserved() == {"w0": 1}
    assert room.counted("loraplex_requests_total", base="tiny", outcome="failed") == 1


def test_nothing_is_heard_any_more_of_a_worker_that_fell_silent(room: Room) -> None:
    room.worker("w0", capacity=2)
    room.submit()
    room.now += LEASE_S
    room.dispatcher.tick()
    assert room.wires.forgotten == [messages.identity("w0", 1)]


def test_a_worker_that_stops_is_forgotten_after_the_frames_that_came_before(room: Room) -> None:
    room.worker("w0", capacity=2)
    request, sink = room.submit()
    room.frames("w0", (request.sid, HEAD, b"a"), (request.sid, messages.END, b"b"))
    peer = messages.identity("w0", 1)
    room.dispatcher.inbox.on_data(peer, messages.encode(messages.Stopped("w0", 1, "told to")))
    assert sink.ended and sink.error is None and room.wires.forgotten == [peer]
    assert len(room.fleet) == 0


def test_requests_go_elsewhere_while_a_workers_data_connection_does_not_carry_and_then_come_back(
    room: Room,
) -> None:
    peer = messages.identity("w0", 1)
    room.worker("w0", capacity=9)
    room.dispatcher.inbox.on_link(peer, carries=False, heard=True)
    room.submit()
    assert not room.wires.generated() and room.dispatcher.queued("tiny") == 1
    room.worker("w1", capacity=1)
    assert [worker for worker, _ in room.wires.generated()] == ["w1"]
    room.submit()
    room.dispatcher.inbox.on_link(peer, carries=True, heard=True)
    assert [worker for worker, _ in room.wires.generated()] == ["w1", "w0"]
