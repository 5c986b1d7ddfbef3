"""Whether a config fits on a machine: each of its models must be able to have a worker."""

from __future__ import annotations

import pytest

from gateway.supervisor.autoscaling.actuator import check_gpus
from shared.config.llm import LLMConfig, Settings
from shared.errors import ConfigError


def settings(*models: tuple[int, int]) -> Settings:
    """Of each model: its min_replicas, and the GPUs of a worker."""
    scalings = [{"min_replicas": least, "max_replicas": 8} for least, _ in models]
    return Settings(
        models=tuple(
            LLMConfig(
                model_loading_config={"model_id": f"m{n}"},
                engine_kwargs={"tensor_parallel_size": gpus},
                deployment_config={"autoscaling_config": scalings[n]},
            )
            for n, (_, gpus) in enumerate(models)
        )
    )


@pytest.mark.parametrize("models", [[(2, 1)], [(0, 2)], [(0, 2), (0, 1)], [(1, 1), (0, 1), (0, 1)]])
def test_models_that_can_each_have_a_worker_on_two_gpus_fit(models: list[tuple[int, int]]) -> None:
    check_gpus(settings(*models), 2)


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ([(3, 1)], "need more GPUs than the 2 found"),
        ([(0, 4)], "model m0 could never have a worker: one needs 4 GPU"),
        ([(2, 1), (0, 1)], "model m1 could never .* of the 2 found others always keep 2"),
        ([(1, 1), (0, 2)], "model m1 could never have a worker"),
    ],
)
def test_a_model_that_could_never_have_a_worker_is_refused_at_the_start(
    models: list[tuple[int, int]], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        check_gpus(settings(*models), 2)
