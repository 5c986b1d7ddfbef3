"""Shell. The validator for a worker's model: with the base model's shapes where they can be told, for the simulated engine without weights."""

from __future__ import annotations

import logging

from shared.config import LLMConfig
from shared.errors import ConfigError
from worker.base_shapes import read_base_shapes
from worker.validation import Validator

log = logging.getLogger("loraplex.checks")


def open_validator(model: LLMConfig, max_rank: int) -> Validator:
    """Blocking: it reads the base model's config."""
    if model.llm_engine == "sim":
        return Validator(None, max_rank, weights=False)
    targets = model.engine_kwargs.get("lora_target_modules")  # vLLM ignores an adapter's weights for any other module without a word
    try:
        shapes = read_base_shapes(
            model.model_source,
            revision=model.engine_kwargs.get("revision"),
            trust_remote_code=bool(model.engine_kwargs.get("trust_remote_code", False)),
        )
    except ConfigError as exc:
        # Names, config, ranks and every value are still checked.
        log.warning("adapters are validated without the base model's shapes: %s", exc.message)
        return Validator(None, max_rank, targets=targets)
    return Validator(shapes, max_rank, targets=targets)
