"""One request that kills its workers among fifty that do not, in many random fleets with one or
several gateway processes, of one machine or of several. Its clients ask again and again, one after
the other or at the same time.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from gateway.dispatch.deadly.requests import DeadlyRequests
from gateway.dispatch.lifecycle import DEADLY
from gateway.dispatch.request import InFlightRequest
from shared.errors import LoraplexError, OnTrial, WorkersDied
from shared.link import messages
from shared.link.token_ids import BYTES_PER_TOKEN, pack
from tests.unit.gateway.dispatch.test_dispatcher import HEAD, Kept, Room
from worker.requests.trials import OpenTrials, Trial

SEEDS = 20
BYSTANDERS = 50
LENGTH = 12
ASKED_AGAIN = 12
TURN_S = 0.02
MAX_TURNS = 4000
WHOLE = 200 << messages.STATUS_SHIFT


@dataclass
class Attempt:
    """A request on a worker: how many of its tokens the client has."""

    number: int
    room: Room
    request: messages.Generate
    position: int
    begun: bool = False
    trial: Trial | None = None


@dataclass
class Played:
    """A worker that the fleet plays. `back_at`: the turn in which it serves again."""

    name: str
    epoch: int = 1
    back_at: int = 0
    up: bool = False
    attempts: list[Attempt] = field(default_factory=list)
    trials: OpenTrials = field(default_factory=OpenTrials)


@dataclass(frozen=True)
class Clients:
    """How many gateway processes there are, on how many machines, and how many copies of the deadly
    request are under way at once.
    """

    processes: int = 1
    machines: int = 1
    copies: int = 1
    alike: bool = False
    """Whether all bystanders of a kind ask the same, as probes do."""


class DeadlyFleet:
    """`kills_at`: at which token the deadly request kills its worker. Each gateway process is a
    Room, and all of them have the same workers. Those of one machine share a file.
    """

    def __init__(self, folder: Path, seed: int, clients: Clients, **kind: bool) -> None:
        self.dice = dice = random.Random(seed)
        self.copies, self.alike = clients.copies, clients.alike
        self.known = [
            DeadlyRequests(
                folder / f"deadly-{seed}-{n % clients.machines}",
                alone=clients.processes == 1,
                now=100.0,
            )
            for n in range(clients.processes)
        ]
        self.rooms = [
            Room(200, seed=seed + n, deadly=deadly) for n, deadly in enumerate(self.known)
        ]
        self.seen = dict.fromkeys(range(clients.processes), 0)
        self.workers = [Played(f"w{n}") for n in range(dice.randint(1, 6))]
        self.kills_at = dice.randint(1, 4) if kind["begun"] else 0
        self.streams, self.movable = kind["streams"], kind["movable"]
        self.boot = dice.randint(1, 30)
        self.deaths, self.turn = 0, 0
        self.numbers = itertools.count()
        self.asked = 0
        self.deadly: list[Kept] = []
        self.refused = 0

    def ask(self, room: Room, body: bytes, *, streams: bool, movable: bool) -> Kept:
        request, sink = room.inflight(streams=streams, movable=movable)
        asked = msgspec.structs.replace(request.client_request, body=body)
        request = InFlightRequest(asked, request.model, sink)
        room.dispatcher.check_deadly(request)
        room.dispatcher.submit(request)
        return sink

    def ask_deadly(self) -> None:
        """Again, as soon as an answer has come, at any process."""
        self.deadly = [sink for sink in self.deadly if not sink.over]
        while len(self.deadly) < self.copies and self.asked < ASKED_AGAIN:
            self.asked += 1
            room = self.dice.choice(self.rooms)
            try:
                sink = self.ask(room, b"deadly", streams=self.streams, movable=self.movable)
                self.deadly.append(sink)
            except WorkersDied:
                self.refused += 1

    def play(self) -> None:
        self.turn += 1
        for worker in self.workers:
            if not worker.up and self.turn >= worker.back_at:
                worker.up = True
                for room in self.rooms:
                    room.worker(worker.name, worker.epoch, capacity=64)
        for n, room in enumerate(self.rooms):
            room.now += TURN_S
            self._collect(n, room)
        for worker in self.dice.sample(self.workers, self.dice.randint(0, len(self.workers))):
            if worker.up:
                self._step(worker)
        for room in self.rooms:
            for worker in self.workers:
                if worker.up:
                    room.heartbeat(worker.name, worker.epoch, 64)
            room.dispatcher.tick()

    def _collect(self, n: int, room: Room) -> None:
        new, self.seen[n] = room.wires.data[self.seen[n] :], len(room.wires.data)
        for name, message in new:
            worker = next(w for w in self.workers if w.name == name)
            if isinstance(message, messages.KnownDeaths) and worker.up:
                for other in self.rooms:
                    if other is not room:
                        peer = messages.identity(worker.name, worker.epoch)
                        other.dispatcher.inbox.on_data(peer, messages.encode(message))
            if isinstance(message, messages.Generate) and self._lives_there(room, worker, message):
                self._take(room, worker, message)

    def _take(self, room: Room, worker: Played, message: messages.Generate) -> None:
        """As a worker does it (see RequestTable)."""
        if not worker.trials.admits(message.body, message.deaths):
            room.refuse(worker.name, message.sid, OnTrial.code, epoch=worker.epoch)
            return
        seen = b"" if message.resume is None else message.resume.tokens
        attempt = Attempt(next(self.numbers), room, message, len(seen) // BYTES_PER_TOKEN)
        if message.deaths:
            attempt.trial = worker.trials.begin(
                attempt.number, message.body, message.deaths, message.to_its_end
            )
            room.frames(worker.name, (message.sid, messages.TAKEN, b""), epoch=worker.epoch)
        worker.attempts.append(attempt)

    def _lives_there(self, room: Room, worker: Played, message: messages.Generate) -> bool:
        found = room.fleet.get(worker.name)
        return found is not None and message.sid in found.reserved

    def _step(self, worker: Played) -> None:
        """Some of its requests move by one token. The frames before the deadly one's still come."""
        for attempt in self.dice.sample(worker.attempts, len(worker.attempts)):
            deadly = attempt.request.body == b"deadly"
            if self.dice.random() < (0.2 if deadly else 0.5):
                continue
            if deadly and attempt.position == self.kills_at:
                self._die(worker)
                return
            self._move(worker, attempt)

    def _move(self, worker: Played, attempt: Attempt) -> None:
        token = pack((attempt.position,)) if attempt.request.movable else b""
        attempt.position += 1
        last = attempt.position == LENGTH
        flags = messages.END if last else 0
        if b"whole" in attempt.request.body:
            flags = flags | WHOLE if last else messages.TOKENS
        elif not attempt.begun:
            flags |= HEAD
        if last:
            worker.attempts.remove(attempt)
            worker.trials.end(attempt.number)
        elif flags == messages.TOKENS and not token:
            return  # of a whole answer that is not to move nothing is told before its end
        attempt.begun = True
        if attempt.trial is not None:
            attempt.trial.progressed()
        frame = (attempt.request.sid, flags, b"x", token)
        attempt.room.frames(worker.name, frame, epoch=worker.epoch)

    def _die(self, worker: Played) -> None:
        self.deaths += 1
        worker.up, worker.attempts, worker.trials = False, [], OpenTrials()
        worker.back_at = self.turn + self.boot
        for room in self.dice.sample(self.rooms, len(self.rooms)):
            room.heartbeat(worker.name, worker.epoch, state=messages.WorkerState.STOPPED)
        worker.epoch += 1


@dataclass
class Bystander:
    """A client that asks for an answer, and again if the answer broke off where it cannot move."""

    body: bytes
    streams: bool
    movable: bool
    sink: Kept

    @property
    def over(self) -> bool:
        return self.sink.over and not self.broke_off

    @property
    def broke_off(self) -> bool:
        error = self.sink.error
        return error is not None and error.message.endswith("cannot be continued elsewhere: off.")


def ask_beside(fleet: DeadlyFleet, beside: list[Bystander]) -> None:
    """Some new ones, of all kinds. Raises WorkersDied if one is refused.

    With one worker all can move: else fifty whole answers would wait for their trials, each to the
    end of the one before, for longer than the queue allows.
    """
    dice, one_worker = fleet.dice, len(fleet.workers) == 1
    for _ in range(min(dice.randint(0, 8), BYSTANDERS - len(beside))):
        streams, movable = dice.random() < 0.6, one_worker or dice.random() < 0.7
        kind = b"stream" if streams else b"whole"
        body = kind if fleet.alike else b"%s %d" % (kind, len(beside))
        sink = fleet.ask(dice.choice(fleet.rooms), body, streams=streams, movable=movable)
        beside.append(Bystander(body, streams, movable, sink))
    for one in beside:
        if one.broke_off and not one.movable:
            room = dice.choice(fleet.rooms)
            one.sink = fleet.ask(room, one.body, streams=one.streams, movable=one.movable)


KINDS = {
    "before it answers": {"begun": False, "streams": False, "movable": False},
    "in a stream": {"begun": True, "streams": True, "movable": True},
    "in a stream that cannot move": {"begun": True, "streams": True, "movable": False},
}


def play_to_the_end(fleet: DeadlyFleet) -> list[LoraplexError]:
    """The errors of the bystanders."""
    fleet.play()
    beside: list[Bystander] = []
    while len(beside) < BYSTANDERS or not all(one.over for one in beside):
        assert fleet.turn < MAX_TURNS
        ask_beside(fleet, beside)
        if len(beside) > BYSTANDERS // 3:
            fleet.ask_deadly()
        fleet.play()
    while fleet.asked < ASKED_AGAIN or fleet.deadly:
        assert fleet.turn < MAX_TURNS
        fleet.ask_deadly()
        fleet.play()
    for known in fleet.known:
        known.close()
    return [error for one in beside if (error := one.sink.error) and not one.broke_off]


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("processes", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_it_costs_three_workers_however_often_it_is_asked_and_every_bystander_is_served(
    tmp_path: Path, kind: str, processes: int, alike: bool
) -> None:
    for seed in range(SEEDS):
        fleet = DeadlyFleet(tmp_path, seed, Clients(processes, alike=alike), **KINDS[kind])
        assert play_to_the_end(fleet) == [], seed
        assert fleet.deaths <= DEADLY and fleet.refused >= ASKED_AGAIN - DEADLY


@pytest.mark.parametrize(
    "clients",
    [
        Clients(copies=3),
        Clients(4, copies=3, alike=True),
        Clients(4, 4),
        Clients(4, 4, copies=3),
    ],
    ids=["3 copies", "4 processes, 3 copies", "4 machines", "4 machines, 3 copies"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_other_machines_cost_more_workers_and_hardly_a_bystander(
    tmp_path: Path, kind: str, clients: Clients
) -> None:
    """Each copy may cost as many workers as one request alone, until one of them is found out. So
    may the news that is on its way to another machine.
    """
    failed: list[LoraplexError] = []
    for seed in range(SEEDS):
        fleet = DeadlyFleet(tmp_path, seed, clients, **KINDS[kind])
        failed += play_to_the_end(fleet)
        assert fleet.deaths <= DEADLY * (clients.copies + (clients.machines > 1))
    most = 2 if clients.machines > 1 and clients.copies > 1 else 0
    assert len(failed) <= most
