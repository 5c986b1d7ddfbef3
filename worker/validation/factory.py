"""Shell. The validator for a model: with what its engine says of its layers, or for the simulated
engine without weights.
"""

from __future__ import annotations

from shared.adapters.base_layers import BaseShapes
from shared.config.llm import LLMConfig
from shared.errors import ConfigError
from worker.validation.base_model import read_base_shapes
from worker.validation.validator import Validator

DEFAULT_MAX_RANK = 16  # of both engines


def open_validator(model: LLMConfig, max_rank: int, layers: BaseShapes | None = None) -> Validator:
    """`layers`: from the running engine, if there is one. Blocking without: it reads the base
    model's config, and may build the model's class.

    Raises:
        ConfigError: the model takes adapters and its layers cannot be told: an adapter of the wrong
            shape would poison the engine for everybody.
    """
    if model.llm_engine == "sim":
        return Validator(None, max_rank, weights=False)
    if model.adapters_path is None:
        return Validator(None, max_rank)  # there are none to check
    if layers is not None:
        return Validator(layers, max_rank)
    # an engine that is told to adapt some modules has no layers for the others
    targets = model.engine_kwargs.get("lora_target_modules")
    try:
        shapes = read_base_shapes(model)
    except ConfigError as exc:
        raise ConfigError(
            f"{exc.message} Adapters of `{model.model_id}` cannot be checked without "
            "it, and unchecked ones are not served."
        ) from exc
    return Validator(shapes, max_rank, targets=targets)
