"""Shell. The validator for a worker's model: with the base model's shapes, or for the simulated
engine without weights.
"""

from __future__ import annotations

import logging

from shared.config.llm import LLMConfig
from shared.errors import ConfigError
from worker.validation.base_model import UnknownArchitecture, read_base_shapes
from worker.validation.validator import Validator

log = logging.getLogger("loraplex.checks")

DEFAULT_MAX_RANK = 16  # of both engines


def open_validator(model: LLMConfig, max_rank: int) -> Validator:
    """Blocking: it reads the base model's config.

    Raises:
        ConfigError: the model takes adapters and its shapes cannot be told, though they could be:
            an adapter of the wrong shape would poison the engine for everybody, so a worker that
            cannot see it must not serve any.
    """
    if model.llm_engine == "sim":
        return Validator(None, max_rank, weights=False)
    if model.adapters_path is None:
        return Validator(None, max_rank)  # there are none to check
    # vLLM ignores an adapter's weights for any other module without a word
    targets = model.engine_kwargs.get("lora_target_modules")
    try:
        shapes = read_base_shapes(
            str(model.engine_kwargs.get("hf_config_path") or model.model_source),
            revision=model.engine_kwargs.get("revision"),
            trust_remote_code=bool(model.engine_kwargs.get("trust_remote_code", False)),
        )
    except UnknownArchitecture as exc:
        log.warning(
            "%s Adapters of `%s` are served all the same, checked for their config, "
            "ranks, pairs, types and values, but NOT for the layers "
            "that they change and the shapes of these: one that does not fit may spoil "
            "the answers of all others. "
            "Try each with `loraplex adapters validate` and a request on a worker of "
            "its own first.",
            exc.message,
            model.model_id,
        )
        return Validator(None, max_rank, targets=targets)
    except ConfigError as exc:
        raise ConfigError(
            f"{exc.message} Adapters of `{model.model_id}` cannot be checked without "
            "it, and unchecked ones are not served."
        ) from exc
    return Validator(shapes, max_rank, targets=targets)
