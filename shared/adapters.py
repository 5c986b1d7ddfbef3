"""Pure. What an adapter is: its name, its identity by content, the files a store shows of it, and the checks its config must pass."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from shared.errors import AdapterNotFound, InvalidAdapter

MAX_NAME_LENGTH = 200
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\Z")
# Parts of PEFT's LoRA that vLLM 0.32 refuses or mis-serves (vllm/lora/peft_helper.py, validate_legal).
_UNSUPPORTED = ("use_dora", "modules_to_save", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_qalora")


class StoredFile(msgspec.Struct, frozen=True):
    """One file of an adapter. `path` is relative to the adapter's folder, `version` the store's own tag (ETag, generation, mtime and size)."""

    path: str
    size_bytes: int
    version: str


class StoredAdapter(msgspec.Struct, frozen=True):
    """An adapter as its store shows it: a folder that holds an `adapter_config.json`.

    `name` is the folder's path below the store's root, with `/`. `digest` (hex, 16 characters) changes whenever a file is added, removed or
    replaced; it is computed from paths, sizes and versions, so that listing alone yields it.
    """

    name: str
    digest: str
    files: tuple[StoredFile, ...]

    @property
    def size_bytes(self) -> int:
        return sum(f.size_bytes for f in self.files)


class AdapterRef(msgspec.Struct, frozen=True, array_like=True):
    """One version of one adapter of one base model: the identity that everything from routing to the engine's slots is keyed by."""

    base: str
    name: str
    digest: str

    def __str__(self) -> str:
        return f"{self.base}:{self.name}@{self.digest}"


def check_name(name: str) -> None:
    """Raises AdapterNotFound unless `name` fits the grammar: letters, digits, `._-`, sub-folders by `/`, no segment that begins with a dot or dash.

    A name outside the grammar cannot exist in a store, so it is not found rather than malformed; it never becomes part of a path.
    """
    if len(name) > MAX_NAME_LENGTH or ".." in name or not all(_SEGMENT.match(s) for s in name.split("/")):
        raise AdapterNotFound(
            f"The adapter name `{name[:MAX_NAME_LENGTH]}` is not valid: use letters, digits, `.`, `_`, `-` and `/`.", param="model"
        )


def check_adapter_config(raw: bytes, max_rank: int) -> int:
    """The rank of a PEFT LoRA adapter, from the bytes of its `adapter_config.json`.

    Raises:
        InvalidAdapter: not a LoRA config that vLLM can serve within `max_rank`; the message says why.
    """
    try:
        config: Any = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise InvalidAdapter(f"{CONFIG_FILE} is not valid JSON: {exc}") from exc
    if not isinstance(config, dict):
        raise InvalidAdapter(f"{CONFIG_FILE} must hold a JSON object")
    if config.get("peft_type", "LORA") != "LORA":
        raise InvalidAdapter(f"peft_type {config['peft_type']!r} is not supported; only LORA is")
    rank = config.get("r")
    if type(rank) is not int or rank < 1:
        raise InvalidAdapter(f"`r` must be a whole number of at least 1, not {rank!r}")
    pattern = config.get("rank_pattern") or {}
    ranks = [rank, *(r for r in pattern.values() if type(r) is int)] if isinstance(pattern, dict) else [rank]
    if max(ranks) > max_rank:
        raise InvalidAdapter(f"rank {max(ranks)} is greater than the server's max_lora_rank {max_rank}")
    for key in _UNSUPPORTED:
        if config.get(key):
            raise InvalidAdapter(f"`{key}` is not supported")
    return rank
