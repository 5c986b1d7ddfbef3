"""Pure. What an adapter is: its name, its identity by content, the files that a store shows of it,
and which names are allowed.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Protocol, TypeAlias

import msgspec

from shared.errors import AdapterNotFound

MAX_NAME_LENGTH = 200
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
WEIGHTS_INDEX_FILE = "adapter_model.safetensors.index.json"
SHARD = re.compile(r"adapter_model-\d{5}-of-(\d{5})\.safetensors")
PICKLED_WEIGHTS = ("adapter_model.bin", "adapter_model.pt")


def may_be_part(name: str) -> bool:
    """Whether a file of this name, directly in an adapter's folder, may belong to the adapter.
    Trainers leave other files beside these, which nothing reads.
    """
    return (
        name in (CONFIG_FILE, WEIGHTS_FILE, WEIGHTS_INDEX_FILE)
        or name in PICKLED_WEIGHTS
        or SHARD.fullmatch(name) is not None
    )


def choose_weights(names: Collection[str]) -> tuple[str, ...]:
    """Of the files in an adapter's folder, those with its weights: one file, or an index and its
    shards. Empty if the folder has no weights that can be served.
    """
    if WEIGHTS_FILE in names:
        return (WEIGHTS_FILE,)
    if WEIGHTS_INDEX_FILE in names:
        return (WEIGHTS_INDEX_FILE, *sorted(n for n in names if SHARD.fullmatch(n)))
    return ()


def has_all_weights(names: Collection[str]) -> bool:
    """Whether the weights in an adapter's folder are all there. The name of a shard says how many
    there are.
    """
    _, *shards = choose_weights(names) or ("",)
    counts = [int(found[1]) for name in shards if (found := SHARD.fullmatch(name))]
    return WEIGHTS_FILE in names or any(counts.count(n) == n for n in set(counts))


def adapter_parts(names: Collection[str]) -> frozenset[str]:
    """Of the files in an adapter's folder, those that belong to the adapter. Pickles are included
    only if there are no other weights, so that they can be refused by name.
    """
    weights = choose_weights(names) or [n for n in PICKLED_WEIGHTS if n in names]
    return frozenset(n for n in (CONFIG_FILE, *weights) if n in names)


MAX_SEGMENT_BYTES = 255  # the limit of Linux file systems
# Nearly every name matches this, and then needs no further check.
_PLAIN = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)*\Z", re.ASCII)


class StoredFile(msgspec.Struct, frozen=True, gc=False):
    """One file of an adapter. `path` is relative to the adapter's folder. `version` is the store's
    own tag (an ETag, a generation, or time and hash).
    """

    path: str
    size_bytes: int
    version: str


class StoredAdapter(msgspec.Struct, frozen=True, gc=False):
    """An adapter as its store shows it: a folder that holds an `adapter_config.json`.

    `name` is the folder's path below the store's root, with `/`. `digest` (16 hex characters)
    changes whenever a file is added, removed or replaced. It is computed from paths, sizes and
    versions, so a listing alone yields it.
    """

    name: str
    digest: str
    files: tuple[StoredFile, ...]

    @property
    def size_bytes(self) -> int:
        return sum(f.size_bytes for f in self.files)


class AdapterRef(msgspec.Struct, frozen=True, array_like=True):
    """One version of one adapter of one base model. Everything from routing to the engine's slots
    uses it as the key.
    """

    base: str
    name: str
    digest: str

    def __str__(self) -> str:
        return f"{self.base}:{self.name}@{self.digest}"


AdapterKey: TypeAlias = tuple[str, str]
"""(name, digest): one version among the adapters of one base model."""


class Versioned(Protocol):
    """Anything that has an adapter's name and digest: a reference, stored files, a
    worker's report.
    """

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...


def key_of(adapter: Versioned) -> AdapterKey:
    return (adapter.name, adapter.digest)


def name_problem(name: str) -> str:
    """Why no adapter can have this name; "" if one can. A name is a path of folders with `/`
    between them. It is safe below any root, in a log, and in a URL after encoding.
    """
    if _PLAIN.match(name) and len(name) <= MAX_NAME_LENGTH and ".." not in name:
        return ""
    if len(name) > MAX_NAME_LENGTH:
        return f"it is longer than {MAX_NAME_LENGTH} characters"
    if ".." in name:
        return "it holds `..`"
    return next(filter(None, map(_segment_problem, name.split("/"))), "")


def _segment_problem(segment: str) -> str:
    if not segment:
        return "it has an empty part"
    if segment[0] in ".-":
        return f"a part of it begins with `{segment[0]}`"
    if segment != segment.strip():
        return "a part of it begins or ends with a space"
    if not segment.isprintable():
        return "it holds characters that cannot be printed"
    if "\\" in segment:
        return "it holds `\\`"
    if "@" in segment:
        return "it holds `@`, behind which a digest goes"
    if len(segment.encode()) > MAX_SEGMENT_BYTES:
        return f"a part of it is longer than {MAX_SEGMENT_BYTES} bytes"
    return ""


def check_name(name: str) -> None:
    """Raises AdapterNotFound for a name that no adapter can have (see `name_problem`).

    Such a name cannot exist in a store, so the answer is "not found" and not "malformed". It never
    becomes part of a path.
    """
    if problem := name_problem(name):
        raise AdapterNotFound(
            f"The adapter name {name[:MAX_NAME_LENGTH]!r} is not valid: {problem}.",
            param="model",
        )
