"""Pure. Every message between `serve` and its gateway and worker processes: one JSON line each, on
a Unix socket in the run folder.

The socket carries no requests and no tokens. Its one purpose is to know at once that a process
lives, hangs or has ended, and to tell the gateways.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

# ---- child -> serve ------------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """The first line of a connection. `process` is the name that `serve` gave: g0, w1. A worker
    says which `epoch` of its life this is, as in its heartbeats.
    """

    process: str
    pid: int
    epoch: int = 0


class Pulse(msgspec.Struct, frozen=True, tag="pulse"):
    """Sent by the event loop every PULSE_S: a process that hangs or is stopped sends none.
    `healthy`: it serves. `reason` says why not, where there is something to say.
    """

    healthy: bool
    reason: str = ""


class LastWords(msgspec.Struct, frozen=True, tag="last_words"):
    """Why the process is about to end, if it knows."""

    reason: str


ToSupervisor: TypeAlias = Hello | Pulse | LastWords

# ---- serve -> gateway ----------------------------------------------------------------------------


class WorkerEnded(msgspec.Struct, frozen=True, tag="worker_ended"):
    """The process of this life of the worker is gone. No lease has to run out for it."""

    worker: str
    epoch: int
    reason: str


class Verdicts(msgspec.Struct, frozen=True, tag="verdicts"):
    """Of the models that cannot start: why. All of them, each time one changes."""

    models: dict[str, str]


FromSupervisor: TypeAlias = WorkerEnded | Verdicts

PULSE_S = 0.5
MAX_REASON = 500
"""Characters of a reason that travel."""

_encode = msgspec.json.Encoder().encode
decode_to_supervisor = msgspec.json.Decoder(ToSupervisor).decode
decode_from_supervisor = msgspec.json.Decoder(FromSupervisor).decode
DecodeError = (msgspec.MsgspecError, UnicodeDecodeError)


def line(message: ToSupervisor | FromSupervisor) -> bytes:
    return _encode(message) + b"\n"
