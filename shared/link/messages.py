"""Pure. Every message between gateways and workers, and between workers: ids, structs, one union
and one typed decoder per direction and socket.

Control (heartbeats, commands) and data (requests, frames) use separate sockets. Rules for change:
new fields last, with defaults; unknown trailing fields are ignored by older peers; PROTOCOL_VERSION
rises only when an old peer would misunderstand.
"""

from __future__ import annotations

import functools
import hashlib
from enum import IntEnum
from typing import TypeAlias

import msgspec

from shared.adapters.identity import AdapterRef, StoredAdapter

PROTOCOL_VERSION = 3

WorkerId: TypeAlias = str
"""Chosen by whoever starts the worker; unique among live workers. A restarted worker may reuse it
with a new epoch.
"""
StreamId: TypeAlias = int
"""One attempt of one request on one worker, unique within a gateway process; a retried request gets
a new one, so late frames find nobody.
"""


class WorkerState(IntEnum):
    JOINING = 0  # the engine boots
    SERVING = 1
    DRAINING = 2  # the worker finishes the requests it has and takes no new ones
    STOPPED = 3  # the last state that a worker of this epoch reports


class Tier(IntEnum):
    """Where an adapter's weights are, nearest first."""

    GPU = 0
    CPU = 1
    DISK = 2
    REMOTE = 3


class AdapterState(msgspec.Struct, frozen=True, array_like=True):
    """One adapter on one worker. While `loading`, `tier` is where it still comes from and `eta_s`
    the seconds until it is in a slot.

    `steady`: of all gateways together it gets at least STEADY_PER_S requests a second.
    """

    name: str
    digest: str
    tier: Tier
    loading: bool = False
    eta_s: float = 0.0
    in_flight: int = 0
    rank: int = 0
    size_bytes: int = 0
    pinned: bool = False
    steady: bool = False


SLOT_NEEDED, MEMORY_NEEDED = "gpu:slot_needed", "cpu:memory_needed"
ASKED_OF_GPU, ASKED_OF_CPU = "gpu:asked", "cpu:asked"
EVICTIONS = (SLOT_NEEDED, MEMORY_NEEDED, ASKED_OF_GPU, ASKED_OF_CPU)
"""Why an adapter left a tier: others needed the room, or an operator or a new version asked."""

STEADY_PER_S = 1.0
"""Requests a second from which on an adapter is in steady use. Half of it costs capacity: in the
simulator (`default`, 85 requests/s, 4 seeds) p99 TTFT is 162 ms without any such rule, 167 ms with
this, 194 ms with 0.5.
"""
STEADY_SHARE = 0.25
"""Of the slots: while adapters in steady use have no more, those who have waited too long take
other slots than theirs. In the simulator with twice the load that 2 workers of 8 slots can serve
(64 adapters, Zipf 1.0) Jain's index of what is served within 10 s is 0.91 if nobody is spared, 0.66
to 0.84 with a quarter, and 0.32 to 0.48 with half of the slots.
"""


# ---- worker -> gateway, control ------------------------------------------------------------------


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """A full snapshot of one worker for one gateway. Losing any one is harmless.

    Identity: `epoch` grows with every start of the worker, `seq` with every heartbeat of the epoch.
    `reason` says why the worker is in its `state`, where there is something to say.

    Load: `running` and `waiting` count the requests of all gateways. `yours` counts those of the
    receiving gateway alone, and `acked` is the highest stream id received from it.

    Measured times, in seconds, 0 where nothing was measured yet: `load_s` is a whole load from
    disk: the files are checked and prepared beside the engine, then put into a slot. `stall_s` is
    the part of a load for which the engine stands still; it is measured over loads from disk and
    from host memory alike. `load_bytes` is the mean size of the adapters that `stall_s` was
    measured on. `fetch_s` is a fetch from the store to disk.

    Files: workers with the same `host` share one disk cache. Workers of other hosts get files from
    it at `peer_endpoint`; an empty one means that this worker gives none.

    `suspect`: why the worker should get nothing new for now (its engine makes no progress); empty
    while all is well.

    Model: `tasks` are what it can do, in vLLM's words (empty: not known yet), and `max_model_len`
    its context in tokens.

    Since the worker's start: `adapter_loads` into a slot, by the tier that the adapter came from;
    `adapter_evictions` by `tier:reason`.
    """

    worker: WorkerId
    epoch: int
    seq: int
    base: str
    state: WorkerState
    capacity: int = 0
    slots: int = 0
    running: int = 0
    waiting: int = 0
    yours: int = 0
    acked: StreamId = 0
    waiting_tokens: int = 0
    kv_usage: float = 0.0
    adapters: tuple[AdapterState, ...] = ()
    prefill_tokens_per_s: float = 0.0
    step_s: float = 0.0
    load_s: float = 0.0
    stall_s: float = 0.0
    load_bytes: int = 0
    reason: str = ""
    protocol: int = PROTOCOL_VERSION
    fetch_s: float = 0.0
    host: str = ""
    peer_endpoint: str = ""
    suspect: str = ""
    tasks: tuple[str, ...] = ()
    max_model_len: int = 0
    adapter_loads: dict[str, int] = {}
    adapter_evictions: dict[str, int] = {}


WorkerControl: TypeAlias = Heartbeat

# ---- gateway -> worker, control ------------------------------------------------------------------


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """The answer to a worker's first heartbeat. Requests will come from `data_endpoint`. The worker
    takes a gateway for lost that is silent for `lease_s`. `heartbeat_s` is the gateway's own
    interval. All data goes by `channel`; a worker that is on another one drops what it has of it,
    since no gateway waits for that.
    """

    gateway: str
    data_endpoint: str
    lease_s: float
    heartbeat_s: float
    protocol: int = PROTOCOL_VERSION
    channel: int = 0


class Alive(msgspec.Struct, frozen=True, tag="alive"):
    """The gateway's own heartbeat: a worker that hears none for `lease_s` aborts that gateway's
    requests.
    """

    gateway: str


class Farewell(msgspec.Struct, frozen=True, tag="farewell"):
    """The gateway ends; its requests are over."""

    gateway: str


GatewayControl: TypeAlias = Welcome | Alive | Farewell

# ---- gateway -> worker, data ---------------------------------------------------------------------


class Resume(msgspec.Struct, frozen=True, array_like=True):
    """Where an answer goes on. `tokens` are those that the client has seen (see token_ids.py): they
    are rendered again, and nothing of that is sent.
    """

    tokens: bytes


class Generate(msgspec.Struct, frozen=True, tag="generate", array_like=True):
    """One request. `body` is the client's JSON as it came; `adapter` is the version resolved for
    it, `stored` its files where the worker may need them, `peers` the peer endpoints of workers
    that have those files or are fetching them. `model` is what the client called it, where that is
    not `base:name`: the answer says so too. `owner` stands for the account in the ids of answers
    that are kept (see `kept_id`).

    `created` is the time, in seconds since 1970, that the answer carries, the same at every
    attempt; 0: the worker's. `movable`: the gateway wants the answer's tokens beside its bytes, so
    that it can have it continued elsewhere. `resume`: it has begun on another worker.
    """

    sid: StreamId
    path: str
    request_id: str
    body: bytes
    adapter: AdapterRef | None = None
    stored: StoredAdapter | None = None
    peers: tuple[str, ...] = ()
    model: str = ""
    created: int = 0
    movable: bool = False
    resume: Resume | None = None
    method: str = "POST"
    content_type: str = "application/json"
    owner: str = ""


class Cancel(msgspec.Struct, frozen=True, tag="cancel", array_like=True):
    sid: StreamId


class Prefetch(msgspec.Struct, frozen=True, tag="prefetch", array_like=True):
    """Load the adapter into a free slot before anybody asks for it; a worker without a free slot
    ignores it.
    """

    adapter: AdapterRef


class AdapterAction(IntEnum):
    """What an operator, or a new version, asks of a worker for one adapter."""

    CACHE = 0  # onto the disk, validated
    LOAD = 1  # into a slot, where the least recently used idle adapter makes room
    PIN = 2  # as LOAD, and it never makes room for another one
    UNPIN = 3
    EVICT = 4  # out of the engine, as soon as its requests have ended


class AdapterCommand(msgspec.Struct, frozen=True, tag="command", array_like=True):
    """Answered with a `Done` of the same stream id once it is so, or with a `Refused`."""

    sid: StreamId
    action: AdapterAction
    adapter: AdapterRef
    stored: StoredAdapter | None = None
    peers: tuple[str, ...] = ()


class DrainWorker(msgspec.Struct, frozen=True, tag="drain", array_like=True):
    """Take no more requests, give back those that have not ended within `wait_s`, and end. Whoever
    started the worker starts the next one.
    """

    wait_s: float
    reason: str


GatewayData: TypeAlias = Generate | Cancel | Prefetch | AdapterCommand | DrainWorker

# ---- worker -> gateway, data ---------------------------------------------------------------------

END = 1  # last frame of its stream
SSE = 2  # in a head: the body is an event stream
TOKENS = 4  # no bytes for the client: tokens of an answer that will be sent whole
LINES = 8  # in a head: header lines of the answer and an empty line stand before its first bytes
STATUS_SHIFT = 8  # in a head: flags >> STATUS_SHIFT is the HTTP status; 0 in every other frame

Frame: TypeAlias = tuple[StreamId, int, bytes, bytes]
"""(stream, flags, body bytes as the client gets them, tokens that they were rendered from). The
first frame of a stream is its head: it carries the status beside the first bytes.

The tokens (see token_ids.py) are all that the engine was asked to render since the frame before. A
frame with bytes but no tokens, other than the last, means that the stream cannot be continued
elsewhere.
"""


class Done(msgspec.Struct, frozen=True, array_like=True):
    """Facts of a finished request, for the access log and the metrics. `wait_s` is the time from
    its arrival at the worker to its start in the engine. `load_s` is the part of it that was spent
    on its adapter, which came from `tier`.
    """

    sid: StreamId
    prompt_tokens: int = 0
    output_tokens: int = 0
    wait_s: float = 0.0
    load_s: float = 0.0
    tier: Tier = Tier.GPU


class Refused(msgspec.Struct, frozen=True, array_like=True):
    """The worker will not serve this stream, or not to its end; what it has sent of it stays valid.
    `code` is that of an error in shared.errors.

    `leaving`: this life of the worker takes no more requests. Heartbeats say it too, on another
    socket and so perhaps later. `suspect`: as in heartbeats, nothing new for now.
    """

    sid: StreamId
    code: str
    message: str
    retryable: bool
    leaving: bool = False
    suspect: bool = False


class Attach(msgspec.Struct, frozen=True, tag="attach", array_like=True):
    """First message on a data socket: from now on requests can be sent to this epoch of this
    worker.
    """

    worker: WorkerId
    epoch: int


class Step(msgspec.Struct, frozen=True, tag="step", array_like=True):
    """All that one engine step (or one turn of the worker's loop) yields for one gateway."""

    frames: list[Frame]
    done: list[Done] = []
    refused: list[Refused] = []


class Stopped(msgspec.Struct, frozen=True, tag="stopped", array_like=True):
    """Last word of this life of the worker. It goes the way of the frames, so that it cannot
    overtake them.
    """

    worker: WorkerId
    epoch: int
    reason: str


WorkerData: TypeAlias = Attach | Step | Stopped

# ---- both ways: what carries the data ------------------------------------------------------------


class Carried(msgspec.Struct, frozen=True, tag=1, array_like=True):
    """One encoded message of GatewayData or WorkerData, numbered from 1 in its direction of its
    channel. `acked` is the highest number that the sender has delivered.
    """

    channel: int
    number: int
    acked: int
    body: bytes


class Status(msgspec.Struct, frozen=True, tag=2, array_like=True):
    """Where an end of a channel stands: the highest numbers that it has `sent` and delivered
    (`acked`). `missing`: it asks for all after `acked` again. `ping` counts the pings of the sender
    on this connection, `echo` is the last one that it heard there (0: this is neither).
    """

    channel: int
    sent: int
    acked: int
    missing: bool = False
    ping: int = 0
    echo: int = 0


# ---- worker -> worker, peer ----------------------------------------------------------------------


class PieceRequest(msgspec.Struct, frozen=True, tag="piece_request", array_like=True):
    """Bytes of one part of one file of an adapter. Each gets one answer with its `number`."""

    number: int
    adapter: AdapterRef
    path: str
    offset: int
    size_bytes: int


class Piece(msgspec.Struct, frozen=True, tag="piece", array_like=True):
    """What was wanted, and the SHA-256 (hex) of the whole part that it lies in, as taken when the
    part came from the store.
    """

    number: int
    sha256: str
    data: bytes


class PieceNotYet(msgspec.Struct, frozen=True, tag="piece_not_yet", array_like=True):
    """The part is on its way to this host, whose download got something `idle_s` seconds ago: ask
    again.
    """

    number: int
    idle_s: float = 0.0


class PieceNotHere(msgspec.Struct, frozen=True, tag="piece_not_here", array_like=True):
    """This host does not have the part and will not soon, or serves too many others now."""

    number: int


PeerQuestion: TypeAlias = PieceRequest
PeerAnswer: TypeAlias = Piece | PieceNotYet | PieceNotHere

_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode

decode_worker_control = msgspec.msgpack.Decoder(WorkerControl).decode
decode_gateway_control = msgspec.msgpack.Decoder(GatewayControl).decode
decode_worker_data = msgspec.msgpack.Decoder(WorkerData).decode
decode_gateway_data = msgspec.msgpack.Decoder(GatewayData).decode
decode_packet = msgspec.msgpack.Decoder(Carried | Status).decode
decode_peer_question = msgspec.msgpack.Decoder(PeerQuestion).decode
decode_peer_answer = msgspec.msgpack.Decoder(PeerAnswer).decode

DecodeError = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What any decoder raises, for `except`: count the message and drop it."""


def is_packet(data: bytes) -> bool:
    """Tells what belongs to a channel from the messages of the control socket: msgpack's arrays of
    up to 15 items from its maps.
    """
    return data[:1] > b"\x8f" and data[:1] < b"\xa0"


@functools.lru_cache(maxsize=4096)
def identity(worker: WorkerId, epoch: int) -> bytes:
    """The ZeroMQ routing id of one life of one worker."""
    return f"{worker}#{epoch:x}".encode()


@functools.lru_cache(maxsize=4096)
def life_of(peer: bytes) -> tuple[WorkerId, int]:
    """The worker and epoch of a routing id. Raises ValueError (UnicodeDecodeError is one) where it
    is none of ours.
    """
    worker, _, epoch = peer.decode().rpartition("#")
    return worker, int(epoch, 16)


KEPT_PREFIX = "resp_"
_TAG_DIGITS = 8


def kept_id(worker: WorkerId, epoch: int, owner: str, secret: str) -> str:
    """The id of an answer that one life of a worker keeps for later requests. `owner` is of
    `owner_tag`.
    """
    return f"{KEPT_PREFIX}{worker_tag(worker, epoch)}{owner}{secret}"


def read_kept_id(given: str) -> tuple[str, str] | None:
    """(tag of the worker, tag of the owner), or None for what is no such id."""
    tags = given.removeprefix(KEPT_PREFIX)
    if tags == given or len(tags) <= 2 * _TAG_DIGITS:
        return None
    return tags[:_TAG_DIGITS], tags[_TAG_DIGITS : 2 * _TAG_DIGITS]


@functools.lru_cache(maxsize=4096)
def worker_tag(worker: WorkerId, epoch: int) -> str:
    return _tag(f"worker {worker}#{epoch}")


@functools.lru_cache(maxsize=4096)
def owner_tag(account: str) -> str:
    return _tag(f"owner {account}")


def _tag(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=_TAG_DIGITS // 2).hexdigest()
