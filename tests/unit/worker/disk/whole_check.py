"""Shell. A check for tests of what surrounds checks: it looks at a folder once it is whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shared.adapters.checks import AdapterFacts
from shared.stores.transfer import FilePart


@dataclass(frozen=True)
class WholeCheck:
    """Does `check`, which it is made of, with each folder."""

    check: Callable[[Path], AdapterFacts]
    rules: str = "of a test"

    def begin(self, folder: Path) -> _Begun:
        return _Begun(self.check, folder)


@dataclass(frozen=True)
class _Begun:
    check: Callable[[Path], AdapterFacts]
    folder: Path

    def look(self, part: FilePart) -> None: ...

    def facts(self) -> AdapterFacts:
        return self.check(self.folder)
