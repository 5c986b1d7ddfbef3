"""Pure. What the client of a stream has seen, as token ids, so that another worker can continue
from there.

Each frame also carries the tokens from which its bytes were rendered. Both are noted in one step,
so the journal never knows more or less than the client. A sweep keeps the bounds, not every frame.
So a journal may exceed them for as long as one tick.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from shared.link.token_ids import BYTES_PER_TOKEN

SWITCHED_OFF = "off"
NOT_JOURNALED = "not_journaled"  # the worker sent bytes without their tokens
TOO_LONG = "too_long"
NO_MEMORY = "no_memory"


@dataclass(frozen=True, slots=True)
class JournalBounds:
    """A stream beyond either bound is not continued when its worker is lost. `stream_tokens` 0: no
    stream is.
    """

    stream_tokens: int
    total_bytes: int


NO_JOURNALS = JournalBounds(0, 0)


class StreamJournal(msgspec.Struct, eq=False):
    """The journal of one request. `tokens` are the tokens that the client has seen (see
    token_ids.py). For an answer that is sent whole, they are those that it will see. `begun` means
    that the client has the status, so that only a continuation can serve it. `obstacle` says why
    there can be none (empty: there can be one).
    """

    tokens: bytearray = msgspec.field(default_factory=bytearray)
    begun: bool = False
    obstacle: str = ""

    def give_up(self, obstacle: str) -> None:
        """Notes why the stream cannot be continued. Only the first reason is kept."""
        self.obstacle = self.obstacle or obstacle
        self.tokens.clear()

    @property
    def seen(self) -> bytes:
        """The tokens from which another worker must continue. Empty: it starts anew."""
        return b"" if self.obstacle else bytes(self.tokens)


def keep_within(journals: Iterable[StreamJournal], bounds: JournalBounds) -> int:
    """Gives up journals that are too long. Then it gives up the longest ones until the rest fits
    into memory. Returns the bytes of the rest.
    """
    held = [journal for journal in journals if journal.tokens]
    for journal in held:
        if journal.obstacle:
            journal.tokens.clear()
        elif len(journal.tokens) > bounds.stream_tokens * BYTES_PER_TOKEN:
            journal.give_up(TOO_LONG)
    total = sum(len(journal.tokens) for journal in held)
    if total > bounds.total_bytes:
        for journal in sorted(held, key=lambda j: len(j.tokens), reverse=True):
            total -= len(journal.tokens)
            journal.give_up(NO_MEMORY)
            if total <= bounds.total_bytes:
                break
    return total
