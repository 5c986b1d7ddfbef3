"""Shell. Settings that `serve` hands to its child processes through a file, or that are read from
the user's own file.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from shared.config.llm import Settings
from shared.config.yaml import load_settings

SERVE_SETTINGS = ".settings.json"
"""How the name of the file ends that `serve` writes for its children, into a folder that it
removes.
"""


def read_settings(path: str) -> Settings:
    """Settings from a config file (YAML), or from the `.json` that `serve` wrote for its children.

    Raises:
        ConfigError: with every problem of the file.
    """
    if path.endswith(SERVE_SETTINGS):
        return msgspec.json.decode(Path(path).read_bytes(), type=Settings)
    return load_settings(path)


def write_settings(settings: Settings, run_dir: Path) -> Path:
    path = run_dir / f"loraplex{SERVE_SETTINGS}"
    path.write_bytes(msgspec.json.encode(settings))
    path.chmod(0o600)
    return path
