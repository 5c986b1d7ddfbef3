"""Shell. Reads in an adapter's folder what vLLM's own reader does not: configs as editors and older
trainers write them, and weights in several files.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.adapters.checks import indexed_shards
from shared.adapters.identity import CONFIG_FILE, WEIGHTS_INDEX_FILE, choose_weights

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
    """All tensors of all weight files, by name."""
    import safetensors

    found: dict[str, Any] = {}
    for path in weight_files(folder):
        with safetensors.safe_open(path, framework="pt") as f:
            found |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter's config. Ranks become whole numbers, and a byte order mark is skipped."""
    config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_bytes())
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


def install() -> None:
    """Makes vLLM read configs with `read_config`, and leave out all copies of the base's weights. A
    second call does nothing.
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
