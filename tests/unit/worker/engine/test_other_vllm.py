"""Shell. The start of a worker with a vLLM that Loraplex does not know: a package of that name,
with a version and nothing else.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from loraplex.start import command
from tests.harness import ROOT

OPEN = (
    "from shared.config.llm import LLMConfig; from worker.engine.factory import open_engine; "
    "open_engine(LLMConfig(model_loading_config={'model_id': 'm'}))"
)


@pytest.mark.parametrize(
    ("version", "said"),
    [("0.40.0", "vLLM 0.40.0 was never tried"), ("0.32.0", "install loraplex[gpu] or")],
)
@pytest.mark.parametrize(
    ("argv", "status"),
    [(command("worker.zygote"), 2), ([sys.executable, "-c", OPEN], 1)],
    ids=["zygote", "worker"],
)
def test_what_a_vllm_lacks_is_told_by_its_version(
    tmp_path: Path, argv: list[str], status: int, version: str, said: str
) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    (tmp_path / "vllm" / "version.py").write_text(f"__version__ = {version!r}\n")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    ran = subprocess.run(argv, env=env, stdin=-3, capture_output=True, text=True, check=False)
    last = ran.stderr.splitlines()[-1]
    assert ran.returncode == status and said in last and "No module named 'vllm." in last
