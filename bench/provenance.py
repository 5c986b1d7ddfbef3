"""Shell. What a result says about its making: the commit, the versions and the machine."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from bench import ROOT

RESULTS = ROOT / "bench" / "results"


def commit(root: Path = ROOT) -> str:
    """The commit of a working tree, with a plus if it has been changed since."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        name = _output_of("git", "rev-parse", "HEAD", cwd=root)
        changed = _output_of("git", "status", "--porcelain", "-uno", cwd=root)
        return name + ("+" if changed else "")
    return "unknown"


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """The installed version of each package, or of its build for CPUs. None: not installed."""
    return {package: _version(package) for package in packages} | {
        "python": platform.python_version()
    }


def cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def gpu_names() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    with contextlib.suppress(subprocess.CalledProcessError):
        asked = _output_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
        return [name.strip() for name in asked.splitlines() if name.strip()]
    return []


def _version(package: str) -> str | None:
    for name in (package, f"{package}-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def _output_of(*command: str, cwd: Path | None = None) -> str:
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=True
    ).stdout.strip()
