"""What the document tests read off a Markdown page: its links, its anchors, and its sentences."""

from __future__ import annotations

import re
from dataclasses import dataclass

_FENCE = re.compile(r"^(```|~~~).*?^\1[^\n]*$", re.M | re.S)
_INDENTED = re.compile(r"(?:\A|(?<=\n\n))(?: {4}.*\n?)+")
_CODE = re.compile(r"`[^`]*`")
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
_LINK_TEXT = re.compile(r"!?\[((?:[^\[\]]|\[[^\]]*\])*)\]\([^)\s]+\)")
_HEADING = re.compile(r"^#{1,6} +(.*?)\s*$", re.M)
_LIST_ITEM = re.compile(r"^\s*(?:[-*+]|\d+\.) +")
_END = re.compile(r"(?<!e\.g\.)(?<!i\.e\.)(?<=[.!?])[)\"'*_]*\s+")
_WORD = re.compile(r"[A-Za-z0-9]")


def without_code_blocks(text: str) -> str:
    return _INDENTED.sub("", _FENCE.sub("", text))


def links(text: str) -> list[str]:
    """The targets of all links and pictures outside code."""
    return _LINK.findall(_CODE.sub("", without_code_blocks(text)))


def anchors(text: str) -> set[str]:
    """The fragment of every heading, as GitHub and the site make it."""
    found = set()
    for heading in _HEADING.findall(_FENCE.sub("", text)):
        plain = _LINK_TEXT.sub(r"\1", heading).replace("`", "").lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-"))
    return found


@dataclass(frozen=True, slots=True)
class Prose:
    """Words of each sentence: of running text and lists, and of the cells of tables."""

    sentences: list[tuple[int, str]]
    cells: list[tuple[int, str]]

    @property
    def words_per_sentence(self) -> float:
        return sum(n for n, _ in self.sentences) / max(1, len(self.sentences))

    def share_over(self, words: int) -> float:
        return sum(n > words for n, _ in self.sentences) / max(1, len(self.sentences))


def prose(text: str) -> Prose:
    """Headings and code blocks are left out; inline code and a link count as their words do."""
    blocks: list[str] = []
    cells: list[str] = []
    joined = False
    for line in without_code_blocks(text).splitlines():
        stripped = line.strip()
        if not stripped or stripped.startswith(("#", "<", "![")):
            joined = False
        elif stripped.startswith("|"):
            cells += re.split(r"(?<!\\)\|", stripped.strip("|"))
            joined = False
        elif _LIST_ITEM.match(line) or not joined:
            blocks.append(_LIST_ITEM.sub("", line).strip())
            joined = True
        else:
            blocks[-1] += " " + stripped
    return Prose(_sentences(blocks), _sentences(cells))


def _sentences(blocks: list[str]) -> list[tuple[int, str]]:
    found = []
    for block in blocks:
        for sentence in _END.split(_LINK_TEXT.sub(r"\1", block)):
            count = sum(bool(_WORD.search(word)) for word in sentence.split())
            if count:
                found.append((count, sentence))
    return found
