"""Pure. What the client of a stream has seen, as token ids, so that another worker can go on from
there.

A frame brings the tokens that its bytes were rendered from, and both are noted in one step, so the
journal never knows more or less than the client. Its bounds are kept by a sweep and not by every
frame: a journal may be over them for as long as a tick.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from shared.link.token_ids import BYTES_PER_TOKEN

SWITCHED_OFF = "off"
NOT_JOURNALED = "not_journaled"  # the worker sent bytes without their tokens
NOT_A_STREAM = "partly_sent"  # a part of an answer that is no event stream
TOO_LONG = "too_long"
NO_MEMORY = "no_memory"


@dataclass(frozen=True, slots=True)
class JournalBounds:
    """Beyond either a stream is not continued when its worker is lost. `stream_tokens` 0: none
    is.
    """

    stream_tokens: int
    total_bytes: int


NO_JOURNALS = JournalBounds(0, 0)


class StreamJournal:
    """Of one request. `words` are the tokens that the client has seen (see token_ids.py), or, of an
    answer that is sent whole, those that it will see.

    `begun`: the client has the status, so that only a continuation can serve it. `obstacle` says
    why there can be none; empty: there can.
    """

    __slots__ = ("begun", "obstacle", "words")

    def __init__(self, movable: bool = True) -> None:
        self.words = bytearray()
        self.begun = False
        self.obstacle = "" if movable else SWITCHED_OFF

    def give_up(self, obstacle: str) -> None:
        """The first obstacle is the one that counts."""
        self.obstacle = self.obstacle or obstacle
        self.words.clear()

    @property
    def seen(self) -> bytes:
        """The tokens from which another worker is to go on; empty: it begins anew."""
        return b"" if self.obstacle else bytes(self.words)


def keep_within(journals: Iterable[StreamJournal], bounds: JournalBounds) -> None:
    """Gives up journals that are too long, and then the longest until all together fit."""
    held = [journal for journal in journals if journal.words]
    for journal in held:
        if journal.obstacle:
            journal.words.clear()
        elif len(journal.words) > bounds.stream_tokens * BYTES_PER_TOKEN:
            journal.give_up(TOO_LONG)
    total = sum(len(journal.words) for journal in held)
    if total > bounds.total_bytes:
        for journal in sorted(held, key=lambda j: len(j.words), reverse=True):
            total -= len(journal.words)
            journal.give_up(NO_MEMORY)
            if total <= bounds.total_bytes:
                return
