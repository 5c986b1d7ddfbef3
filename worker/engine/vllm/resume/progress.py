"""Pure. One answer on its way through vLLM's serving layer: which tokens the bytes that come out
were rendered from, and which of those bytes the client has seen.

The serving layer pulls one output after another and writes all bytes of one before it pulls the
next. So `take` is called with each output before the serving layer gets it, and tells the listener
that the bytes of the one before are complete: they leave together, with their tokens, or not at
all. The last ones leave with the end of the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from shared.errors import CannotContinue, LoraplexError
from shared.link.token_ids import pack, pack_choice, unpack


class Output(Protocol):
    """What is read of a part of vLLM's RequestOutput."""

    index: int
    token_ids: Sequence[int]


class Progress:
    """Of one request.

    Args:
        seen: the tokens that the client has; they are rendered once more, and nothing of that is
            sent.
        one_by_one: every output is rendered by itself, even if the engine is ahead. Parsers of tool
            calls write what depends on where one output ends.
        tell: takes tokens of an answer that is sent whole at its end.
        primed: what the engine's front end is to make of its state of the request, see movable.py.
    """

    def __init__(
        self,
        seen: bytes = b"",
        one_by_one: bool = False,
        tell: Callable[[bytes], None] = lambda _: None,
        primed: Any = None,
    ) -> None:
        self.seen = unpack(seen)
        self.one_by_one = one_by_one or bool(self.seen)
        self.tell = tell
        self.words = b""  # of the outputs whose bytes have not left
        self.old = False  # whether the client has seen what is rendered now
        self.failure: LoraplexError | None = None
        self.prompts = 0
        self.choices = 1  # of each prompt
        self.primed = primed
        self.on_complete: Callable[[], None] = lambda: None
        self._taken: dict[int, int] = {}  # tokens of each choice
        self._begun = False

    def enter_prompt(self) -> int:
        """The number of the next prompt of the request."""
        self.prompts += 1
        return self.prompts - 1

    def take(self, prompt: int, outputs: Sequence[Output]) -> None:
        """The serving layer gets these outputs next.

        Raises CannotContinue if they contradict what the client has seen.
        """
        if self._begun:
            self.on_complete()
        self._begun = True
        ages = {self._take(prompt * self.choices + o.index, o.token_ids) for o in outputs}
        if len(ages) > 1:
            raise self.fail(CannotContinue("Seen and unseen tokens came in one output."))
        self.old = True in ages

    def rendered(self) -> None:
        """The serving layer has had the last output; what follows is the end of the answer."""
        if self.old:
            self.on_complete()
            self.old = False

    def fail(self, error: LoraplexError) -> LoraplexError:
        """From here on nothing is sent."""
        self.failure = self.failure or error
        return error

    def _take(self, choice: int, ids: Sequence[int]) -> bool:
        """Whether the client has them."""
        seen = self.seen.get(choice, ())
        at = self._taken.get(choice, 0)
        self._taken[choice] = at + len(ids)
        if at < len(seen):
            if list(ids) != list(seen[at : at + len(ids)]):
                why = f"Token {at} of choice {choice} is another one than the client has seen."
                raise self.fail(CannotContinue(why))
            return True
        if ids:
            several = self.choices > 1 or self.prompts > 1
            self.words += pack_choice(choice, ids) if several else pack(ids)
        return False
