"""Shell. Gives the files of this host's disk cache to workers of other hosts, piece by piece. A
part is given as soon as it is complete, even while the rest of its adapter is still being
downloaded.

Files are read in threads, each request is a small task, and the socket has an I/O thread of its
own. So the encryption of pieces delays no token. What a peer sends is never used as a path: a
request is answered only if the manifest or the listing names the same file and part.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeAlias

from shared.adapters.identity import AdapterRef
from shared.errors import LinkError
from shared.link import messages
from shared.link.peer_messages import (
    PeerAnswer,
    Piece,
    PieceNotHere,
    PieceNotYet,
    PieceRequest,
    decode_peer_question,
)
from shared.link.sockets import RouterSocket, SendResult
from shared.stores import transfer
from worker.disk.cache import CachedOnDisk, DiskCache
from worker.disk.layout import entry_key
from worker.peers import peer_rules

log = logging.getLogger("loraplex.peers")
clock = time.monotonic

PORTS_TRIED = 64
"""The workers of one host share one config. Each takes the first free port, from the configured one
on.
"""
LOOK_S = 0.01
"""While a request waits for a part, the disk is looked at this often. A download by another process
offers no event to wait for.
"""
KNOWN_ENTRIES = 256
"""Complete adapters whose manifests are kept in memory."""
FULL_RETRY_S = 0.01
"""While an asker's socket is full, the piece is offered to it again this often."""

Look: TypeAlias = asyncio.Future[CachedOnDisk | None]


@asynccontextmanager
async def open_peer_server(
    context: Any,
    endpoint: str,
    cache: DiskCache,
    *,
    secret: str | None,
    insecure: bool,
    named: str | None,
    gateway: str,
) -> AsyncIterator[str]:
    """Serves while inside. Yields the endpoint that other hosts are told (see
    peer_rules.advertised). Without `named` it is the address of this host on its way to `gateway`.

    Raises LinkError if no port can be bound.
    """
    outward = await asyncio.to_thread(_outward_address, gateway)
    tasks = asyncio.TaskGroup()
    serving = _PeerServer(context, endpoint, cache, tasks, secret, insecure)
    async with tasks:
        try:
            where = peer_rules.advertised(serving.endpoint, named, outward)
            log.info(
                "adapters are given to peers", extra={"bound": serving.endpoint, "told": where}
            )
            yield where
        finally:
            serving.close()


class _PeerServer:
    def __init__(
        self,
        context: Any,
        endpoint: str,
        cache: DiskCache,
        tasks: asyncio.TaskGroup,
        secret: str | None,
        insecure: bool,
    ) -> None:
        self._cache, self._group = cache, tasks
        self._server = self._bound(context, endpoint, secret, insecure)
        self.endpoint = self._server.endpoint
        self._threads = ThreadPoolExecutor(peer_rules.READS_AT_ONCE, thread_name_prefix="peer-read")
        self._open = peer_rules.OpenPieceRequests()
        self._tasks: set[asyncio.Task[None]] = set()
        self._known: OrderedDict[str, CachedOnDisk] = OrderedDict()
        self._looks: dict[str, Look] = {}

    def _bound(
        self, context: Any, endpoint: str, secret: str | None, insecure: bool
    ) -> RouterSocket:
        """Binds the first free port. Raises LinkError."""
        host, _, first = endpoint.rpartition(":")
        ports = [0] if int(first) == 0 else range(int(first), min(65536, int(first) + PORTS_TRIED))
        for port in ports:
            try:
                return RouterSocket(
                    context,
                    f"{host}:{port}",
                    self._on_message,
                    secret=secret,
                    insecure=insecure,
                    high_water=peer_rules.HIGH_WATER_MESSAGES,
                    max_message_bytes=peer_rules.MAX_MESSAGE_BYTES,
                )
            except LinkError as exc:
                failure = exc
        raise LinkError(f"gateway.link.peer: {failure.message}") from failure

    def close(self) -> None:
        """Never waits."""
        for task in self._tasks:
            task.cancel()
        self._server.close()
        self._threads.shutdown(wait=False)

    def _on_message(self, peer: bytes, data: bytes) -> None:
        try:
            want = decode_peer_question(data)
        except messages.DecodeError:
            log.warning("undecodable message of a peer dropped")
            return
        if not self._open.take(peer):
            self._server.send(peer, messages.encode(PieceNotHere(want.number)))
            return
        task = self._group.create_task(self._answer(peer, want), name=f"piece for {peer!r}")
        self._tasks.add(task)
        # Not in a `finally` of the task: a task that is cancelled before its first step never
        # enters it.
        task.add_done_callback(lambda _: self._over(peer, task))

    def _over(self, peer: bytes, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._open.give(peer)

    async def _answer(self, peer: bytes, want: PieceRequest) -> None:
        """Sends the answer. While the asker's socket is full it tries again, up to SILENCE_S."""
        answer = messages.encode(await self._found(want))
        for _ in range(int(peer_rules.SILENCE_S / FULL_RETRY_S)):
            if self._server.send(peer, answer) is not SendResult.FULL:
                return
            # The asker does not read. Its pieces wait here, where OpenWants bounds their number.
            await asyncio.sleep(FULL_RETRY_S)

    async def _found(self, want: PieceRequest) -> PeerAnswer:
        """Answers as soon as the part is complete. Answers PieceNotYet after HOLD_S, and
        PieceNotHere if no download of the adapter makes progress.
        """
        part = want.offset // transfer.PART_BYTES
        if not (0 < want.size_bytes <= peer_rules.PIECE_BYTES and want.offset >= 0):
            return PieceNotHere(want.number)
        began = known_at = clock()
        while True:
            there = await self._look(want.adapter)
            if there is not None and (sha256 := there.parts.get((want.path, part))):
                data = await self._read(there.files / want.path, want)
                if data is not None:
                    return Piece(want.number, sha256, data)
                # the file was removed, or was moved from partial/ to entries/ just now
                self._known.pop(entry_key(want.adapter), None)
                there = None
            now = clock()
            if there is None:
                # not since it began: a part that it has waited for may be on the move just now
                if now - known_at > peer_rules.GRACE_S:
                    return PieceNotHere(want.number)
            else:
                known_at = now
                if (
                    there.moved_at is None
                    # a time far ahead was written before the clock was set back: it tells nothing
                    or abs(idle_s := time.time() - there.moved_at) > peer_rules.IDLE_S
                ):
                    return PieceNotHere(want.number)
                if now - began > peer_rules.HOLD_S:
                    return PieceNotYet(want.number, max(0.0, idle_s))
            await asyncio.sleep(LOOK_S)

    async def _look(self, ref: AdapterRef) -> CachedOnDisk | None:
        """What this host's disk has of the adapter. All who ask for the same adapter at the same
        time share one look. An adapter that is known to be complete needs none.
        """
        key = entry_key(ref)
        known = self._known.get(key)
        if known is not None:
            self._known.move_to_end(key)
            return known
        look = self._looks.get(key)
        if look is None:
            look = self._looks[key] = asyncio.get_running_loop().run_in_executor(
                self._threads, self._cache.cached_on_disk, ref
            )
            look.add_done_callback(lambda _: self._looks.pop(key, None))
        there = await asyncio.shield(look)
        if there is not None and there.moved_at is None:
            self._known[key] = there
            while len(self._known) > KNOWN_ENTRIES:
                self._known.popitem(last=False)
        return there

    async def _read(self, path: Path, want: PieceRequest) -> bytes | None:
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, _read, path, want.offset, want.size_bytes
        )


def _read(path: Path, offset: int, size_bytes: int) -> bytes | None:
    """Reads in a thread. None if the file is gone or too short."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        data = os.pread(fd, size_bytes, offset)
    except OSError:
        return None
    finally:
        os.close(fd)
    return data if len(data) == size_bytes else None


def _outward_address(gateway: str) -> str:
    """The address by which this host reaches `gateway`. Nothing is sent to find it."""
    host, _, port = gateway.partition("://")[2].rpartition(":")
    if not gateway.startswith(("tcp://", "dns://")):
        return "127.0.0.1"  # the gateway is on this machine, and so are all workers
    try:
        family, kind, _, _, there = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind) as probe:
            probe.connect(there)
            return str(probe.getsockname()[0])
    except OSError:
        return socket.gethostname()
