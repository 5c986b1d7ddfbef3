"""Shell. Gives the files of this host's disk cache to workers of other hosts, piece by piece, while
they are whole or as their parts become so.

Every file is read in a thread, every want is a small task, and the socket has an I/O thread of its
own: encrypting pieces delays no token. What a peer sends is never a path: a want is answered if it
names a file and a part that the manifest or the listing names too.
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
from shared.link.sockets import RouterSocket, SendResult
from shared.stores import transfer
from worker.disk.cache import CachedOnDisk, DiskCache
from worker.disk.layout import entry_key
from worker.peers import policy

log = logging.getLogger("loraplex.peers")
clock = time.monotonic

PORTS_TRIED = 64
"""Workers of one host share one config: each takes the first free port from the configured one
on.
"""
LOOK_S = 0.01
"""What lies on disk is looked at again after so long while somebody waits for it: another process's
download offers no event.
"""
KNOWN_ENTRIES = 256
"""Whole adapters whose manifest is kept in memory."""
FULL_RETRY_S = 0.01

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
    """Serves while inside; yields the endpoint to tell other hosts: at the address `named`, else
    the one that faces `gateway`.

    Raises LinkError if it cannot be bound.
    """
    outward = await asyncio.to_thread(_outward_address, gateway)
    tasks = asyncio.TaskGroup()
    serving = _PeerServer(context, endpoint, cache, tasks, secret, insecure)
    async with tasks:
        try:
            where = policy.advertised(serving.endpoint, named, outward)
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
        self._threads = ThreadPoolExecutor(policy.READS_AT_ONCE, thread_name_prefix="peer-read")
        self._open = policy.OpenWants()
        self._tasks: set[asyncio.Task[None]] = set()
        self._known: OrderedDict[str, CachedOnDisk] = OrderedDict()
        self._looks: dict[str, Look] = {}

    def _bound(
        self, context: Any, endpoint: str, secret: str | None, insecure: bool
    ) -> RouterSocket:
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
                    high_water=policy.HIGH_WATER_MESSAGES,
                    max_message_bytes=policy.MAX_MESSAGE_BYTES,
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
            want = messages.decode_peer_question(data)
        except messages.DecodeError:
            log.warning("undecodable message of a peer dropped")
            return
        if not self._open.take(peer):
            self._server.send(peer, messages.encode(messages.PieceNotHere(want.number)))
            return
        task = self._group.create_task(self._answer(peer, want), name=f"piece for {peer!r}")
        self._tasks.add(task)
        # Not in a `finally` of the task: one that is cancelled before its first step never gets
        # there.
        task.add_done_callback(lambda _: self._over(peer, task))

    def _over(self, peer: bytes, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._open.give(peer)

    async def _answer(self, peer: bytes, want: messages.PieceRequest) -> None:
        answer = messages.encode(await self._found(want))
        for _ in range(int(policy.SILENCE_S / FULL_RETRY_S)):
            if self._server.send(peer, answer) is not SendResult.FULL:
                return
            # the asker does not read; its pieces wait here, where their number is bounded
            await asyncio.sleep(FULL_RETRY_S)

    async def _found(self, want: messages.PieceRequest) -> messages.PeerAnswer:
        """Answers as soon as the part is complete. Answers PieceNotYet after HOLD_S, and
        PieceNotHere if there is nothing to wait for.
        """
        part = want.offset // transfer.PART_BYTES
        if not (0 < want.size_bytes <= policy.PIECE_BYTES and want.offset >= 0):
            return messages.PieceNotHere(want.number)
        began = clock()
        while True:
            there = await self._look(want.adapter)
            waited_s = clock() - began
            if there is not None and (sha256 := there.parts.get((want.path, part))):
                data = await self._read(there.files / want.path, want)
                if data is not None:
                    return messages.Piece(want.number, sha256, data)
                # gone, or moved from partial to entries just now
                self._known.pop(entry_key(want.adapter), None)
                there = None
            if there is None:
                if waited_s > policy.GRACE_S:
                    return messages.PieceNotHere(want.number)
            elif there.moved_at is None or (idle_s := time.time() - there.moved_at) > policy.IDLE_S:
                return messages.PieceNotHere(want.number)
            elif waited_s > policy.HOLD_S:
                return messages.PieceNotYet(want.number, max(0.0, idle_s))
            await asyncio.sleep(LOOK_S)

    async def _look(self, ref: AdapterRef) -> CachedOnDisk | None:
        """What lies on disk; one look for all who ask for the same adapter at the same time, none
        for one that is known to be whole.
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

    async def _read(self, path: Path, want: messages.PieceRequest) -> bytes | None:
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, _read, path, want.offset, want.size_bytes
        )


def _read(path: Path, offset: int, size_bytes: int) -> bytes | None:
    """In a thread. None if it is not there (any more) as it was."""
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
    """This host's address on the way to `gateway`; nothing is sent."""
    host, _, port = gateway.removeprefix("tcp://").rpartition(":")
    if not gateway.startswith("tcp://"):
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
