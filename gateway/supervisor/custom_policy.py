"""Shell. Imports a scaling policy of the user's, named in the config as `module:function` or
`module:Class`.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from typing import Any, cast

from gateway.supervisor.autoscaling.autoscaler import AutoscalingContext, CustomPolicy
from shared.config.deployment import AutoscalingPolicy
from shared.errors import ConfigError

log = logging.getLogger("loraplex.serve")


def load_policy(config: AutoscalingPolicy | None) -> CustomPolicy | None:
    """None where the config names none. A class is made once, with `policy_kwargs`.

    Raises: ConfigError if it cannot be imported or made.
    """
    if config is None or config.policy_function is None:
        return None
    path = config.policy_function
    module, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        if inspect.isclass(found):
            found = found(**config.policy_kwargs)
    except Exception as exc:  # the user's own code runs here, at start
        raise ConfigError(
            f"autoscaling_config.policy: {path} cannot be loaded ({type(exc).__name__}: {exc}); "
            "it must be importable where `loraplex serve` starts"
        ) from exc
    if not callable(found):
        raise ConfigError(f"autoscaling_config.policy: {path} is no function and no class")
    return _guarded(path, cast(CustomPolicy, found))


def _guarded(path: str, policy: CustomPolicy) -> CustomPolicy:
    """A policy that fails changes nothing: serving goes on with the workers that there are."""

    def asked(ctx: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        try:
            workers, state = policy(ctx)
            return float(workers), dict(state or {})
        except Exception as exc:  # the user's own code
            log.warning("the scaling policy failed", extra={"policy": path, "error": repr(exc)})
            return ctx.current_num_replicas or ctx.target_num_replicas, ctx.policy_state

    return asked
