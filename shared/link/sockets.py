"""Shell. The only `import zmq`: sockets on the event loop, without zmq.asyncio, which costs 3 to 20
times as much per message.

The gateway binds ROUTER sockets, the workers connect DEALER sockets. Every send is NOBLOCK and says
what became of it; every receive runs to completion in the reader's callback and never waits.
ZeroMQ's file descriptor is edge-triggered: after every send and every full drain the socket's
EVENTS must be looked at again, or messages lie unseen.
"""

from __future__ import annotations

import asyncio
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

HIGH_WATER_MESSAGES = 20_000  # per peer; the sender is told FULL beyond it
MAX_MESSAGE_BYTES = 256 << 20  # a frame larger than this is not ours
DRAIN_BATCH = 64  # messages handled before the loop may do something else
RECONNECT_MS = 100
# plain numbers: no enum arithmetic per message
_NOBLOCK, _NOBLOCK_MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
_EVENTS, _POLLIN, _RCVMORE = int(zmq.EVENTS), int(zmq.POLLIN), int(zmq.RCVMORE)
_send: Callable[[Any, bytes, int], Any] = (
    Backend.send
)  # what zmq.Socket.send comes to, at a third of its cost: 0.17 against 0.43 microseconds
LINGER_MS = 300  # last words may still leave after close
RECONNECT_MAX_MS = 1_000


class SendResult(Enum):
    OK = "ok"
    GONE = "gone"  # no such peer is connected
    FULL = "full"  # the peer's queue is at its bound


class Socket:
    """One socket on the running loop. `bytes_in` goes to a callback; leave by `close()`, which
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
        s = self._socket
        s.sndhwm = s.rcvhwm = high_water
        s.maxmsgsize = max_message_bytes
        s.reconnect_ivl, s.reconnect_ivl_max = RECONNECT_MS, RECONNECT_MAX_MS
        # A peer that vanished without a word (pulled plug) is noticed by TCP within seconds instead
        # of hours.
        s.tcp_keepalive, s.tcp_keepalive_idle, s.tcp_keepalive_intvl, s.tcp_keepalive_cnt = (
            1,
            5,
            2,
            3,
        )
        if secret:
            public, private = _keys(secret)
            s.curve_secretkey, s.curve_publickey = private, public
            if kind == zmq.ROUTER:
                s.curve_server = True
            else:
                s.curve_serverkey = public
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
        # Asking first costs 1.4 microseconds; a receive that finds nothing raises, which costs 3.3,
        # and most wake-ups bring one message.
        events, receive = self._events, self._receive
        for _ in range(DRAIN_BATCH):
            if self._closed or not events(_EVENTS) & _POLLIN:
                return
            try:
                receive()
            except Exception as exc:
                # the messages behind it lie unseen if this turn ends here
                log.error("a message could not be handled", extra={"at": place_of(exc)})
        self._again()

    def _receive(self) -> None:
        raise AssertionError("a Link is a Server or a Client")

    def _after_send(self) -> None:
        # A send may swallow the edge that announced a message; asking once per turn of the loop is
        # enough, and asking costs 2 microseconds.
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
    """A bound ROUTER: many peers, each known by its routing id. `on_message(peer, data)` runs on
    the loop.
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
        # without it, a message to a peer that left is dropped in silence
        self._socket.router_mandatory = True
        # a peer that reconnects under its id takes over from its dead connection
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
        # Not recv_multipart: it asks after every part whether there is more, at 0.8 microseconds
        # each.
        receive = self._socket.recv
        peer = receive(_NOBLOCK)
        data = receive(_NOBLOCK)
        if self._socket.getsockopt(_RCVMORE):
            # not one of ours: nothing that we send has three parts
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
        self._after_send()
        return SendResult.OK


class DealerSocket(Socket):
    """A connected DEALER with a fixed routing id; reconnects by itself. `on_message(data)` runs on
    the loop.
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
        self._after_send()
        return SendResult.OK


def open_context() -> zmq.Context[zmq.Socket[bytes]]:
    """One per process; close with `context.destroy(linger=ms)`."""
    return zmq.Context(io_threads=1)


def check_endpoint(endpoint: str, secret: str | None, insecure: bool) -> None:
    """Raises LinkError for a TCP address without the shared secret."""
    if endpoint.startswith("ipc://") or secret or insecure:
        return
    raise LinkError(
        f"{endpoint} would let anyone who reaches it run requests and read answers: set "
        "gateway.link.secret_env to the name of an environment variable that holds a shared secret "
        "(the same for all workers), use ipc on one machine, or set gateway.link.insecure: true on "
        "a trusted network"
    )


@functools.lru_cache(maxsize=4)  # 50 ms, and a worker connects to peers while it serves
def _keys(secret: str) -> tuple[bytes, bytes]:
    """A CURVE key pair that only holders of the secret can derive; the public half is never
    published, so it authenticates both sides.
    """
    private = z85.encode(
        hashlib.scrypt(secret.encode(), salt=b"loraplex-link", n=2**14, r=8, p=1, dklen=32)
    )
    return zmq.curve_public(private), private
