"""Pure. The keys file: reads YAML text into accounts by key digest, and writes it. Keys themselves
are never in it.

  keys:
    - name: team-a
      sha256: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
      adapters: ["team-a-*"]
      limits: {requests_per_minute: 600}
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from gateway.accounts.account import ANYTHING, LOWEST_PRIORITY, Account, AccountLimits
from shared.config.document.yaml_document import Document, read_document
from shared.config.section import (
    Finding,
    Path,
    Section,
    error_lines,
    read_section,
    shown,
    under,
)
from shared.errors import ConfigError

MAX_KEYS = 5000
"""As many as fit into the largest file that shared/config/document/yaml_document.py reads."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
"""Names become labels of metrics and parts of URLs and logs, so their characters are restricted."""
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_HEADER = "# API keys as SHA-256 digests; see docs/CONFIG.md. Written by `loraplex keys`.\n"
_Positive = Annotated[int, Meta(ge=1, le=1 << 53)]
_Count = Annotated[int, Meta(ge=0, le=1 << 53)]
_Globs = tuple[Annotated[str, Meta(min_length=1, max_length=200)], ...]


class LimitsEntry(Section, frozen=True, kw_only=True):
    """`limits:` of a key. A limit that is left out is not enforced."""

    requests_per_minute: _Positive | None = None
    tokens_per_minute: _Positive | None = None
    concurrent_requests: _Positive | None = None
    adapters_per_minute: _Count | None = None
    n: _Positive | None = None
    body_bytes: _Positive | None = None
    output_tokens: _Positive | None = None


class KeyEntry(Section, frozen=True, kw_only=True):
    """One key. `starts` holds its first characters, so that a person can recognise it."""

    name: str
    sha256: str
    starts: str = ""
    expires: str | None = None
    models: _Globs = ANYTHING
    adapters: _Globs = ANYTHING
    priority: tuple[int, int] = (0, LOWEST_PRIORITY)
    weight: Annotated[float, Meta(gt=0, le=1e6)] = 1.0
    limits: LimitsEntry = msgspec.field(default_factory=LimitsEntry)

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> Iterator[Finding]:
        name, digest = values.get("name"), values.get("sha256")
        if name is not None and NAME.match(name) is None:
            yield Finding(
                ("name",), f"{shown(name)}: expected 1 to 64 letters, digits, dots, - or _"
            )
        if digest is not None and _SHA256.match(digest) is None:
            yield Finding(
                ("sha256",),
                "expected 64 hexadecimal digits, the SHA-256 of the key, not the key itself; "
                "`loraplex keys new` makes one",
            )
        low, high = values.get("priority", (0, 0))
        if not -LOWEST_PRIORITY <= low <= high <= LOWEST_PRIORITY:
            yield Finding(
                ("priority",),
                f"expected [first, last], each within {LOWEST_PRIORITY}, the lower number first",
            )
        if values.get("expires") is not None:
            try:
                _epoch(values["expires"])
            except ValueError:
                yield Finding(
                    ("expires",),
                    f"{shown(values['expires'])}: expected a date or a time like "
                    "2027-01-31T12:00:00Z",
                )

    def account(self) -> Account:
        return Account(
            self.name,
            tuple(self.models),
            tuple(self.adapters),
            (self.priority[0], self.priority[1]),
            float(self.weight),
            AccountLimits(**msgspec.structs.asdict(self.limits)),
            math.inf if self.expires is None else _epoch(self.expires),
        )


def read_entries(text: str, source: str) -> list[KeyEntry]:
    """The entries of a keys file.

    Raises ConfigError with one line per problem. No line repeats a value of `sha256`.
    """
    document = read_document(text, source)
    lines = list(document.problems)
    entries: list[KeyEntry] = []
    if not lines:
        raw = {"keys": []} if document.value is None else document.value
        keys = raw["keys"] if isinstance(raw, dict) and list(raw) == ["keys"] else None
        if not isinstance(keys, list):
            lines.append(f"{source}: expected a list below `keys:`, and nothing beside it")
        elif len(keys) > MAX_KEYS:
            lines.append(f"{source}: expected at most {MAX_KEYS} keys, got {len(keys)}")
        else:
            entries, findings = _entries(keys)
            lines += error_lines(findings, lambda path: _line(document, path))
    if lines:
        raise ConfigError("\n".join(lines))
    return entries


def accounts(entries: list[KeyEntry]) -> dict[bytes, Account]:
    """Key digest -> account."""
    return {bytes.fromhex(entry.sha256): entry.account() for entry in entries}


def to_text(entries: list[KeyEntry]) -> str:
    """The file's text: YAML with values in JSON, which YAML contains. Defaults are left out."""
    defaults = {f.name: f.default for f in msgspec.structs.fields(KeyEntry)}
    lines = [_HEADER, "keys:\n" if entries else "keys: []\n"]
    for entry in entries:
        begin = "  - "
        for field, value in msgspec.structs.asdict(entry).items():
            if isinstance(value, LimitsEntry):
                value = {k: v for k, v in msgspec.structs.asdict(value).items() if v is not None}
            if value in ({}, defaults.get(field)):
                continue
            lines.append(f"{begin}{field}: {json.dumps(value, ensure_ascii=False)}\n")
            begin = "    "
    return "".join(lines)


def _entries(raw: list[Any]) -> tuple[list[KeyEntry], list[Finding]]:
    entries, findings = [], []
    seen: dict[str, int] = {}
    for n, one in enumerate(raw):
        entry, found = read_section(KeyEntry, one, ("keys", n))
        # a key that nothing reads may be a misspelt limit
        findings += [replace(f, severity="error") for f in found]
        if entry is None:
            continue
        for unique in (entry.name, entry.sha256):
            if unique in seen:
                what = "name" if unique == entry.name else "sha256"
                findings += under(
                    ("keys", n), [Finding((what,), f"is that of keys[{seen[unique]}] already")]
                )
            seen[unique] = n
        entries.append(entry)
    return entries, findings


def _line(document: Document, path: Path) -> str:
    while path and path not in document.lines:
        path = path[:-1]
    return f"{document.source}:{document.lines.get(path, 1)}"


def _epoch(text: str) -> float:
    """Seconds of the Unix epoch. A time without an offset is UTC. Raises ValueError."""
    when = datetime.fromisoformat(text)
    return (when if when.tzinfo is not None else when.replace(tzinfo=UTC)).timestamp()
