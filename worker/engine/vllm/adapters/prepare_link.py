"""Shell. The front end tells the ranks at once which adapters to prepare, and they tell at once
what is ready: datagrams between Unix sockets in a private folder. A call by name is answered
between two steps only, and the steps wait for it.

A queue of datagrams is short (net.unix.max_dgram_qlen: ten). A rank that is not reached is told by
a call, and is asked from time to time. So nothing depends on a datagram, or on the order of both.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import msgspec

FOLDER_ENV = "LORAPLEX_PREPARE_LINK"
"""Names the folder to the processes that the front end starts."""
FRONT, RANK = "front", ".rank"
MAX_BYTES = 16384
MAX_WORDS = 500  # characters of a failure


class ToPrepare(msgspec.Struct, frozen=True, tag="prepare"):
    """`checked`: whether the adapter was checked. One that was not is read only if its header is
    known.
    """

    name: str
    int_id: int
    folder: str
    checked: bool


class Drop(msgspec.Struct, frozen=True, tag="drop"):
    """The adapter is not wanted any more."""

    int_id: int


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The rank has prepared the adapter, or says why it cannot."""

    int_id: int
    failure: str
    rank: str


Request: TypeAlias = ToPrepare | Drop

_encode = msgspec.json.Encoder().encode
_decode_request = msgspec.json.Decoder(Request).decode
_decode_ready = msgspec.json.Decoder(Ready).decode


class PrepareLink:
    """The front end's end. Made before the processes of the engine are started; `listen` and
    `close` run on the event loop.
    """

    def __init__(self) -> None:
        # beside vLLM's sockets, in the folder that `serve` removes whatever happens
        self._folder = Path(tempfile.mkdtemp(dir=os.environ.get("VLLM_RPC_BASE_PATH") or None))
        os.environ[FOLDER_ENV] = str(self._folder)
        self._socket = _bound(self._folder / FRONT)
        self._socket.setblocking(False)
        self._listens = False

    def listen(self, on_ready: Callable[[Ready], None]) -> None:
        def read() -> None:
            with suppress(OSError):
                while True:
                    data = self._socket.recv(MAX_BYTES)
                    with suppress(msgspec.MsgspecError):
                        on_ready(_decode_ready(data))

        asyncio.get_running_loop().add_reader(self._socket, read)
        self._listens = True

    def send(self, request: Request, ranks: int) -> bool:
        """Whether all of so many ranks have it. Never waits."""
        there, data = list(self._folder.glob(f"*{RANK}")), _encode(request)
        if len(there) != ranks or len(data) > MAX_BYTES:
            return False
        try:
            for rank in there:
                self._socket.sendto(data, str(rank))
        except OSError:
            return False
        return True

    def close(self) -> None:
        if self._listens:
            asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        if os.environ.get(FOLDER_ENV) == str(self._folder):
            del os.environ[FOLDER_ENV]


class RankLink:
    """A rank's end, in a thread of its own. The rank takes requests until its process ends."""

    def __init__(self, folder: Path, on_request: Callable[[Request], None]) -> None:
        """Raises OSError if the front end has gone."""
        self._front = str(folder / FRONT)
        self._on_request = on_request
        self._name = f"{secrets.token_hex(4)}{RANK}"
        self._socket = _bound(folder / self._name)
        threading.Thread(target=self._run, name="loraplex-prepare-link", daemon=True).start()

    def tell(self, int_id: int, failure: str) -> None:
        """Never waits, and raises nothing."""
        words = failure[:MAX_WORDS].encode("utf-8", "replace").decode()
        with suppress(OSError):
            data = _encode(Ready(int_id, words, self._name))
            self._socket.sendto(data, socket.MSG_DONTWAIT, self._front)

    def _run(self) -> None:
        while True:
            data = self._socket.recv(MAX_BYTES)
            with suppress(msgspec.MsgspecError):
                self._on_request(_decode_request(data))


def rank_link(on_request: Callable[[Request], None]) -> RankLink | None:
    """None if the process that started this one has no such link, or cannot be reached."""
    folder = os.environ.get(FOLDER_ENV)
    with suppress(OSError):
        return RankLink(Path(folder), on_request) if folder else None
    return None


def _bound(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        made.bind(str(path))
    except BaseException:
        made.close()
        raise
    return made
