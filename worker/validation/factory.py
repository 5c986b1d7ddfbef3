"""Shell. Opens the validator for a model. It uses what the model's engine says of its layers. The
simulated engine has no layers to check.
"""

from __future__ import annotations

from shared.adapters.base_layers import BaseShapes
from shared.config.llm import LLMConfig
from shared.errors import ConfigError
from worker.validation.base_model import base_folder, read_base_shapes
from worker.validation.validator import Validator

DEFAULT_MAX_RANK = 16  # the default of both engines


def open_validator(model: LLMConfig, max_rank: int, layers: BaseShapes | None = None) -> Validator:
    """`layers` come from the running engine, if there is one. Without them this call blocks: it
    reads the base model's config, and may build the model's class.

    Raises:
        ConfigError: the model takes adapters, but its layers cannot be found out. An adapter of the
            wrong shape would break the engine for everybody.
    """
    if model.llm_engine == "sim":
        return Validator(None, max_rank, weights=False)
    if model.adapters_path is None:
        return Validator(None, max_rank)  # the simulated engine has no weights to check
    if layers is not None:
        return Validator(layers, max_rank, base=base_folder(model))
    # An engine that adapts some modules only has no layers for the others.
    targets = model.engine_kwargs.get("lora_target_modules")
    try:
        shapes = read_base_shapes(model)
    except ConfigError as exc:
        raise ConfigError(
            f"{exc.message} Adapters of `{model.model_id}` cannot be checked without "
            "it, and unchecked ones are not served."
        ) from exc
    return Validator(shapes, max_rank, targets=targets, base=base_folder(model))
