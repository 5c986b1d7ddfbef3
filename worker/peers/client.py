"""Shell. Downloads adapters from workers of other hosts. Each peer has one connection and a bounded
number of pieces in flight.

A peer may be dead, stuck or slow, may have another secret, or may send bytes that do not match its
own hash. That costs about SILENCE_S once. The peer is then left alone for a while, and the next
peer, or the store, goes on with the parts that are complete.
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
from shared.link.peer_messages import (
    PeerAnswer,
    Piece,
    PieceNotHere,
    PieceNotYet,
    PieceRequest,
    decode_peer_answer,
)
from shared.link.sockets import DealerSocket, SendResult
from shared.stores import transfer as transfers
from shared.stores.object_store import StoreFailure, StoreProblem
from shared.stores.transfer import FilePart, PartId, Transfer, TransferRetries, fetch_adapter
from worker.disk.download import PeerFailed
from worker.peers import peer_rules

log = logging.getLogger("loraplex.peers")
clock = time.monotonic

MAX_CONNECTIONS = 32
"""Open connections to peers; the one that was used longest ago is closed for a new one."""


class Peers:
    """The workers of other hosts, as one worker uses them."""

    def __init__(
        self, context: Any, worker: str, epoch: int, secret: str | None, pace: TransferRetries
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
        self.standing = peer_rules.PeerReputation()

    def sources(self, ref: AdapterRef, endpoints: Sequence[str]) -> list[PeerSource]:
        """The peers of `endpoints` that are worth asking, in their order."""
        return [
            PeerSource(self, ref, endpoint, self._pace)
            for endpoint in self.standing.usable(endpoints, clock())
        ]

    def connection(self, endpoint: str) -> _PeerConnection:
        """The open connection to this peer; opens one if there is none."""
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
        """Closes the connection to a peer that failed, and leaves it alone for a while."""
        self.standing.failed(endpoint, clock())
        connection = self._connections.pop(endpoint, None)
        if connection is not None:
            connection.close()

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()


class _PeerConnection:
    """A connection to one peer, with its open piece requests by number. Closing it fails them."""

    def __init__(self, context: Any, endpoint: str, routing_id: bytes, secret: str | None) -> None:
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[PeerAnswer]] = {}
        self.window = asyncio.Semaphore(peer_rules.PIECES_IN_FLIGHT)
        self._client = DealerSocket(
            context,
            endpoint,
            routing_id,
            self._on_message,
            secret=secret,
            high_water=peer_rules.WANTS_PER_PEER,
            max_message_bytes=peer_rules.MAX_MESSAGE_BYTES,
        )

    def ask(
        self, adapter: AdapterRef, path: str, offset: int, size_bytes: int
    ) -> asyncio.Future[PeerAnswer]:
        """Sends a request for one piece; `_heard` waits for its answer. Raises PeerFailed if the
        peer takes no more requests.
        """
        number = next(self._numbers)
        answer: asyncio.Future[PeerAnswer] = asyncio.get_running_loop().create_future()
        if (
            self._client.send(
                messages.encode(PieceRequest(number, adapter, path, offset, size_bytes))
            )
            is not SendResult.OK
        ):
            raise PeerFailed("it takes no more questions")
        self._waiting[number] = answer
        answer.add_done_callback(lambda _: self._waiting.pop(number, None))
        return answer

    def ask_in_window(
        self, adapter: AdapterRef, path: str, offset: int, size_bytes: int
    ) -> asyncio.Future[PeerAnswer]:
        """Like `ask`, for a caller that has acquired a place in `window`. The place is released
        when the answer comes or fails.
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
            if not answer.done():  # one that was given up in this turn is still listed
                answer.set_result(PieceNotHere(0))

    def _on_message(self, data: bytes) -> None:
        try:
            message = decode_peer_answer(data)
        except messages.DecodeError:
            log.warning("undecodable answer of a peer dropped")
            return
        answer = self._waiting.get(message.number)
        if answer is not None and not answer.done():
            answer.set_result(message)


class PeerSource:
    """One adapter at one peer, as a download Source. `endpoint` names it in the log."""

    def __init__(self, peers: Peers, ref: AdapterRef, endpoint: str, pace: TransferRetries) -> None:
        self._peers, self._ref, self.endpoint = peers, ref, endpoint
        self._pace = pace
        self._claims: dict[PartId, str] = {}
        self._on_idle = Transfer().on_idle

    async def fetch(
        self, adapter: StoredAdapter, into: Path, transfer: Transfer | None = None
    ) -> None:
        """Downloads the adapter's missing parts into `into`.

        Raises PeerFailed if the peer does not give them; StoreFailure if this host's disk cannot be
        written.
        """
        wanted = transfer or Transfer()
        self._on_idle = wanted.on_idle

        def on_part(part: FilePart, sha256: str) -> None:
            if self._claims.get(part.id) != sha256:
                raise PeerFailed("its bytes are not those of its own hash")
            wanted.on_part(part, sha256)

        # The connection bounds the time itself. A part is tried once only: after a failure the next
        # source is better.
        checked = replace(wanted, pace=TransferRetries(None, 1), on_part=on_part)
        try:
            async with asyncio.timeout(self._pace.total_s(adapter.size_bytes) or peer_rules.WAIT_S):
                await fetch_adapter(adapter, into, self._stream, checked)
        except _Absent as exc:
            raise PeerFailed(f"{self.endpoint}: {exc.message}") from exc
        except TimeoutError as exc:
            raise self._gave_up("too slow") from exc
        except StoreUnavailable as exc:
            if isinstance(exc, StoreFailure) and exc.trouble is StoreProblem.NOT_WRITABLE:
                raise  # our own disk failed, not the peer
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
        """The bytes of one part, piece by piece. The first piece is requested alone, because the
        peer may not have the part yet.
        """
        connection = self._peers.connection(self.endpoint)
        first, *rest = peer_rules.pieces_of(offset, length)
        piece = await self._first(connection, file, *first)
        self._claims[file.path, offset // transfers.PART_BYTES] = piece.sha256
        began, received = clock(), len(piece.data)
        yield piece.data
        left, out = deque(rest), deque[tuple[asyncio.Future[PeerAnswer], int]]()
        try:
            while out or left:
                # While pieces of this part are in flight, it does not wait for the window: other
                # parts may hold all of it for long.
                while (
                    left
                    and len(out) < peer_rules.PIECES_AHEAD
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
                if peer_rules.too_slow(received, clock() - began):
                    raise PeerFailed("too slow")
                yield data
        finally:
            for answer, _ in out:
                answer.cancel()

    async def _first(
        self, connection: _PeerConnection, file: StoredFile, offset: int, size_bytes: int
    ) -> Piece:
        """The first piece of a part. Asks again while the peer itself is still downloading."""
        while True:
            answer = await _heard(connection.ask(self._ref, file.path, offset, size_bytes))
            if not isinstance(answer, PieceNotYet):
                return _piece(answer, size_bytes)
            if not 0.0 <= answer.idle_s <= peer_rules.IDLE_S:
                raise _Absent("waits for a download that does not move")
            self._on_idle(answer.idle_s)


async def _heard(answer: asyncio.Future[PeerAnswer]) -> PeerAnswer:
    """The peer's answer. Raises PeerFailed after SILENCE_S without one."""
    try:
        async with asyncio.timeout(peer_rules.SILENCE_S):
            return await answer
    except TimeoutError as exc:
        raise PeerFailed(f"no answer for {peer_rules.SILENCE_S:g} s") from exc


class _Absent(PeerFailed):
    """The peer is well, but it does not have the adapter."""


def _piece(answer: PeerAnswer, size_bytes: int) -> Piece:
    """The piece in an answer. Raises PeerFailed if there is none, or if it has another size."""
    if not isinstance(answer, Piece):
        raise _Absent("not there")
    if len(answer.data) != size_bytes:
        raise PeerFailed("a piece of another size than asked for")
    return answer
