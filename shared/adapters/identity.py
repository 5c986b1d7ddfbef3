"""Pure. What an adapter is: its name, its identity by content, the files a store shows of it, and
what a name may be.
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
SHARD = re.compile(r"adapter_model-\d{5}-of-\d{5}\.safetensors")
PICKLED_WEIGHTS = ("adapter_model.bin", "adapter_model.pt")


def may_be_part(name: str) -> bool:
    """Whether a file of this name, in an adapter's folder itself, may be a part of the adapter.
    Trainers leave any number of others beside these, which nobody reads.
    """
    return (
        name in (CONFIG_FILE, WEIGHTS_FILE, WEIGHTS_INDEX_FILE)
        or name in PICKLED_WEIGHTS
        or SHARD.fullmatch(name) is not None
    )


def choose_weights(names: Collection[str]) -> tuple[str, ...]:
    """Of the files in an adapter's folder those with its weights: one file, or an index and its
    shards. Empty: none that is served.
    """
    if WEIGHTS_FILE in names:
        return (WEIGHTS_FILE,)
    if WEIGHTS_INDEX_FILE in names:
        return (WEIGHTS_INDEX_FILE, *sorted(n for n in names if SHARD.fullmatch(n)))
    return ()


def adapter_parts(names: Collection[str]) -> frozenset[str]:
    """Of the files in an adapter's folder those that it consists of. Pickles only where there is
    nothing else: they are refused, by name.
    """
    weights = choose_weights(names) or [n for n in PICKLED_WEIGHTS if n in names]
    return frozenset(n for n in (CONFIG_FILE, *weights) if n in names)


_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\Z")


class StoredFile(msgspec.Struct, frozen=True, gc=False):
    """One file of an adapter. `path` is relative to the adapter's folder, `version` the store's own
    tag (ETag, generation, mtime and size).
    """

    path: str
    size_bytes: int
    version: str


class StoredAdapter(msgspec.Struct, frozen=True, gc=False):
    """An adapter as its store shows it: a folder that holds an `adapter_config.json`.

    `name` is the folder's path below the store's root, with `/`. `digest` (hex, 16 characters)
    changes whenever a file is added, removed or replaced; it is computed from paths, sizes and
    versions, so that listing alone yields it.
    """

    name: str
    digest: str
    files: tuple[StoredFile, ...]

    @property
    def size_bytes(self) -> int:
        return sum(f.size_bytes for f in self.files)


class AdapterRef(msgspec.Struct, frozen=True, array_like=True):
    """One version of one adapter of one base model: the identity that everything from routing to
    the engine's slots is keyed by.
    """

    base: str
    name: str
    digest: str

    def __str__(self) -> str:
        return f"{self.base}:{self.name}@{self.digest}"


AdapterKey: TypeAlias = tuple[str, str]
"""(name, digest): one version among the adapters of one base model."""


class Versioned(Protocol):
    """Whatever has an adapter's name and digest: a reference, stored files, a worker's report."""

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...


def key_of(adapter: Versioned) -> AdapterKey:
    return (adapter.name, adapter.digest)


def check_name(name: str) -> None:
    """Raises AdapterNotFound unless `name` fits the grammar: letters, digits, `._-`, sub-folders by
    `/`, no segment that begins with a dot or dash.

    A name outside the grammar cannot exist in a store, so it is not found rather than malformed; it
    never becomes part of a path.
    """
    if (
        len(name) > MAX_NAME_LENGTH
        or ".." in name
        or not all(_SEGMENT.match(s) for s in name.split("/"))
    ):
        raise AdapterNotFound(
            f"The adapter name `{name[:MAX_NAME_LENGTH]}` is not valid: use letters, "
            "digits, `.`, `_`, `-` and `/`.",
            param="model",
        )
