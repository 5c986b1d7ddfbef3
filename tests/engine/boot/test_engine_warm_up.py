"""Shell. That a worker serves means that its engine has answered: a start fails where something in
the way of all requests refuses them.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest

from shared.errors import EngineFailure
from worker.engine.base import EngineRequest, Reply


def rehearsal(vllm_environment: None, status: int, asked: list[str]) -> Any:
    module = importlib.import_module("worker.engine.vllm.boot.engine_warm_up")

    async def serve(call: EngineRequest, reply: Reply) -> None:
        asked.append(call.path)
        reply.head(status, False, b"Unauthorized", True)

    return module.Rehearsal("demo", SimpleNamespace(lora_config=None), ["generate"], None, serve)


@pytest.mark.parametrize("status", [401, 403, 500, 503])
async def test_an_engine_that_refuses_whatever_is_asked_does_not_serve(
    vllm_environment: None, status: int
) -> None:
    with pytest.raises(EngineFailure, match=f"{status}: Unauthorized"):
        await rehearsal(vllm_environment, status, []).run()


@pytest.mark.parametrize("status", [200, 400])
async def test_a_small_request_that_does_not_fit_the_model_keeps_no_worker_from_serving(
    vllm_environment: None, status: int
) -> None:
    asked: list[str] = []
    await rehearsal(vllm_environment, status, asked).run()
    assert asked and set(asked) <= {"/v1/completions", "/v1/chat/completions"}
