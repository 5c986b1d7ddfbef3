"""Pure. Every message between gateways and workers: ids, structs, and one union with one typed
decoder per direction and socket. Those between workers are in peer_messages.py.

Control (heartbeats, commands) and data (requests, frames) use separate sockets. Rules for a change:
new fields come last and have defaults. Older peers ignore unknown trailing fields. PROTOCOL_VERSION
rises only if an old peer would misunderstand a message.
"""

from __future__ import annotations

import functools
from enum import IntEnum
from typing import TypeAlias

import msgspec

from shared.adapters.identity import AdapterRef, StoredAdapter

PROTOCOL_VERSION = 5

WorkerId: TypeAlias = str
"""Chosen by whoever starts the worker, and unique among live workers. A restarted worker may use it
again with a new epoch.
"""
StreamId: TypeAlias = int
"""One attempt of one request on one worker, unique within a gateway process. A retried request gets
a new id, so late frames of the old attempt match nothing.
"""


class WorkerState(IntEnum):
    JOINING = 0  # the engine boots
    SERVING = 1
    DRAINING = 2  # the worker finishes the requests it has and takes no new ones
    STOPPED = 3  # the last state that a worker reports in this epoch


class Tier(IntEnum):
    """Where an adapter's weights are, the fastest place first."""

    GPU = 0
    CPU = 1
    DISK = 2
    REMOTE = 3


class AdapterState(msgspec.Struct, frozen=True, array_like=True):
    """One adapter on one worker. While `loading`, `tier` is the place that it still comes from, and
    `eta_s` the seconds until it is in a slot.

    `steady`: all gateways together send it at least STEADY_PER_S requests a second.
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
"""Why an adapter left a tier: others needed the room, or an operator or a new version
asked for it.
"""

STEADY_PER_S = 1.0
"""From this many requests a second on, an adapter is in steady use. A lower bound costs capacity.
In the simulator (`default`, 85 requests/s, 4 seeds) p99 TTFT is 162 ms without any such rule, 167
ms with this one, and 194 ms with 0.5.
"""
STEADY_SHARE = 0.25
"""The largest share of the slots that adapters in steady use may keep. While they hold no more, an
adapter that has waited too long takes another slot. In the simulator, 2 workers of 8 slots got
twice the load they can serve (64 adapters, Zipf 1.0). Jain's index of what is served within 10 s is
0.91 without this rule. It is 0.66 to 0.84 with a quarter of the slots, and 0.32 to 0.48 with half.
"""


# ---- worker -> gateway, control ------------------------------------------------------------------


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """A full snapshot of one worker for one gateway. Losing any one is harmless.

    Identity: `epoch` is new with every start of the worker, and `seq` grows with every heartbeat of
    the epoch. `reason` says why the worker is in its `state`, if there is something to say.

    Load: `running` and `waiting` count the requests of all gateways. `yours` counts those of the
    receiving gateway alone. `acked` is the highest stream id received from it.

    Measured times, in seconds, 0 until something was measured. `load_s`: a whole load from disk, in
    which the files are checked and prepared beside the engine and then put into a slot. `stall_s`:
    the part of a load for which the engine stands still, measured over loads from disk and from
    host memory. `load_bytes`: the mean size of the adapters that `stall_s` was measured on.
    `fetch_s`: a fetch from the store to disk.

    Files: workers with the same `host` share one disk cache. Workers of other hosts get files from
    it at `peer_endpoint`; "" means that this worker gives none.

    `suspect`: why the worker should get no new requests for now, because its engine makes no
    progress. "" while all is well.

    `failed`: the worker ends because its engine did not start, or has died.

    `warming`: the engine is there, and the worker loads adapters before it serves (see WarmUp).

    Model: `tasks` are what it can do, in vLLM's words (empty: not known yet). `max_model_len` is
    its context in tokens.

    Counts since the worker's start: `adapter_loads` into a slot, by the tier that the adapter came
    from, `adapter_evictions` by `tier:reason`, `engine_requests` given to the engine, and the
    seconds for which loads have held the engine up (`stalled_s`).
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
    warming: bool = False
    engine_requests: int = 0
    failed: bool = False
    stalled_s: float = 0.0


class LoopHeld(msgspec.Struct, frozen=True, tag="loop_held"):
    """The worker's process lives, but its event loop has not turned for `held_s`: a request holds
    it. A thread says so, beside the loop, in place of heartbeats that are late.
    """

    worker: WorkerId
    epoch: int
    held_s: float


WorkerControl: TypeAlias = Heartbeat | LoopHeld

# ---- gateway -> worker, control ------------------------------------------------------------------


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """The answer to a worker's first heartbeat. Requests will come from `data_endpoint`, and all
    data goes by `channel`. A worker takes the gateway for lost if it is silent for `lease_s`.
    `heartbeat_s` is the gateway's own interval.

    A worker that is still on another channel gives up its requests of that one: no gateway waits
    for them.
    """

    gateway: str
    data_endpoint: str
    lease_s: float
    heartbeat_s: float
    protocol: int = PROTOCOL_VERSION
    channel: int = 0


class Alive(msgspec.Struct, frozen=True, tag="alive"):
    """The gateway's own heartbeat. A worker that hears none for `lease_s` aborts that gateway's
    requests. `seq` is the last heartbeat that the gateway had of the worker: while it stays the
    same, the control connection does not carry the worker's. `coming_bytes` are on their way to the
    worker before the oldest ping that it has not answered.
    """

    gateway: str
    seq: int = 0
    coming_bytes: int = 0


class Farewell(msgspec.Struct, frozen=True, tag="farewell"):
    """The gateway ends, and its requests with it."""

    gateway: str


GatewayControl: TypeAlias = Welcome | Alive | Farewell

# ---- gateway -> worker, data ---------------------------------------------------------------------


class Resume(msgspec.Struct, frozen=True, array_like=True):
    """Where an answer goes on. `tokens` are those that the client has seen (see token_ids.py). They
    are rendered again, and their bytes are not sent.
    """

    tokens: bytes


class AnswerKey(msgspec.Struct, frozen=True, array_like=True):
    """By what a client may ask for the same answer again. `tag` stands for its account and its
    `Idempotency-Key`, `digest` for all else that it asked: a key belongs to one request.
    """

    tag: bytes
    digest: bytes


SUSPECTED = 2
"""Workers that died in a row while they had a request, without progress between. It, or one that
was with it, may be what killed them. From then on it shares no worker with another one of which any
died.
"""


class Generate(msgspec.Struct, frozen=True, tag="generate", array_like=True):
    """One request. `body` is the client's JSON as it came. `adapter` is the version that was
    resolved for it. `stored` are that version's files, if the worker may need them. `peers` are the
    peer endpoints of workers that have those files or fetch them.

    `model` is what the client called the model, if that is not `base:name`; the answer repeats it.
    `answer_id` is the id of an answer that the worker stores; empty: it stores none. `created` is
    the time that the answer carries, in seconds since 1970; 0: the worker's own. Both are the same
    at every attempt.

    `movable`: the gateway wants the answer's tokens beside its bytes, so that another worker can
    continue it. `resume`: the answer has begun on another worker.

    `traceparent` names the span that the engine's own spans belong to (W3C Trace Context), and says
    whether the request is sampled; empty: the gateway makes no traces. `tracestate` is what came
    with it from other tracing systems.

    `key`: the worker keeps the answer for who asks again. `background`: the answer is made to its
    end whether or not somebody listens, because its client may ask for it by its id.

    `cache_salt`: the engine's prefix cache is shared with requests of the same one alone.

    `deaths`: so many workers died in a row while they had the request, without progress between. It
    is answered with a frame of TAKEN, or refused with OnTrial. With `to_its_end` nothing but its
    end is progress.
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
    answer_id: str = ""
    traceparent: str = ""
    key: AnswerKey | None = None
    tracestate: str = ""
    background: bool = False
    cache_salt: str = ""
    deaths: int = 0
    to_its_end: bool = False


class Cancel(msgspec.Struct, frozen=True, tag="cancel", array_like=True):
    """The gateway wants no more of this stream. `over`: nor will its client ask for it again. An
    answer in the background goes on unless it is `over`.
    """

    sid: StreamId
    over: bool = False


class FindAnswer(msgspec.Struct, frozen=True, tag="find_answer", array_like=True):
    """Whether the worker keeps the answer of this tag, or stores the one with this id. Answered
    with a FoundAnswer.
    """

    sid: StreamId
    tag: bytes = b""
    answer_id: str = ""


class KeepCopy(msgspec.Struct, frozen=True, tag="keep_copy", array_like=True):
    """Another worker stores this answer. This one keeps a copy, in case that one is lost. `data` is
    what its engine has made of it (see StoredCopy).
    """

    answer_id: str
    data: bytes


class KnownDeaths(msgspec.Struct, frozen=True, tag="known_deaths", array_like=True):
    """So many workers died of a request that has ended without its answer, one of them after it had
    `begun` to answer. 0: workers died of one that has not ended yet. `forgotten`: it got further,
    so they did not die of it. A gateway tells a worker, and that tells its other gateways.

    `length` is that of the request's body in bytes, and `digest` one of what makes it the same
    request: 16 bytes.
    """

    length: int
    digest: bytes
    deaths: int
    begun: bool = False
    forgotten: bool = False


class WarmUp(msgspec.Struct, frozen=True, tag="warm_up", array_like=True):
    """What a new worker should load before its first request, the most wanted first. Each life of a
    worker gets one. A worker that serves already loads only what finds an empty slot.
    """

    adapters: tuple[AdapterRef, ...]


class AdapterAction(IntEnum):
    """What an operator, or a new version, asks of a worker for one adapter."""

    CACHE = 0  # onto the disk, validated
    LOAD = 1  # into a slot, where the idle adapter that is wanted least makes room
    PIN = 2  # like LOAD, and it never makes room for another one
    UNPIN = 3
    EVICT = 4  # out of the engine, as soon as its requests have ended


class AdapterCommand(msgspec.Struct, frozen=True, tag="command", array_like=True):
    """One command. The answer is a `Done` with the same stream id once it is done, or a
    `Refused`.
    """

    sid: StreamId
    action: AdapterAction
    adapter: AdapterRef
    stored: StoredAdapter | None = None
    peers: tuple[str, ...] = ()


class DrainWorker(msgspec.Struct, frozen=True, tag="drain", array_like=True):
    """Take no more requests, give back those that have not ended within `wait_s`, and end. Whoever
    started the worker then starts the next one.
    """

    wait_s: float
    reason: str


GatewayData: TypeAlias = (
    Generate | Cancel | WarmUp | FindAnswer | AdapterCommand | DrainWorker | KeepCopy | KnownDeaths
)

# ---- worker -> gateway, data ---------------------------------------------------------------------

END = 1  # last frame of its stream
SSE = 2  # in a head: the body is an event stream
TOKENS = 4  # no bytes for the client: tokens of an answer that will be sent whole
LINES = 8  # in a head: header lines of the answer and an empty line stand before its first bytes
ANSWERED = 16  # in a head: its client's answer is whole; the rest is made in the background
TAKEN = 32  # no bytes for the client: the worker has a request of which others died, and begins it
STATUS_SHIFT = 8  # in a head: flags >> STATUS_SHIFT is the HTTP status; 0 in every other frame

Frame: TypeAlias = tuple[StreamId, int, bytes, bytes]
"""(stream, flags, body bytes as the client gets them, tokens that they were rendered from). The
first frame of a stream is its head, which carries the status beside the first bytes.

The tokens (see token_ids.py) are all that the engine was asked to render since the frame before. A
frame that has bytes but no tokens, and is not the last one, means that the stream cannot be
continued elsewhere.
"""


class Done(msgspec.Struct, frozen=True, array_like=True):
    """Facts of a finished request, for the access log and the metrics. `wait_s` is the time from
    its arrival at the worker to its start in the engine. `load_s` is the part of it that was spent
    on its adapter, which came from `tier`, without the wait for a slot that others used. `fetch_s`
    and `check_s` are the parts of that in which the adapter's files were brought to the worker, and
    checked. `finish_reasons` says why each of its choices ended, with commas between them ("": the
    answer does not say).
    """

    sid: StreamId
    prompt_tokens: int = 0
    output_tokens: int = 0
    wait_s: float = 0.0
    load_s: float = 0.0
    tier: Tier = Tier.GPU
    fetch_s: float = 0.0
    check_s: float = 0.0
    finish_reasons: str = ""


class Refused(msgspec.Struct, frozen=True, array_like=True):
    """The worker will not serve this stream, or not to its end. What it has sent of it stays valid.
    `code` is that of an error in shared.errors.

    `leaving`: this life of the worker takes no more requests. Heartbeats say so too, but on another
    socket and perhaps later. `suspect`: the worker takes nothing new for now, as in heartbeats.
    """

    sid: StreamId
    code: str
    message: str
    retryable: bool
    leaving: bool = False
    suspect: bool = False


class FoundAnswer(msgspec.Struct, frozen=True, array_like=True):
    """The answer to FindAnswer. `digest` is empty where the answer is not kept. Else a Generate
    with the same key gets that answer, with the id and time of its first request. `stored`: the
    worker stores the answer that was asked for by its id. `copied`: it has only a copy of it.
    `alone`: it made the answer without its gateway, which may have had it made elsewhere, too.
    """

    sid: StreamId
    digest: bytes = b""
    request_id: str = ""
    created: int = 0
    stored: bool = False
    copied: bool = False
    alone: bool = False


class Attach(msgspec.Struct, frozen=True, tag="attach", array_like=True):
    """The first message on a data socket. From now on requests can be sent to this epoch of this
    worker.
    """

    worker: WorkerId
    epoch: int


class Step(msgspec.Struct, frozen=True, tag="step", array_like=True):
    """All that one engine step (or one turn of the worker's loop) yields for one gateway."""

    frames: list[Frame]
    done: list[Done] = []
    refused: list[Refused] = []
    found: list[FoundAnswer] = []


class StoredCopy(msgspec.Struct, frozen=True, tag="stored_copy", array_like=True):
    """A copy of an answer that the worker stores, for another worker. It comes before the end of
    the answer, so whoever has seen the end can rely on it.
    """

    answer_id: str
    data: bytes


class Stopped(msgspec.Struct, frozen=True, tag="stopped", array_like=True):
    """The last message of this life of the worker. It takes the same way as the frames, so it
    cannot overtake them.
    """

    worker: WorkerId
    epoch: int
    reason: str


WorkerData: TypeAlias = Attach | Step | Stopped | StoredCopy | KnownDeaths

# ---- both ways: what carries the data ------------------------------------------------------------


class DataPacket(msgspec.Struct, frozen=True, tag=1, array_like=True):
    """One encoded message of GatewayData or WorkerData. Each direction of a channel numbers them
    from 1. `acked` is the highest number that the sender has delivered. The body of a packet that
    has arrived is a view of it, so 20 MB are not copied.
    """

    channel: int
    number: int
    acked: int
    body: memoryview


class ChannelStatus(msgspec.Struct, frozen=True, tag=2, array_like=True):
    """Where one end of a channel stands: the highest numbers that it has `sent` and delivered
    (`acked`). With `missing` it asks for everything after `acked` again. `ping` counts the sender's
    pings on this connection. `echo` is the last ping that it received there. Each is 0 if the
    packet is no ping or no echo.
    """

    channel: int
    sent: int
    acked: int
    missing: bool = False
    ping: int = 0
    echo: int = 0


_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode

decode_worker_control = msgspec.msgpack.Decoder(WorkerControl).decode
decode_gateway_control = msgspec.msgpack.Decoder(GatewayControl).decode
decode_worker_data = msgspec.msgpack.Decoder(WorkerData).decode
decode_gateway_data = msgspec.msgpack.Decoder(GatewayData).decode
decode_packet = msgspec.msgpack.Decoder(DataPacket | ChannelStatus).decode

DecodeError = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What any decoder raises, for use in `except`. Count the message and drop it."""


def is_packet(data: bytes) -> bool:
    """Whether the bytes belong to a channel and are not a control message. Packets are msgpack
    arrays of up to 15 items; control messages are maps.
    """
    return data[:1] > b"\x8f" and data[:1] < b"\xa0"


@functools.lru_cache(maxsize=4096)
def identity(worker: WorkerId, epoch: int) -> bytes:
    """The ZeroMQ routing id of one life of one worker."""
    return f"{worker}#{epoch:x}".encode()


@functools.lru_cache(maxsize=4096)
def worker_and_epoch_of(peer: bytes) -> tuple[WorkerId, int]:
    """The worker and epoch of a routing id. Raises ValueError if it is not one of ours."""
    worker, _, epoch = peer.decode().rpartition("#")
    return worker, int(epoch, 16)
