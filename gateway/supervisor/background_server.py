"""Shell. `run(app, blocking=False)`: a `loraplex serve` that runs as a child process, and ends with
its parent.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

from loraplex.start import command
from shared.config.llm import Settings
from shared.config.settings_file import write_settings
from shared.errors import ConfigError
from shared.runtime.process import PARENT_ENV

STOP_S = 60.0


class BackgroundServer:
    """A running server. `url` is the base URL for OpenAI clients. `stop()` drains and ends it; so
    does leaving it as a context manager.
    """

    def __init__(self, process: subprocess.Popen[str], url: str, folder: Path) -> None:
        self._process = process
        self._folder = folder
        self.url = url

    @classmethod
    def start(cls, app: Settings) -> BackgroundServer:
        """Starts the server and returns once all workers serve.

        Raises ConfigError if the server ends before that. Its own messages are on stderr.
        """
        folder = Path(tempfile.mkdtemp(prefix="loraplex-app-"))
        config = write_settings(app, folder)
        argv = command("gateway.cli.main", "serve", str(config))
        env = {**os.environ, PARENT_ENV: str(os.getpid())}
        process = subprocess.Popen(
            argv, stdout=subprocess.PIPE, text=True, env=env, start_new_session=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            found = re.search(r"serves at (\S+)", line)
            if found:
                return cls(process, found[1], folder)
        status = process.wait()
        shutil.rmtree(folder, ignore_errors=True)
        raise ConfigError(f"the server did not start (status {status}; its message is above)")

    def stop(self) -> int:
        """Drains and ends the server. Returns its exit status. Calling it again has no further
        effect.
        """
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        status = self._process.wait(STOP_S)
        if self._process.stdout is not None:
            self._process.stdout.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        return status

    def __enter__(self) -> BackgroundServer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
