"""Layers that vLLM itself answers with the base, or refuses: `make oracle` judges all bases."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.harness import ROOT
from worker.engine.factory import VLLM_CPU_ENV, VLLM_ENV

SEES = importlib.util.find_spec("torchvision") is not None
BASES = ["Qwen2 MoE", "Llama, tied"]
BASES_WITH_PICTURES = ["LLaVA, tower too", "Qwen3.5, text part"]


@pytest.mark.long
def test_each_layer_alone_is_served_as_peft_says_or_refused() -> None:
    """The gate of Qwen2 MoE's shared expert, LLaVA's tower and Qwen3.5's in_proj_z need ours."""
    bases = BASES + BASES_WITH_PICTURES * SEES
    env = {**os.environ, **VLLM_ENV, **VLLM_CPU_ENV, "VLLM_LOGGING_LEVEL": "ERROR"}
    argv = [sys.executable, "-m", "tests.engine.oracle.every_layer", *bases]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, env=env, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("\n") == 2 + len(bases)
