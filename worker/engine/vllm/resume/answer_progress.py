"""Pure. One answer on its way through vLLM's serving layer: from which tokens the bytes that come
out were rendered, and which of those bytes the client has seen.

The serving layer pulls one output after another. It writes all bytes of an output before it pulls
the next. So `take` is called with each output before the serving layer gets it. At that moment the
bytes of the output before are complete, and the listener is told. Bytes and tokens of an output
leave together or not at all. The last ones leave with the end of the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from shared.errors import CannotContinue, LoraplexError
from shared.link.token_ids import pack, pack_choice, unpack


class Output(Protocol):
    """The parts of vLLM's RequestOutput that are read here."""

    index: int
    token_ids: Sequence[int]


class Progress:
    """The progress of one request.

    Args:
        seen: the tokens that the client has. They are rendered once more, and their bytes are not
            sent.
        one_by_one: every output is rendered by itself, even if the engine is ahead. What parsers of
            tool calls write depends on where an output ends.
        tell: takes the tokens of an answer that is sent whole at its end.
        primed: the past that the engine's front end takes over into its state; see
            resumable_llm.py.
        in_turn: the serving layer renders one prompt after the other, such as the parts of a long
            sound.
    """

    def __init__(
        self,
        seen: bytes = b"",
        one_by_one: bool = False,
        tell: Callable[[bytes], None] = lambda _: None,
        primed: Any = None,
        in_turn: bool = False,
    ) -> None:
        self.seen = unpack(seen)
        self.one_by_one = one_by_one or bool(self.seen)
        self.tell = tell
        self.words = b""  # tokens whose bytes have not left yet
        self.old = False  # whether the client has seen what is rendered now
        self.failure: LoraplexError | None = None
        self.in_turn = in_turn
        self.prompts = 0
        self.choices = 1  # choices per prompt
        self.primed = primed
        self.on_complete: Callable[[], None] = lambda: None
        self._taken: dict[int, int] = {}  # choice -> how many of its tokens were taken
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
        """The serving layer has got the last output. What follows is the end of the answer."""
        if self.old:
            self.on_complete()
            self.old = False

    def fail(self, error: LoraplexError) -> LoraplexError:
        """From now on nothing is sent. Returns the error."""
        self.failure = self.failure or error
        return error

    def _take(self, choice: int, ids: Sequence[int]) -> bool:
        """Whether the client has these tokens already. Raises CannotContinue if it has others."""
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
