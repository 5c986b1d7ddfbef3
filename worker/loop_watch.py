"""Shell. A thread that speaks for the worker while a request holds its event loop.

Heartbeats come from the loop, since they tell what the loop knows. A loop that is held sends none,
and its gateways would take the worker for dead. This thread has sockets of its own. It says that
the process lives, and for how long the loop has not turned; each gateway decides how long that may
be. While the loop turns, the thread says nothing.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from shared.link import messages
from shared.link.sockets import ThreadDealer
from worker.session import GatewaySession
from worker.settings import WorkerSettings

LATE_HEARTBEATS = 2
"""If the loop's last heartbeat is this many intervals old, the loop counts as held."""


@contextlib.contextmanager
def watch_loop(
    context: Any, settings: WorkerSettings, sessions: Iterable[GatewaySession], secret: str | None
) -> Iterator[None]:
    """Runs the thread while inside. At the end the thread has ended and its sockets are closed."""
    ended = threading.Event()
    thread = threading.Thread(
        target=_watch, args=(context, settings, sessions, secret, ended), name="loop watch"
    )
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _watch(
    context: Any,
    settings: WorkerSettings,
    sessions: Iterable[GatewaySession],
    secret: str | None,
    ended: threading.Event,
) -> None:
    links: dict[GatewaySession, ThreadDealer] = {}
    while not ended.wait(settings.heartbeat_s):
        _fit(links, context, sessions, secret)
        for session, link in links.items():
            held_s = time.monotonic() - session.heartbeat_at
            if held_s > LATE_HEARTBEATS * settings.heartbeat_s:
                held = messages.LoopHeld(settings.worker, session.epoch, held_s)
                link.send(messages.encode(held))
    for link in links.values():
        link.close()


def _fit(
    links: dict[GatewaySession, ThreadDealer],
    context: Any,
    sessions: Iterable[GatewaySession],
    secret: str | None,
) -> None:
    """Keeps one socket per gateway. Gateways come and go with the addresses of a name."""
    now = list(sessions)
    for gone in links.keys() - set(now):
        links.pop(gone).close()
    for session in now:
        if session not in links:
            links[session] = ThreadDealer(context, session.endpoint, secret)
