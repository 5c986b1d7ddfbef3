"""Pure. Every message between `serve` and its gateway and worker processes. Each is one JSON line
on a Unix socket in the run folder.

The socket carries no requests and no tokens. Its only purpose is to know at once that a process
lives, hangs or has ended, and to tell the gateways.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

# ---- child -> serve ------------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """The first line of a connection. `process` is the name that `serve` gave: g0, w1. A worker
    also says its `epoch`, as in its heartbeats.
    """

    process: str
    pid: int
    epoch: int = 0


class Pulse(msgspec.Struct, frozen=True, tag="pulse"):
    """The event loop sends it every PULSE_S, so a process that hangs or is stopped sends none.
    `healthy`: the process serves. `reason` says why it does not, if there is something to say.
    `stage` is what its start is at.
    """

    healthy: bool
    reason: str = ""
    stage: str = ""


class ExitReason(msgspec.Struct, frozen=True, tag="last_words"):
    """Why the process is about to end, if it knows."""

    reason: str


ToSupervisor: TypeAlias = Hello | Pulse | ExitReason

# ---- serve -> gateway ----------------------------------------------------------------------------


class WorkerEnded(msgspec.Struct, frozen=True, tag="worker_ended"):
    """The process of this life of the worker has ended. No lease has to run out for it. `killed`:
    by a signal from outside.
    """

    worker: str
    epoch: int
    reason: str
    killed: bool = False


class CannotStart(msgspec.Struct, frozen=True, tag="cannot_start"):
    """The models that cannot start, each with the reason. Every message has all of them."""

    models: dict[str, str]


class ConfigRefused(msgspec.Struct, frozen=True, tag="config_refused"):
    """The config file has changed, and cannot be taken."""

    reason: str


FromSupervisor: TypeAlias = WorkerEnded | CannotStart | ConfigRefused

PULSE_S = 0.5
MAX_REASON = 500
"""Characters of a reason that are sent."""

_encode = msgspec.json.Encoder().encode
decode_to_supervisor = msgspec.json.Decoder(ToSupervisor).decode
decode_from_supervisor = msgspec.json.Decoder(FromSupervisor).decode
DecodeError = (msgspec.MsgspecError, UnicodeDecodeError)


def line(message: ToSupervisor | FromSupervisor) -> bytes:
    return _encode(message) + b"\n"
