"""What vLLM logs of errors at `/v1/messages`."""

from __future__ import annotations

import logging
import sys

import pytest

from worker.engine.vllm.app.anthropic_errors import leave_refusals_unlogged

exceptions = pytest.importorskip("vllm.exceptions")


@pytest.mark.parametrize(
    ("error", "logged"),
    [(exceptions.VLLMValidationError("too long"), False), (RuntimeError("a fault"), True)],
)
def test_a_refusal_at_messages_is_not_logged_and_a_fault_is(error: Exception, logged: bool) -> None:
    leave_refusals_unlogged()
    logger = logging.getLogger("vllm.entrypoints.anthropic.api_router")
    try:
        raise error
    except Exception:
        record = logger.makeRecord(logger.name, logging.ERROR, "f", 1, "m", (), sys.exc_info())
    assert bool(logger.filter(record)) == logged
