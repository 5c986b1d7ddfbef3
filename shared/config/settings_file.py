"""Shell. Reads configuration files, and builds settings from Python. It also writes the file by
which `serve` hands its settings to its child processes, and follows a file that changes.
`shared.config.loader` decides what a file means.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import math
import os
import stat
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec

from shared.config.document.yaml_document import MAX_CHARS
from shared.config.llm import Settings
from shared.config.loader import Origin, parse_settings, settings_from_args
from shared.errors import ConfigError
from shared.runtime.state_file import Stamp, stamp_of

__all__ = [
    "SERVE_SETTINGS",
    "FollowedConfig",
    "app_from_args",
    "load_settings",
    "parse_settings",
    "read_settings",
    "write_settings",
]

SERVE_SETTINGS = ".settings.json"
"""Ending of the file that `serve` writes for its child processes. The file lies in a folder that
`serve` removes.
"""
POLL_S = 0.5
"""Between two looks at a file. A change is read once two looks have found the same."""
RETRY_S = 5.0
"""After this long, a file that could not be used is read again. What was wrong may have been beside
it: no descriptors, no permission, an included file that was not there yet.
"""
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
"""How files of PowerShell begin; YAML allows it."""
_MAX_FILE_BYTES = 4 * MAX_CHARS  # UTF-8 takes at most four bytes for a character


def load_settings(path: str | os.PathLike[str], again: bool = False) -> Settings:
    """The settings in a YAML file. Relative paths in it start at its folder. The file may be a
    pipe, unless it is read `again`.

    Raises ConfigError with one line per problem.
    """
    source = os.fspath(path)
    try:
        text = _read(source, pipe=not again)
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

    Relative paths start at the working directory. Raises ConfigError with one line per problem.
    """
    return settings_from_args(
        args, Origin("build_openai_app", os.getcwd(), os.path.expanduser("~"), _read, os.environ)
    )


def read_settings(path: str, again: bool = False) -> Settings:
    """The settings in a config file (YAML), or in the JSON file that `serve` wrote for its
    children. `again`: it was read before, by this process.

    Raises ConfigError with every problem of the file.
    """
    if path.endswith(SERVE_SETTINGS):
        try:
            return msgspec.json.decode(Path(path).read_bytes(), type=Settings)
        except OSError as exc:
            raise ConfigError(f"{path}: cannot be read: {exc.strerror or exc}") from exc
    return load_settings(path, again)


def write_settings(settings: Settings, run_dir: Path) -> Path:
    """Writes the settings for child processes, aside and renamed: a reader sees all or nothing.
    Returns the file. Raises ConfigError if it cannot be written.
    """
    path = run_dir / f"loraplex{SERVE_SETTINGS}"
    aside = path.with_name(f".{path.name}.new")
    try:
        aside.write_bytes(msgspec.json.encode(settings))
        aside.chmod(0o600)
        aside.rename(path)
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be written: {exc.strerror or exc}") from exc
    return path


class FollowedConfig:
    """A configuration that may change while it is used. `read` reads it anew; `settings` are those
    of the last time.
    """

    def __init__(self, path: str, settings: Settings, read: Callable[[], Settings]) -> None:
        self._path, self._read = path, read
        self._files = _files_of(path, settings)
        self._seen = self._stamps()
        self._read_now = asyncio.Event()
        self._retry_at = math.inf

    def ask(self) -> None:
        """Read it now, whether it looks changed or not."""
        self._read_now.set()

    def retry(self) -> None:
        """Read it once more in RETRY_S: what was read last could not be taken."""
        self._retry_at = time.monotonic() + RETRY_S

    async def changes(self) -> AsyncIterator[Settings | ConfigError]:
        """Each new state of the files, or what is wrong with it. A mistake is told once."""
        before, told = self._seen, ""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._read_now.wait()
            stamps, asked = self._stamps(), self._read_now.is_set()
            quiet, before = stamps == before, stamps
            new = asked or (quiet and stamps != self._seen)
            if not new and not (quiet and time.monotonic() >= self._retry_at):
                continue
            self._read_now.clear()
            self._seen, self._retry_at = stamps, math.inf
            try:
                settings = await asyncio.to_thread(self._read)
            except ConfigError as exc:
                self.retry()
                if new or exc.message != told:
                    told = exc.message
                    yield exc
                continue
            told = ""
            included = _files_of(self._path, settings) - self._files
            self._files |= included
            self._seen = before = {**stamps, **{file: stamp_of(file) for file in included}}
            yield settings

    def _stamps(self) -> dict[str, Stamp]:
        return {file: stamp_of(file) for file in self._files}


def _files_of(path: str, settings: Settings) -> set[str]:
    """The file itself, and those that it includes. What `serve` writes includes none."""
    if path.endswith(SERVE_SETTINGS):
        return {os.path.abspath(path)}
    files = {place.rpartition(":")[0] for place in settings.places.values()}
    return {os.path.abspath(file) for file in (path, *files) if file and os.path.exists(file)}


def _read(path: str, pipe: bool = False) -> str:
    """Only what a person gives at the start may be a `pipe`. Later one without a writer would hold
    its reader for ever, and with it the end of this process.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags if pipe else flags | os.O_NONBLOCK)

    with open(path, "rb", opener=opener) as file:
        if not pipe and not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ConfigError(f"{path}: is no plain file; pipes are not read again")
        data = file.read(_MAX_FILE_BYTES + 1)
    if len(data) > _MAX_FILE_BYTES:
        raise ConfigError(
            f"{path}: is larger than {_MAX_FILE_BYTES} bytes; is this the right file?"
        )
    return data.decode("utf-16" if data.startswith(_UTF_16) else "utf-8")
