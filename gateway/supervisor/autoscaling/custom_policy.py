"""Shell. Loads a scaling policy that the user wrote. The config names it as `module:function` or
`module:Class`.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import math
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, TypeAlias, cast

from gateway.supervisor.autoscaling.autoscaler import (
    AutoscalingContext,
    CustomPolicy,
    PolicyAnswer,
)
from shared.config.deployment import AutoscalingPolicy
from shared.errors import ConfigError

log = logging.getLogger("loraplex.serve")

UserPolicy: TypeAlias = Callable[[AutoscalingContext], tuple[float, dict[str, Any]]]
SLOW_S = 0.05
"""The supervisor waits this long for an answer, half of the time between two decisions."""
SAY_AGAIN_S = 60.0


def load_policy(config: AutoscalingPolicy | None) -> CustomPolicy | None:
    """The policy that the config names, or None. A class is instantiated once with `policy_kwargs`.

    Raises ConfigError if it cannot be imported or instantiated.
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
    return _Guarded(path, cast(UserPolicy, found))


class _Guarded:
    """The policy, asked in a thread of its own: it is the user's code. While it thinks, its last
    answer holds, and the supervisor goes on. If it fails, or says no number, there is no answer.
    """

    def __init__(self, path: str, policy: UserPolicy) -> None:
        self._path, self._policy = path, policy
        self._questions: SimpleQueue[AutoscalingContext] = SimpleQueue()
        self._answers: SimpleQueue[PolicyAnswer] = SimpleQueue()
        self._thinks = False
        self._last: PolicyAnswer = None
        self._told: dict[str, float] = {}
        # a policy that never returns must not keep the process from ending
        threading.Thread(target=self._think, name="scaling policy", daemon=True).start()

    def __call__(self, ctx: AutoscalingContext) -> PolicyAnswer:
        wait_s = 0.0
        if not self._thinks:
            self._questions.put(ctx)
            self._thinks, wait_s = True, SLOW_S
        try:
            self._last = self._answers.get(timeout=wait_s) if wait_s else self._answers.get_nowait()
            self._thinks = False
        except Empty:
            self._say("the scaling policy is slow; its last answer holds", "")
        return self._last

    def _think(self) -> None:
        while True:
            self._answers.put(self._answer(self._questions.get()))

    def _answer(self, ctx: AutoscalingContext) -> PolicyAnswer:
        try:
            workers, state = self._policy(ctx)
            if not math.isfinite(float(workers)):
                raise ValueError(f"{workers} is no number of workers")
            return float(workers), dict(state or {})
        except BaseException as exc:  # the user's own code, which may even exit
            self._say("the scaling policy failed; the workers stay as they are", repr(exc))
            return None

    def _say(self, what: str, error: str) -> None:
        """It is asked ten times a second."""
        now = time.monotonic()
        if now - self._told.get(what, -SAY_AGAIN_S) >= SAY_AGAIN_S:
            self._told[what] = now
            log.warning(what, extra={"policy": self._path, **({"error": error} if error else {})})
