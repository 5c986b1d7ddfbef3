"""Shell. What a step's block holds is what vLLM's own update_metadata writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[6]


def test_vllm_s_tensors_have_the_values_that_vllm_writes() -> None:
    """In a process of its own, because it imports vLLM's code for GPUs."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("steps_by_vllm.py")],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said == {"steps": 60, "differ": []}
