"""What workers died of is refused for a while, by every process, for its tenant alone."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest

from gateway.dispatch.deadly.death_table import KEPT_S, MAX_ROWS, PLACES, Died
from gateway.dispatch.deadly.requests import NO_SUSPICION, SAMPLE_BYTES, DeadlyRequests, Suspicion
from gateway.dispatch.lifecycle import DEADLY
from gateway.dispatch.request import InFlightRequest, Requester
from shared.errors import ConfigError, EngineFailure, LoraplexError, WorkersDied
from shared.link import messages
from shared.link.token_ids import pack
from tests.unit.gateway.dispatch.test_dispatcher import HEAD, PIRATE, Kept, Room

WHOLE = 200 << messages.STATUS_SHIFT


def asked(
    body: bytes = b"{}",
    tenant: str = "a",
    path: str = "/v1/completions",
    *,
    deaths: int = DEADLY,
    begun: bool = False,
) -> InFlightRequest:
    request, _ = Room().inflight(PIRATE)
    made = msgspec.structs.replace(request.client_request, body=body, path=path)
    request = InFlightRequest(made, request.model, Kept(), Requester(tenant))
    request.lifecycle.deaths, request.t_head = deaths, float(begun)
    return request


def refused(deadly: DeadlyRequests, request: InFlightRequest, now: float) -> bool:
    return deadly.deadly(request, now)


def test_the_same_request_is_refused_until_its_time_is_over() -> None:
    deadly = DeadlyRequests()
    assert not refused(deadly, asked(), 0.0)
    deadly.note(asked(), 10.0, ended=True)
    with pytest.raises(WorkersDied) as refusal:
        deadly.recall(asked(deaths=0), 9.9 + KEPT_S)
    assert isinstance(refusal.value, EngineFailure) and refusal.value.status == 500
    assert not refused(deadly, asked(), 10.1 + KEPT_S)


@pytest.mark.parametrize(
    "other", [asked(b"[]"), asked(tenant="b"), asked(path="/v1/chat/completions")]
)
def test_other_requests_are_not_refused(other: InFlightRequest) -> None:
    deadly = DeadlyRequests()
    deadly.note(asked(), 10.0, ended=True)
    assert deadly.of(other, 11.0) is None


def test_what_one_process_has_seen_the_others_know_at_once_and_so_does_one_that_starts(
    tmp_path: Path,
) -> None:
    one, another = (DeadlyRequests(tmp_path / "d", alone=False) for _ in range(2))
    assert another.of(asked(), 9.0) is None
    one.note(asked(deaths=1, begun=True), 10.0, ended=True)
    assert another.of(asked(), 11.0) == Died(1, True)
    another.note(asked(), 12.0, ended=True)
    assert refused(one, asked(), 13.0)
    one.close()
    another.close()
    assert refused(DeadlyRequests(tmp_path / "d", now=14.0), asked(), 14.0)


def test_the_file_holds_no_word_of_the_request_and_is_read_by_its_user_alone(
    tmp_path: Path,
) -> None:
    DeadlyRequests(tmp_path / "d").note(asked(b"the prompt", "the tenant"), 10.0, ended=True)
    held = (tmp_path / "d").read_bytes()
    assert any(held) and b"prompt" not in held and b"tenant" not in held
    assert (tmp_path / "d").stat().st_mode & 0o77 == 0


def test_what_was_remembered_before_the_machine_started_is_forgotten(tmp_path: Path) -> None:
    DeadlyRequests(tmp_path / "d", now=1e6).note(asked(), 1e6, ended=True)
    assert DeadlyRequests(tmp_path / "d", now=5.0).of(asked(), 5.0) is None


def test_a_file_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        DeadlyRequests(tmp_path / "nowhere" / "d")


def test_a_request_that_has_cost_less_is_counted_on_when_it_comes_again_and_not_refused() -> None:
    deadly, again = DeadlyRequests(), asked(deaths=0)
    deadly.note(asked(deaths=2, begun=True), 10.0, ended=True)
    deadly.recall(again, 11.0)
    assert again.lifecycle.deaths == 2 and again.lifecycle.to_its_end
    deadly.note(asked(), 12.0, ended=True)
    deadly.note(asked(deaths=1), 13.0, ended=True)
    with pytest.raises(WorkersDied):
        deadly.recall(asked(deaths=0), 14.0)


def test_a_request_that_got_further_is_forgotten_and_no_other_one_is() -> None:
    deadly = DeadlyRequests()
    deadly.forget(asked(), 11.0)
    for body in (b"{}", b"[]"):
        deadly.note(asked(body), 10.0, ended=True)
    deadly.forget(asked(), 11.0)
    assert deadly.of(asked(), 11.0) is None
    assert refused(deadly, asked(b"[]"), 11.0)


def test_a_bounded_number_is_remembered_and_the_oldest_gives_way() -> None:
    deadly = DeadlyRequests()
    for n in range(PLACES + 1):
        deadly.note(asked(b"%02d" % n), 10.0 + n, ended=True)
    now = 11.0 + PLACES
    assert deadly.of(asked(b"00"), now) is None
    assert all(refused(deadly, asked(b"%02d" % n), now) for n in range(1, PLACES + 1))
    for n in range(2 * MAX_ROWS):
        deadly.note(asked(b"x" * n), now, ended=True)
    assert sum(refused(deadly, asked(b"x" * n), now) for n in range(2500)) <= 1024


def test_a_deadly_request_is_remembered_before_many_that_waited_after_one_death() -> None:
    deadly = DeadlyRequests()
    deadly.note(asked(b"00"), 10.0, ended=True)
    for n in range(1, 3 * PLACES):
        deadly.note(asked(b"%02d" % n, deaths=1), 10.0 + n, ended=True)
    assert refused(deadly, asked(b"00"), 11.0 + 3 * PLACES)
    deadly.note(asked(b"99", deaths=1), 10.0 + 2 * KEPT_S, ended=True)
    assert deadly.of(asked(b"99"), 11.0 + 2 * KEPT_S) == Died(1), "what is over gives way"


class Unread:
    """A body of five bytes that nobody can digest."""

    def __len__(self) -> int:
        return 5


def test_a_request_of_another_length_is_never_digested() -> None:
    deadly, other = DeadlyRequests(), asked(Unread())  # type: ignore[arg-type]
    deadly.note(asked(b"123456"), 10.0, ended=True)
    assert deadly.of(other, 11.0) is None
    deadly.note(asked(b"12345"), 10.0, ended=True)
    with pytest.raises(TypeError):
        deadly.of(other, 11.0)


def test_of_long_bodies_both_ends_and_the_length_are_compared() -> None:
    deadly, end = DeadlyRequests(), b"x" * SAMPLE_BYTES
    long = end + b"1" * 10_000_000 + end
    deadly.note(asked(long), 10.0, ended=True)
    assert refused(deadly, asked(bytes(bytearray(long))), 11.0)
    for other in (b"y" + long[1:], long[:-1] + b"y", long + b"x"):
        assert not refused(deadly, asked(other), 11.0)
    begun = time.thread_time()
    for _ in range(100):
        deadly.of(asked(long), 11.0)
    assert time.thread_time() - begun < 1.0  # the whole takes 5 ms, and both ends 0.1


# ---- what the dispatcher makes of it -------------------------------------------------------------


def again(room: Room) -> None:
    room.dispatcher.check_deadly(room.inflight()[0])


def test_the_second_death_of_a_request_alone_is_the_last_one_and_the_first_is_not() -> None:
    room = Room()
    room.worker("w0")
    room.submit()
    room.dies("w0")
    again(room)
    room.worker("w1")
    room.dies("w1")
    with pytest.raises(WorkersDied):
        again(room)


def test_a_client_that_leaves_while_it_waits_and_asks_again_does_not_start_anew() -> None:
    room = Room()
    room.worker("w0")
    request, _ = room.submit()
    room.dies("w0")
    room.dispatcher.cancel(request)
    request, sink = room.inflight()
    room.dispatcher.check_deadly(request)
    room.dispatcher.submit(request)
    room.worker("w1")
    room.dies("w1")
    assert isinstance(sink.error, EngineFailure)


def test_a_stream_that_cannot_move_is_refused_after_the_third_worker() -> None:
    room = Room()
    for n in range(DEADLY):
        again(room)
        room.worker(f"w{n}")
        request, _ = room.inflight(streams=True)
        room.dispatcher.check_deadly(request)
        room.dispatcher.submit(request)
        room.frames(f"w{n}", (request.sid, HEAD, b"a"))
        room.dies(f"w{n}")
    with pytest.raises(WorkersDied):
        again(room)


def test_a_client_that_asks_again_the_moment_it_hears_of_a_death_is_counted_on() -> None:
    room = Room()
    known = list[int]()

    class AsksAgain(Kept):
        def fail(self, error: LoraplexError) -> None:
            super().fail(error)
            copy, _ = room.inflight(streams=True)
            room.dispatcher.check_deadly(copy)
            known.append(copy.lifecycle.deaths)

    room.worker("w0")
    request, _ = room.inflight(streams=True)
    request.sink = AsksAgain()
    room.dispatcher.submit(request)
    room.frames("w0", (request.sid, HEAD, b"a"))
    room.dies("w0")
    assert known == [1]


def test_a_stream_that_could_not_move_and_is_served_when_it_comes_again_is_forgotten() -> None:
    room = Room()
    for n in range(2 * DEADLY):
        room.worker(f"w{n}")
        request, sink = room.inflight(streams=True)
        room.dispatcher.check_deadly(request)
        room.dispatcher.submit(request)
        room.frames(f"w{n}", (request.sid, HEAD, b"a"))
        if n % 2:
            room.frames(f"w{n}", (request.sid, messages.END, b"b"))
            assert sink.ended
        room.dies(f"w{n}")
    again(room)


def test_a_whole_answer_that_makes_progress_is_forgotten_as_a_stream_is() -> None:
    room = Room()
    room.worker("w0")
    request, _ = room.submit(movable=True)
    room.dies("w0")
    room.dispatcher.cancel(request)
    for n in range(1, 2 * DEADLY):
        room.worker(f"w{n}")
        request, sink = room.inflight(movable=True)
        room.dispatcher.check_deadly(request)
        assert request.lifecycle.deaths == (n == 1)
        room.dispatcher.submit(request)
        room.frames(f"w{n}", (request.sid, messages.TOKENS, b"", pack((n,))))
        room.frames(f"w{n}", (request.sid, messages.END | WHOLE, b"x"))
        assert sink.ended
        room.dies(f"w{n}")


def test_a_copy_that_waits_in_the_queue_gets_no_worker_once_another_copy_was_deadly() -> None:
    room = Room()
    room.worker("w0")
    room.submit()
    _, waiting = room.submit()
    room.dies("w0")
    room.worker("w1")
    room.dies("w1")
    room.worker("w2")
    assert isinstance(waiting.error, WorkersDied) and len(room.wires.generated()) == 2


def test_a_copy_on_a_worker_that_dies_after_another_copy_was_deadly_gets_no_other_one() -> None:
    room = Room()
    for n in range(2):
        room.worker(f"w{n}")
    room.submit()
    _, late = room.submit()
    first, second = (worker for worker, _ in room.wires.generated())
    room.worker("w2")
    room.dies(first)
    room.dies("w2")
    room.worker("w3")
    room.dies(second)
    assert isinstance(late.error, EngineFailure) and len(room.wires.generated()) == 3


def test_what_was_served_meanwhile_is_not_suspected_any_more() -> None:
    """As a short prompt that many send is on many workers, of which one is broken."""
    room = Room()
    room.worker("w0")
    served, _ = room.submit()
    room.worker("w1")
    request, _ = room.submit()
    room.dies("w1")
    room.dispatcher.cancel(request)
    copy, _ = room.inflight()
    room.dispatcher.check_deadly(copy)
    assert copy.lifecycle.deaths == 1
    room.frames("w0", (served.sid, messages.END | HEAD, b"a"))
    copy, _ = room.inflight()
    room.dispatcher.check_deadly(copy)
    assert copy.lifecycle.deaths == 0


def suspicion_of_a_copy(room: Room) -> Suspicion:
    """Of a new one. It is not counted with the others."""
    copy, _ = room.inflight(movable=True)
    room.dispatcher.check_deadly(copy)
    assert copy.lifecycle.deaths == 0
    return room.dispatcher._deadly.suspicion(copy, room.now)


def test_a_copy_of_what_a_worker_died_of_is_kept_from_trials_and_not_counted_with_it() -> None:
    room = Room()
    room.worker("w0")
    for _ in range(2 * DEADLY):
        room.submit(movable=True)
    assert suspicion_of_a_copy(room) == NO_SUSPICION
    room.dies("w0")
    assert suspicion_of_a_copy(room) == Suspicion(1)


def test_a_copy_of_what_died_in_the_middle_is_kept_from_trials_to_its_end() -> None:
    room = Room()
    room.worker("w0")
    request, _ = room.inflight(streams=True, movable=True)
    room.dispatcher.submit(request)
    room.frames("w0", (request.sid, HEAD, b"a", pack((1,))))
    room.dies("w0")
    assert suspicion_of_a_copy(room) == Suspicion(1, to_its_end=True)


def test_many_that_ask_the_same_and_lose_a_worker_each_are_not_deadly_together() -> None:
    room = Room(deadly=DeadlyRequests(alone=False))
    for n in range(4 * DEADLY):
        room.worker(f"w{n}")
        request, sink = room.submit(movable=True)
        assert request.peer == f"w{n}#1".encode()
        room.heartbeat(f"w{n}", running=1)
    for n in range(4 * DEADLY):
        room.dies(f"w{n}")
    assert sink.error is None and room.dispatcher.open_requests == 4 * DEADLY
