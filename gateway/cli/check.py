"""Shell. `loraplex check`: a configuration against vLLM's own arguments, without waiting for vLLM
where its version is known.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from loraplex.start import command
from shared.config.arguments import Argument, KnownArguments, read_known_arguments
from shared.config.llm import Settings, engine_kwargs_problems
from shared.errors import ConfigError

KEPT = Path(__file__).parents[2] / "shared" / "config" / "vllm_arguments.json"
_VERSION = re.compile(r"""^__version__ = .*?['"]([^'"+]+)""", re.MULTILINE)
FILES = ("chat_template", "tool_parser_plugin", "reasoning_parser_plugin")


def problems(settings: Settings) -> list[str]:
    """One line for each value that vLLM would not take, with its place in the file."""
    known = known_arguments()
    return [
        *engine_kwargs_problems(settings, known),
        *(
            f"{settings.source}: engine_kwargs.{key}: {text}"
            for model in settings.models
            for key, text in missing_files(model.engine_kwargs)
        ),
    ]


def missing_files(kwargs: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """A template may also be given as its text."""
    for key in FILES:
        value = kwargs.get(key)
        if not isinstance(value, str) or "{" in value or "\n" in value:
            continue
        if not Path(value).expanduser().is_file():
            yield key, f"there is no file '{value[:200]}'"


def known_arguments() -> Mapping[str, Argument]:
    """From the copy that is kept, where it is of the installed version."""
    kept = read_known_arguments(KEPT.read_bytes())
    installed = installed_version()
    if installed is None or installed == kept.version:
        return kept.arguments
    return _asked().arguments


def installed_version() -> str | None:
    """Of vLLM, without importing it (that takes 10 s); None: there is none."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        return None
    try:
        said = _VERSION.search(Path(found.origin).with_name("_version.py").read_text("utf-8"))
    except OSError:
        return ""
    return said[1] if said is not None else ""


def _asked() -> KnownArguments:
    print("asking vLLM for its arguments (about 10 s) ...", file=sys.stderr, flush=True)
    asked = subprocess.run(
        command("worker.engine.vllm.arguments"), capture_output=True, check=False
    )
    try:
        return read_known_arguments(asked.stdout.splitlines()[-1])
    except (IndexError, msgspec.MsgspecError) as exc:
        raise ConfigError(
            "vLLM cannot be imported here, so engine_kwargs cannot be checked; install "
            "loraplex[gpu] or loraplex[cpu]"
        ) from exc
