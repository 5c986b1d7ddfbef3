"""Shell. What adapters may change in a base model, where no engine runs. For the usual
architectures the model's `config.json` tells. For the others vLLM's own model class does, built
without weights.

The config costs a millisecond and needs no torch. Importing vLLM takes some ten seconds. A worker
asks its running engine instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from shared.adapters.base_layers import BaseShapes, shapes_from_config
from shared.config.llm import LLMConfig
from shared.errors import ConfigError

CONFIG = "config.json"
MAX_REASON = 300  # characters kept of a library's error message


def read_base_shapes(model: LLMConfig) -> BaseShapes:
    """The layers of a model in a folder, or of a Hugging Face id in the local cache. Blocking.

    Raises:
        ConfigError: there is no config, or vLLM cannot build the model.
    """
    options = model.engine_kwargs
    source = str(options.get("hf_config_path") or model.model_source)
    config = _read_config(source, options.get("revision"))
    known = None if options.get("hf_overrides") else shapes_from_config(config)
    return known or _from_vllm(model, source)


def base_folder(model: LLMConfig) -> Path | None:
    """The folder with the model's weights. None: they are not on this host's disk."""
    source = str(model.model_source)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        config = _cached(source, model.engine_kwargs.get("revision"))
        return None if config is None else config.parent
    return folder


def _read_config(source: str, revision: str | None) -> dict[str, Any]:
    path = Path(source).expanduser() / CONFIG
    if not path.is_file():
        found = _cached(source, revision)
        if found is None:
            raise ConfigError(
                f"The base model `{source}` has no {CONFIG} here: neither as a folder "
                "nor in the Hugging Face cache."
            )
        path = found
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ConfigError(
            f"The {CONFIG} of the base model `{source}` cannot be read: {exc}"
        ) from exc


def _cached(source: str, revision: str | None) -> Path | None:
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        found = try_to_load_from_cache(source, CONFIG, revision=revision)
    except HFValidationError:  # it is a path, not an id
        return None
    return Path(found) if isinstance(found, str) else None


def _from_vllm(model: LLMConfig, source: str) -> BaseShapes:
    try:
        from worker.engine.vllm.lora.offline_layers import offline_layers
    except ImportError as exc:
        raise ConfigError(
            f"The layers of the base model `{source}` cannot be told without vLLM: {exc}"
        ) from exc
    try:
        return offline_layers(model).shapes()
    except Exception as exc:
        # vLLM and transformers raise whatever a model's class raises for a config that it does not
        # understand. All of it means that this model cannot be built here.
        why = " ".join(str(exc).split())[:MAX_REASON] or type(exc).__name__
        raise ConfigError(
            f"The layers of the base model `{source}` cannot be told from its {CONFIG}: {why}."
        ) from exc
