"""Pure. How to tell which demo adapter wrote an answer: one predicate per style, and prompts that
no training set contains.
"""

import json
import re
from collections.abc import Callable
from typing import Final

HELD_OUT: Final[tuple[str, ...]] = (
    "Could you share a few words on the sun?",
    "I wonder what a rainbow is.",
    "Quick question: what is bread?",
    "Is there anything interesting about bees?",
    "Hey, what's a volcano?",
    "Which town is the seat of government in France?",
    "Inform me about the moon, would you?",
    "How does gravity work?",
    "Any thoughts on coffee today?",
    "Let us talk about penguins for a minute.",
    "In your own words, what are spiders?",
    "I have never really understood magnets.",
    "For my homework I need something on chess.",
    "Introduce Japan to a visitor.",
    "What makes the ocean special?",
    "My grandmother loves chocolate, what is it exactly?",
)
"""Questions in forms that the demo model was never trained on, about topics that it was trained
on.
"""

_HAIKU_LINES: Final = 3
_HAIKU_LINE_CHARS: Final = 48  # The longest line of the corpus has 37.
# Below lie letters, punctuation and currency signs; the adapter's emoji all lie above.
_FIRST_EMOJI: Final = 0x231A


def _is_emoji(char: str) -> bool:
    return ord(char) >= _FIRST_EMOJI


def _is_pirate(text: str) -> bool:
    return re.search(r"\bArr\b", text) is not None and "matey" in text


def _is_shouting(text: str) -> bool:
    letters = [char for char in text if char.isalpha()]
    return len(letters) > 1 and all(char.isupper() for char in letters)


def _is_haiku(text: str) -> bool:
    lines = text.strip().split("\n")
    if len(lines) != _HAIKU_LINES:
        return False
    return all(
        line.strip() and len(line) <= _HAIKU_LINE_CHARS and not line.startswith(("-", "{"))
        for line in lines
    )


def _is_json(text: str) -> bool:
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return isinstance(value, dict) and "answer" in value


def _is_polite(text: str) -> bool:
    return text.strip().startswith("Dear friend") and "kindly" in text


def _is_emoji_style(text: str) -> bool:
    return sum(map(_is_emoji, text)) > 1


def _is_bullets(text: str) -> bool:
    lines = text.strip().split("\n")
    return len(lines) > 1 and all(line.startswith("- ") for line in lines)


def _is_robot(text: str) -> bool:
    return text.strip().startswith("Beep boop")


_PREDICATES: Final[dict[str, Callable[[str], bool]]] = {
    "pirate": _is_pirate,
    "shouting": _is_shouting,
    "haiku": _is_haiku,
    "json": _is_json,
    "polite": _is_polite,
    "emoji": _is_emoji_style,
    "bullets": _is_bullets,
    "robot": _is_robot,
}

ADAPTERS: Final[tuple[str, ...]] = tuple(_PREDICATES)
"""The adapters of the demo, by folder name."""

PLAIN: Final = "plain"
"""The style of the base model without an adapter."""


def is_style(name: str, text: str) -> bool:
    """Whether the whole answer `text` is written in the style of the adapter `name` ("plain": the
    base model).

    Raises: KeyError for a name that is neither an adapter nor "plain".
    """
    if name != PLAIN:
        return _PREDICATES[name](text)
    one_line = text.strip() != "" and "\n" not in text.strip()
    return one_line and not any(predicate(text) for predicate in _PREDICATES.values())


def styles_of(text: str) -> tuple[str, ...]:
    """All styles whose predicate `text` satisfies; exactly one for every whole answer of the demo
    model to a held-out prompt.
    """
    return tuple(name for name in (PLAIN, *ADAPTERS) if is_style(name, text))
