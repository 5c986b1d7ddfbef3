"""Pure. Fills in `${NAME}` in a configuration's texts from the environment."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from shared.config.document.yaml_document import Document, read_scalar
from shared.config.section import Finding, Path, shown

_PLACE = re.compile(r"\$\$\{|\$\{(?:([A-Za-z_][A-Za-z0-9_]*)(?::-([^${}]*))?\})?")
"""With two dollar signs it is text, and stays with one. Without a name it is of another form."""
_OTHER = re.compile(r"\$\{[^}]*\}?")


def filled_in(
    document: Document, env: Mapping[str, str], path: Path = ()
) -> tuple[Any, list[Finding]]:
    """The document's value with every placeholder replaced, and a finding for each that has none.
    `${NAME:-default}` has a default of its own. A value that is one placeholder, without quotes,
    becomes what YAML reads there: a number, true or false, or text. `path`: the document's place.
    """
    filling = _Filling(env, document.quoted, len(path))
    return filling.filled(document.value, path), filling.findings


@dataclass(slots=True)
class _Filling:
    env: Mapping[str, str]
    quoted: Set[Path]
    depth: int
    findings: list[Finding] = field(default_factory=list)

    def filled(self, value: Any, path: Path) -> Any:
        match value:
            case dict():
                return {k: self.filled(v, (*path, k)) for k, v in value.items()}
            case list():
                return [self.filled(v, (*path, n)) for n, v in enumerate(value)]
            case str() if "${" in value:
                self.findings += _missing(value, self.env, path)
                text = _PLACE.sub(self._value_of, value)
                one = _PLACE.fullmatch(value)
                return read_scalar(text) if one and path[self.depth :] not in self.quoted else text
            case _:
                return value

    def _value_of(self, found: re.Match[str]) -> str:
        if found[1] is None:
            return "${"
        return self.env.get(found[1], found[2] or "")


def _missing(text: str, env: Mapping[str, str], path: Path) -> Iterator[Finding]:
    for found in _PLACE.finditer(text):
        if found[0] == "${":
            other = _OTHER.match(text, found.start())
            yield Finding(
                path,
                f"{shown(other and other[0])} is neither ${{NAME}} nor ${{NAME:-default}}, which "
                "are filled in; write $${ for text",
            )
        elif found[1] is not None and found[1] not in env and found[2] is None:
            yield Finding(
                path, f"the environment variable {found[1]} is not set; export it before starting"
            )
