"""Shell. A rank tells the front end at once that it has prepared an adapter: one datagram. A call
by name would be answered between two steps only, and the steps wait for it.

Whoever may write to the socket's file is the same user. A datagram can be lost: the front end asks,
too, from time to time.
"""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

MAX_BYTES = 4096
MAX_WORDS = 500  # characters of a failure

_decode = msgspec.json.Decoder(tuple[int, str]).decode
_encode = msgspec.json.Encoder().encode


class ReadySocket:
    """The front end's end. `on_ready` gets the adapter's int id, and the reason if it failed (""
    if not), once for each rank. Made and closed on the event loop.
    """

    def __init__(self, on_ready: Callable[[int, str], None]) -> None:
        self._on_ready = on_ready
        # beside vLLM's sockets, in the folder that `serve` removes whatever happens
        folder = Path(os.environ.get("VLLM_RPC_BASE_PATH") or tempfile.gettempdir())
        self.path = str(folder / uuid.uuid4().hex)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(self.path)
        asyncio.get_running_loop().add_reader(self._socket, self._read)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()
        Path(self.path).unlink(missing_ok=True)

    def _read(self) -> None:
        with suppress(OSError):
            while True:
                data = self._socket.recv(MAX_BYTES)
                with suppress(msgspec.MsgspecError):
                    self._on_ready(*_decode(data))


def tell(path: str, int_id: int, words: str) -> None:
    """Tells it from a rank's thread. Never waits, and raises nothing."""
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        sender.sendto(_encode((int_id, words[:MAX_WORDS])), path)
