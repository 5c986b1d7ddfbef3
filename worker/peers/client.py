"""Shell. Gets adapters from workers of other hosts: one connection per peer, a window of pieces on
it, and a bound on everything.

A peer that is dead, stuck, slow, of another secret or that gives bytes which are not those of its
own hash costs SILENCE_S or so once, is left alone for a while, and the next one, or the store, goes
on with the parts that are whole.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from shared.adapters.identity import AdapterRef, StoredAdapter, StoredFile
from shared.errors import StoreUnavailable
from shared.link import messages
from shared.link.sockets import DealerSocket, SendResult
from shared.stores import transfer as transfers
from shared.stores.objects import StoreFailure, Trouble
from shared.stores.transfer import FilePart, Pace, PartId, Transfer, fetch_adapter
from worker.disk.download import PeerFailed
from worker.peers import policy

log = logging.getLogger("loraplex.peers")
clock = time.monotonic

MAX_CONNECTIONS = 32


class Peers:
    """The other hosts' workers, as one worker sees them."""

    def __init__(
        self, context: Any, worker: str, epoch: int, secret: str | None, pace: Pace
    ) -> None:
        self._context, self._worker, self._epoch, self._secret, self._pace = (
            context,
            worker,
            epoch,
            secret,
            pace,
        )
        self._connections: OrderedDict[str, _PeerConnection] = OrderedDict()
        self._numbers = itertools.count(1)
        self.standing = policy.Standing()

    def sources(self, ref: AdapterRef, endpoints: Sequence[str]) -> list[PeerSource]:
        """Those worth asking, in their order."""
        return [
            PeerSource(self, ref, endpoint, self._pace)
            for endpoint in self.standing.usable(endpoints, clock())
        ]

    def connection(self, endpoint: str) -> _PeerConnection:
        connection = self._connections.get(endpoint)
        if connection is None:
            connection = self._connections[endpoint] = _PeerConnection(
                self._context,
                endpoint,
                f"{self._worker}#{self._epoch}#{next(self._numbers)}".encode(),
                self._secret,
            )
        self._connections.move_to_end(endpoint)
        while len(self._connections) > MAX_CONNECTIONS:
            self._connections.popitem(last=False)[1].close()
        return connection

    def give_up(self, endpoint: str) -> None:
        """It failed: what it still sends goes nowhere."""
        self.standing.failed(endpoint, clock())
        connection = self._connections.pop(endpoint, None)
        if connection is not None:
            connection.close()

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()


class _PeerConnection:
    """Wants that are out at one peer, by number. Closing it fails them."""

    def __init__(self, context: Any, endpoint: str, routing_id: bytes, secret: str | None) -> None:
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[messages.PeerAnswer]] = {}
        self.window = asyncio.Semaphore(policy.PIECES_IN_FLIGHT)
        self._client = DealerSocket(
            context,
            endpoint,
            routing_id,
            self._on_message,
            secret=secret,
            high_water=policy.WANTS_PER_PEER,
            max_message_bytes=policy.MAX_MESSAGE_BYTES,
        )

    def ask(
        self, adapter: AdapterRef, path: str, offset: int, size_bytes: int
    ) -> asyncio.Future[messages.PeerAnswer]:
        """Sends a want; `heard` waits for the answer. Raises PeerFailed if the peer takes no
        more.
        """
        number = next(self._numbers)
        answer: asyncio.Future[messages.PeerAnswer] = asyncio.get_running_loop().create_future()
        if (
            self._client.send(
                messages.encode(messages.PieceRequest(number, adapter, path, offset, size_bytes))
            )
            is not SendResult.OK
        ):
            raise PeerFailed("it takes no more questions")
        self._waiting[number] = answer
        answer.add_done_callback(lambda _: self._waiting.pop(number, None))
        return answer

    def ask_in_window(
        self, adapter: AdapterRef, path: str, offset: int, size_bytes: int
    ) -> asyncio.Future[messages.PeerAnswer]:
        """As `ask`, with a place of the window that the caller has acquired: given back with the
        answer.
        """
        try:
            answer = self.ask(adapter, path, offset, size_bytes)
        except PeerFailed:
            self.window.release()
            raise
        answer.add_done_callback(lambda _: self.window.release())
        return answer

    def close(self) -> None:
        self._client.close()
        for answer in list(self._waiting.values()):
            answer.set_result(messages.PieceNotHere(0))

    def _on_message(self, data: bytes) -> None:
        try:
            message = messages.decode_peer_answer(data)
        except messages.DecodeError:
            log.warning("undecodable answer of a peer dropped")
            return
        answer = self._waiting.get(message.number)
        if answer is not None and not answer.done():
            answer.set_result(message)


class PeerSource:
    """One adapter at one peer, as a Source. `endpoint` names it in the log."""

    def __init__(self, peers: Peers, ref: AdapterRef, endpoint: str, pace: Pace) -> None:
        self._peers, self._ref, self.endpoint = peers, ref, endpoint
        self._pace = pace
        self._claims: dict[PartId, str] = {}
        self._on_idle = Transfer().on_idle

    async def fetch(
        self, adapter: StoredAdapter, into: Path, transfer: Transfer | None = None
    ) -> None:
        wanted = transfer or Transfer()
        self._on_idle = wanted.on_idle

        def on_part(part: FilePart, sha256: str) -> None:
            if self._claims.get(part.id) != sha256:
                raise PeerFailed("its bytes are not those of its own hash")
            wanted.on_part(part, sha256)

        # The connection bounds the time itself; a try that fails is the last, for the next source
        # is better.
        checked = replace(wanted, pace=Pace(None, 1), on_part=on_part)
        try:
            async with asyncio.timeout(self._pace.total_s(adapter.size_bytes) or policy.WAIT_S):
                await fetch_adapter(adapter, into, self._stream, checked)
        except _Absent as exc:
            raise PeerFailed(f"{self.endpoint}: {exc.message}") from exc
        except TimeoutError as exc:
            raise self._gave_up("too slow") from exc
        except StoreUnavailable as exc:
            if isinstance(exc, StoreFailure) and exc.trouble is Trouble.NOT_WRITABLE:
                raise  # our own disk
            raise self._gave_up(exc.message) from exc
        self._peers.standing.served(self.endpoint)

    def _gave_up(self, reason: str) -> PeerFailed:
        log.warning(
            "peer is left alone for a while", extra={"peer": self.endpoint, "reason": reason}
        )
        self._peers.give_up(self.endpoint)
        return PeerFailed(f"{self.endpoint}: {reason}")

    @asynccontextmanager
    async def _stream(
        self, adapter_name: str, file: StoredFile, offset: int, length: int
    ) -> AsyncIterator[AsyncGenerator[bytes, None]]:
        yield self._pieces(file, offset, length)

    async def _pieces(
        self, file: StoredFile, offset: int, length: int
    ) -> AsyncGenerator[bytes, None]:
        """One part. Its first piece is asked for alone: the part may not be there yet."""
        connection = self._peers.connection(self.endpoint)
        first, *rest = policy.pieces_of(offset, length)
        piece = await self._first(connection, file, *first)
        self._claims[file.path, offset // transfers.PART_BYTES] = piece.sha256
        began, received = clock(), len(piece.data)
        yield piece.data
        left, out = deque(rest), deque[tuple[asyncio.Future[messages.PeerAnswer], int]]()
        try:
            while out or left:
                # With pieces of our own on the way nobody waits for the window: another part may
                # hold all of it.
                while (
                    left
                    and len(out) < policy.PIECES_AHEAD
                    and not (out and connection.window.locked())
                ):
                    await connection.window.acquire()
                    at, size_bytes = left.popleft()
                    out.append(
                        (connection.ask_in_window(self._ref, file.path, at, size_bytes), size_bytes)
                    )
                answer, size_bytes = out[0]
                data = _piece(await _heard(answer), size_bytes).data
                out.popleft()
                received += len(data)
                if policy.too_slow(received, clock() - began):
                    raise PeerFailed("too slow")
                yield data
        finally:
            for answer, _ in out:
                answer.cancel()

    async def _first(
        self, connection: _PeerConnection, file: StoredFile, offset: int, size_bytes: int
    ) -> messages.Piece:
        while True:
            answer = await _heard(connection.ask(self._ref, file.path, offset, size_bytes))
            if not isinstance(answer, messages.PieceNotYet):
                return _piece(answer, size_bytes)
            if not 0.0 <= answer.idle_s <= policy.IDLE_S:
                raise _Absent("waits for a download that does not move")
            self._on_idle(answer.idle_s)


async def _heard(answer: asyncio.Future[messages.PeerAnswer]) -> messages.PeerAnswer:
    """Raises PeerFailed after SILENCE_S without an answer."""
    try:
        async with asyncio.timeout(policy.SILENCE_S):
            return await answer
    except TimeoutError as exc:
        raise PeerFailed(f"no answer for {policy.SILENCE_S:g} s") from exc


class _Absent(PeerFailed):
    """The peer is well and does not have it."""


def _piece(answer: messages.PeerAnswer, size_bytes: int) -> messages.Piece:
    if not isinstance(answer, messages.Piece):
        raise _Absent("not there")
    if len(answer.data) != size_bytes:
        raise PeerFailed("a piece of another size than asked for")
    return answer
