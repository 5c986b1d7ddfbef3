"""Shell. Reads configuration files, and builds settings from Python. It also writes the file by
which `serve` hands its settings to its child processes. `shared.config.loader` decides what a file
means.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from shared.config.document import MAX_CHARS
from shared.config.llm import Settings
from shared.config.loader import Origin, parse_settings, settings_from_args
from shared.errors import ConfigError

__all__ = [
    "SERVE_SETTINGS",
    "app_from_args",
    "load_settings",
    "parse_settings",
    "read_settings",
    "write_settings",
]

SERVE_SETTINGS = ".settings.json"
"""Ending of the name of the file that `serve` writes for its child processes. The file lies in a
folder that `serve` removes.
"""
_MAX_FILE_BYTES = 4 * MAX_CHARS  # UTF-8 takes at most four bytes for a character


def load_settings(path: str | os.PathLike[str]) -> Settings:
    """The settings in a YAML file. Relative paths in it start at its folder.

    Raises: ConfigError, one line per problem.
    """
    source = os.fspath(path)
    try:
        text = _read(source)
    except OSError as exc:
        raise ConfigError(f"{source}: cannot be read: {exc.strerror or exc}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{source}: is not UTF-8 text; is this the right file?") from exc
    return parse_settings(
        text,
        source,
        _read,
        base_dir=os.path.dirname(os.path.abspath(source)),
        home=os.path.expanduser("~"),
        env=os.environ,
    )


def app_from_args(args: object) -> Settings:
    """The settings from the argument of `build_openai_app`: {"llm_configs": [LLMConfig | dict |
    path], "gateway": {...}}.

    Relative paths start at the working directory. Raises: ConfigError, one line per problem.
    """
    return settings_from_args(
        args, Origin("build_openai_app", os.getcwd(), os.path.expanduser("~"), _read)
    )


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


def _read(path: str) -> str:
    with Path(path).open("rb") as file:
        data = file.read(_MAX_FILE_BYTES + 1)
    if len(data) > _MAX_FILE_BYTES:
        raise ConfigError(
            f"{path}: is larger than {_MAX_FILE_BYTES} bytes; is this the right file?"
        )
    return data.decode("utf-8")
