"""Shell. ZeroMQ sockets on the event loop. No other module imports zmq. It does without
zmq.asyncio, which costs 3 to 20 times as much per message.

The gateway binds ROUTER sockets, and the workers connect DEALER sockets. Every send is NOBLOCK and
returns what became of it. Every receive runs to completion in the reader's callback and never
waits. ZeroMQ's file descriptor is edge-triggered. So after every send, and after all messages were
read, the socket's EVENTS must be read again, or messages stay unseen.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import logging
from collections.abc import Callable
from enum import Enum
from typing import Any

import zmq
from zmq.backend import Socket as Backend
from zmq.utils import z85

from shared.errors import LinkError
from shared.runtime.log import place_of

log = logging.getLogger("loraplex.link")

HIGH_WATER_MESSAGES = 20_000  # per peer; beyond it a send returns FULL
MAX_MESSAGE_BYTES = 256 << 20  # larger frames are not ours
DRAIN_BATCH = 64  # messages that are handled before the loop turns to other work
RECONNECT_MS = 100
THREAD_HIGH_WATER = 10
"""Of a thread's socket: what it says is of this moment, and nobody needs the backlog."""
# plain integers, because enum arithmetic would cost time per message
_NOBLOCK, _NOBLOCK_MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
_EVENTS, _POLLIN, _RCVMORE = int(zmq.EVENTS), int(zmq.POLLIN), int(zmq.RCVMORE)
_send: Callable[[Any, bytes, int], Any] = (
    Backend.send
)  # what zmq.Socket.send comes to, at a third of its cost: 0.17 against 0.43 microseconds
LINGER_MS = 300  # messages may still leave for this long after close
RECONNECT_MAX_MS = 1_000


class SendResult(Enum):
    OK = "ok"
    GONE = "gone"  # no such peer is connected
    FULL = "full"  # the peer's queue is at its bound


class Socket:
    """One socket on the running loop. A callback gets each message. End it with `close()`, which
    never waits.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        kind: int,
        secret: str | None,
        high_water: int,
        max_message_bytes: int,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._socket: zmq.Socket[bytes] = context.socket(kind)
        self._events: Callable[[int], Any] = self._socket.getsockopt
        self._fd: int = self._socket.getsockopt(zmq.FD)  # type: ignore[assignment]
        _set_up(self._socket, secret, high_water, max_message_bytes)
        self._closed = False
        self._scheduled = False
        self._asking = False

    def _listen(self) -> None:
        self._loop.add_reader(self._fd, self._drain)
        self._again()

    def _again(self) -> None:
        if not self._scheduled and not self._closed:
            self._scheduled = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        self._scheduled = False
        # Asking first costs 1.4 microseconds. A receive that finds nothing raises, which costs 3.3,
        # and most wake-ups bring one message.
        events, receive = self._events, self._receive
        for _ in range(DRAIN_BATCH):
            if self._closed or not events(_EVENTS) & _POLLIN:
                return
            try:
                receive()
            except Exception as exc:
                # the messages behind it would stay unseen if this turn ended here
                log.error("a message could not be handled", extra={"at": place_of(exc)})
        self._again()

    def _receive(self) -> None:
        raise AssertionError("a Link is a Server or a Client")

    def _after_send(self) -> None:
        # A send may consume the edge that announced a message, also one that fails. Asking costs 2
        # microseconds, so it is done once per turn of the loop.
        if not self._asking:
            self._asking = True
            self._loop.call_soon(self._ask)

    def _ask(self) -> None:
        self._asking = False
        self._drain()

    def close(self, linger_ms: int = LINGER_MS) -> None:
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._fd)
            self._socket.close(linger_ms)


class RouterSocket(Socket):
    """A bound ROUTER with many peers, each known by its routing id. `on_message(peer, data)` runs
    on the loop.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        endpoint: str,
        on_message: Callable[[bytes, bytes], None],
        *,
        secret: str | None = None,
        insecure: bool = False,
        high_water: int = HIGH_WATER_MESSAGES,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        check_endpoint(endpoint, secret, insecure)
        super().__init__(context, zmq.ROUTER, secret, high_water, max_message_bytes)
        self._on_message = on_message
        # without it, a message to a peer that has left is dropped silently
        self._socket.router_mandatory = True
        # a peer that reconnects with its id replaces its dead connection
        self._socket.router_handover = True
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as exc:
            self._socket.close(0)
            raise LinkError(
                f"cannot bind {endpoint}: {exc.strerror}; is another gateway running "
                "with this address or state folder?"
            ) from exc
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
        self._listen()

    def _receive(self) -> None:
        # Not recv_multipart, which asks after every part whether there is more (0.8 microseconds
        # each).
        receive = self._socket.recv
        peer = receive(_NOBLOCK)
        data = receive(_NOBLOCK)
        if self._socket.getsockopt(_RCVMORE):
            # not one of ours: our messages never have three parts
            while self._socket.getsockopt(_RCVMORE):
                receive(_NOBLOCK)
            return
        self._on_message(peer, data)

    def send(self, peer: bytes, data: bytes) -> SendResult:
        try:
            # not send_multipart, which looks at every part first: 0.3 against 3.2 microseconds
            _send(self._socket, peer, _NOBLOCK_MORE)
            _send(self._socket, data, _NOBLOCK)
        except zmq.Again:
            return SendResult.FULL
        except zmq.ZMQError as exc:
            if exc.errno == zmq.EHOSTUNREACH:
                return SendResult.GONE
            raise
        finally:
            self._after_send()
        return SendResult.OK


class DealerSocket(Socket):
    """A connected DEALER with a fixed routing id. It reconnects by itself. `on_message(data)` runs
    on the loop.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        endpoint: str,
        routing_id: bytes,
        on_message: Callable[[bytes], None],
        *,
        secret: str | None = None,
        high_water: int = HIGH_WATER_MESSAGES,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        super().__init__(context, zmq.DEALER, secret, high_water, max_message_bytes)
        self._on_message = on_message
        self._socket.routing_id = routing_id
        self._socket.connect(endpoint)
        self._listen()

    def _receive(self) -> None:
        self._on_message(self._socket.recv(_NOBLOCK))

    def send(self, data: bytes) -> SendResult:
        try:
            _send(self._socket, data, _NOBLOCK)
        except zmq.Again:
            return SendResult.FULL
        finally:
            self._after_send()
        return SendResult.OK


class ThreadDealer:
    """A connected DEALER for a thread without an event loop, which only sends. Made, used and
    closed by that thread. What cannot be sent at once is dropped.
    """

    def __init__(self, context: zmq.Context[Any], endpoint: str, secret: str | None) -> None:
        self._socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        _set_up(self._socket, secret, THREAD_HIGH_WATER, MAX_MESSAGE_BYTES)
        self._socket.connect(endpoint)

    def send(self, data: bytes) -> None:
        with contextlib.suppress(zmq.Again):
            _send(self._socket, data, _NOBLOCK)

    def close(self) -> None:
        self._socket.close(0)


def open_context() -> zmq.Context[zmq.Socket[bytes]]:
    """The ZeroMQ context. One per process is enough; close it with `context.destroy(linger=ms)`."""
    return zmq.Context(io_threads=1)


def check_endpoint(endpoint: str, secret: str | None, insecure: bool) -> None:
    """Raises LinkError for a TCP address without a shared secret."""
    if endpoint.startswith("ipc://") or secret or insecure:
        return
    raise LinkError(
        f"{endpoint} would let anyone who reaches it run requests and read answers: set "
        "gateway.link.secret_env to the name of an environment variable that holds a shared secret "
        "(the same for all workers), use ipc on one machine, or set gateway.link.insecure: true on "
        "a trusted network"
    )


def _set_up(
    s: zmq.Socket[bytes], secret: str | None, high_water: int, max_message_bytes: int
) -> None:
    s.sndhwm = s.rcvhwm = high_water
    s.maxmsgsize = max_message_bytes
    s.reconnect_ivl, s.reconnect_ivl_max = RECONNECT_MS, RECONNECT_MAX_MS
    # TCP keepalive notices a peer that vanished (a pulled plug) within seconds, not hours.
    s.tcp_keepalive, s.tcp_keepalive_idle = 1, 5
    s.tcp_keepalive_intvl, s.tcp_keepalive_cnt = 2, 3
    if secret:
        public, private = _keys(secret)
        s.curve_secretkey, s.curve_publickey = private, public
        if s.type == zmq.ROUTER:
            s.curve_server = True
        else:
            s.curve_serverkey = public


@functools.lru_cache(maxsize=4)  # 50 ms, and a worker connects to peers while it serves
def _keys(secret: str) -> tuple[bytes, bytes]:
    """A CURVE key pair that only holders of the secret can derive. The public half is never
    published, so it authenticates both sides.
    """
    private = z85.encode(
        hashlib.scrypt(secret.encode(), salt=b"loraplex-link", n=2**14, r=8, p=1, dklen=32)
    )
    return zmq.curve_public(private), private
