"""Shell. The shapes of a base model's linear layers: from its `config.json` where that suffices,
else from the model built without weights.

The config is enough for the usual architectures and costs a millisecond without torch, so that
adapters can be validated on any machine. For the others transformers builds the model on torch's
`meta` device, which allocates nothing; a worker has both imported for vLLM anyway.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec

from shared.adapters.base_layers import BaseShapes, families_of, shapes_from_config
from shared.errors import ConfigError

CONFIG = "config.json"
MAX_REASON = 300  # characters of a library's words
# Not served with adapters: output heads, and the encoders of multi-modal models, where vLLM would
# silently leave an adapter out.
_LEFT_OUT = re.compile(
    r"(?:^|\.)(?:lm_head|score|classifier|vision\w*|visual|audio\w*|multi_modal_projector|\w*_tower)(?:\.|$)"
)
# What building a model from a config that it does not understand raises.
_CONFUSED = (
    ImportError,
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    AssertionError,
    RuntimeError,
)
# transformers moved the text part of multi-modal models in 4.52; adapters saved before carry the
# old beginning.
_RENAMED = (("language_model.model.", "model.language_model."),)


class UnknownArchitecture(ConfigError):
    """Neither this package nor transformers has ever heard of the model: nobody can tell its layers
    from here.
    """


def read_base_shapes(
    source: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> BaseShapes:
    """Of the model in the folder `source`, or of the Hugging Face id `source` once it is in the
    local cache. Blocking.

    Raises:
        UnknownArchitecture: only the model's own code, or vLLM, knows what its layers are.
        ConfigError: no config is there, or neither way yields any layer.
    """
    config = _read_config(source, revision)
    known = shapes_from_config(config, source)
    if known is not None:
        return known
    modules = _from_meta_device(source, revision, trust_remote_code)
    if not modules:
        raise ConfigError(
            f"The layers of the base model `{source}` cannot be told, so its adapters "
            "cannot be validated."
        )
    renamed = _RENAMED if any(m.startswith(_RENAMED[0][1]) for m in modules) else ()
    return BaseShapes(modules, families_of(config, source), renamed)


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
    except HFValidationError:  # a path, not an id
        return None
    return Path(found) if isinstance(found, str) else None


def _from_meta_device(
    source: str, revision: str | None, trust_remote_code: bool
) -> dict[str, tuple[int, int]]:
    try:
        import torch
        from huggingface_hub.errors import StrictDataclassError
        from transformers import CONFIG_MAPPING, AutoConfig
    except ImportError as exc:
        raise ConfigError(
            f"The layers of the base model `{source}` cannot be told without vLLM's "
            f"libraries: {exc}"
        ) from exc
    kind = str(_read_config(source, revision).get("model_type", ""))
    try:
        config = AutoConfig.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code, local_files_only=True
        )
        with torch.device("meta"):
            model = _build(config, trust_remote_code)
    except (*_CONFUSED, StrictDataclassError) as exc:
        why = " ".join(str(exc).split())[:MAX_REASON] or type(exc).__name__
        if kind not in CONFIG_MAPPING:
            raise UnknownArchitecture(
                "transformers does not know the architecture of the base model "
                f"`{source}` ({kind}): {why}."
            ) from exc
        raise ConfigError(
            f"The layers of the base model `{source}` cannot be told from its {CONFIG}: {why}."
        ) from exc
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not _LEFT_OUT.search(name)
    }


def _build(config: Any, trust_remote_code: bool) -> Any:
    """The model that generates text; of one that transformers files elsewhere (pictures or speech
    come in too), the class that it names.
    """
    import transformers

    try:
        return transformers.AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code
        )
    except ValueError:
        named = getattr(transformers, next(iter(config.architectures or ()), ""), None)
        if named is None:
            raise
        return named._from_config(config)
