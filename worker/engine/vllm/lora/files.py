"""Shell. Reads in an adapter's folder what vLLM's own reader does not: configs as editors and older
trainers write them, and weights in several files.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from shared.adapters.checks import AdapterLimits, indexed_shards
from shared.adapters.identity import CONFIG_FILE, WEIGHTS_INDEX_FILE, choose_weights
from shared.adapters.peft_config import MAX_PATTERNS, whole_pattern
from shared.adapters.strict_json import parse_object
from shared.errors import InvalidAdapter

_FUSED = b".experts.base_layer.lora_A"


def weight_files(folder: Path) -> list[Path]:
    """The folder's weight files, in the order of their names."""
    names = choose_weights([path.name for path in folder.iterdir()])
    if WEIGHTS_INDEX_FILE not in names:
        return [folder / name for name in names]
    index = (folder / WEIGHTS_INDEX_FILE).read_bytes()
    return [folder / name for name in indexed_shards(index, names)]


def has_fused_experts(folder: Path) -> bool:
    """Whether the adapter has all experts of a layer in one tensor (PEFT's `target_parameters`)."""
    return any(_FUSED in header for header in _headers(folder))


def _headers(folder: Path) -> Iterator[bytes]:
    for path in weight_files(folder):
        with path.open("rb") as f:
            (size,) = struct.unpack("<Q", f.read(8))
            yield f.read(size)


def read_tensors(folder: Path) -> dict[str, Any]:
    """The tensors of all weight files, by name, but for copies of the base's own."""
    import safetensors

    found: dict[str, Any] = {}
    for path in weight_files(folder):
        with safetensors.safe_open(path, framework="pt") as f:
            own = [name for name in f.keys() if not is_base_copy(name)]  # noqa: SIM118
            found |= {name: f.get_tensor(name) for name in own}
    return found


def brings_base_copies(path: Path) -> bool:
    """Whether a weights file holds tensors of the base, which take gigabytes."""
    import safetensors

    with safetensors.safe_open(path, framework="pt") as f:
        return any(is_base_copy(name) for name in f.keys())  # noqa: SIM118


def parsed_config(folder: Path) -> dict[str, Any]:
    """The adapter's config as it is written. The folder may not be checked yet, and the thread that
    runs the steps shares its interpreter: so not more is read than the checks let pass, and that in
    pieces. Raises OSError or InvalidAdapter.
    """
    limit = AdapterLimits().max_config_bytes
    with (folder / CONFIG_FILE).open("rb") as f:
        raw = f.read(limit + 1)
    if len(raw) > limit:
        raise InvalidAdapter(f"{CONFIG_FILE} has more than {limit} bytes.", "too_large")
    return parse_object(raw, CONFIG_FILE, "config")


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter's config. Ranks become whole numbers, and a byte order mark is skipped."""
    config = parsed_config(folder)
    if isinstance(config.get("r"), float):
        config["r"] = int(config["r"])
    ranks = config.get("rank_pattern")
    if isinstance(ranks, dict):
        config["rank_pattern"] = {key: int(rank) for key, rank in ranks.items()}
    return config


def is_base_copy(name: str) -> bool:
    """Whether the tensor is the base's own, which the engine leaves out. vLLM knows those of layers
    that are adapted; PEFT saves the others under the base's names.
    """
    module, _, last = name.removesuffix(".weight").rpartition(".")
    if last == "base_layer":
        last = module.rpartition(".")[2]
    return name.endswith(".weight") and last in ("embed_tokens", "lm_head")


@lru_cache(2 * MAX_PATTERNS)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(whole_pattern(pattern))


def match_pattern(patterns: Mapping[str, Any], module: str) -> Any:
    """The value of the first expression that matches the module's name, as it was checked and as
    PEFT reads it. None if no expression matches.

    vLLM takes the package `regex`, which reads other things into the same text. To Python's `re`
    the `{e}` of `(?:q_proj){e}` is three letters, to `regex` it lets anything match. So the engine
    took an alpha that the checks never saw.
    """
    return next((value for key, value in patterns.items() if _compiled(key).match(module)), None)


def install() -> None:
    """Makes vLLM read configs with `read_config` and their expressions with `match_pattern`, and
    leave out all copies of the base's weights. A second call does nothing.
    """
    from vllm.lora import lora_model
    from vllm.lora.peft_helper import PEFTHelper

    lora_model.is_base_embedding_weights = is_base_copy

    def from_local_dir(
        cls: type[PEFTHelper], lora_path: str, max_position_embeddings: int | None
    ) -> PEFTHelper:
        config = read_config(Path(lora_path))
        config["vllm_max_position_embeddings"] = max_position_embeddings
        return cls.from_dict(config)

    PEFTHelper.from_local_dir = classmethod(from_local_dir)
    PEFTHelper._match_pattern = staticmethod(match_pattern)
