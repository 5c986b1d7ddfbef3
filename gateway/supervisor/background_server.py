"""Shell. `run(app, blocking=False)`: a `loraplex serve` that runs as a child process, and ends with
its parent.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import signal
import subprocess
import threading
from collections.abc import Sequence
from concurrent.futures import Future

from loraplex.start import command
from shared.config.llm import Settings
from shared.config.settings_file import write_settings
from shared.errors import ConfigError
from shared.runtime.owned_folder import temporary_folder
from shared.runtime.process import PARENT_ENV

STOP_S = 60.0


class BackgroundServer:
    """A running server. `url` is the base URL for OpenAI clients. `stop()` drains and ends it; so
    does leaving it as a context manager. `files` are removed once it has ended.
    """

    def __init__(
        self, process: subprocess.Popen[str], url: str, files: contextlib.ExitStack
    ) -> None:
        self._process, self._files = process, files
        self.url = url

    @classmethod
    def start(cls, app: Settings) -> BackgroundServer:
        """Starts the server and returns once all workers serve.

        Raises ConfigError if the server ends before that. Its own messages are on stderr.
        """
        files = contextlib.ExitStack()
        folder = files.enter_context(temporary_folder())
        atexit.register(files.close)  # not before: a server whose object nobody keeps goes on
        with contextlib.ExitStack() as failed:
            failed.callback(files.close)
            argv = command("gateway.cli.main", "serve", str(write_settings(app, folder)))
            process = _started(argv)
            # whoever waits here may be interrupted, as in a notebook: nobody else could end it
            failed.callback(_end, process)
            assert process.stdout is not None
            for line in process.stdout:
                found = re.search(r"serves at (\S+)", line)
                if found:
                    failed.pop_all()
                    return cls(process, found[1], files)
            status = process.wait()
        raise ConfigError(f"the server did not start (status {status}; its message is above)")

    def stop(self) -> int:
        """Drains and ends the server. Returns its exit status. Calling it again has no further
        effect.
        """
        status = _end(self._process)
        self._files.close()
        return status

    def __enter__(self) -> BackgroundServer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def _started(argv: Sequence[str]) -> subprocess.Popen[str]:
    """The process, made by a thread that lives as long as it does. The kernel ends it with the
    thread that made it, and that of the caller may be a short one.
    """
    made: Future[subprocess.Popen[str]] = Future()

    def keep() -> None:
        env = {**os.environ, PARENT_ENV: str(os.getpid())}
        try:
            process = subprocess.Popen(
                argv, stdout=subprocess.PIPE, text=True, env=env, start_new_session=True
            )
        except OSError as exc:
            made.set_exception(exc)
        else:
            made.set_result(process)
            process.wait()

    threading.Thread(target=keep, name="loraplex serve", daemon=True).start()
    return made.result()


def _end(process: subprocess.Popen[str]) -> int:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    status = process.wait(STOP_S)
    if process.stdout is not None:
        process.stdout.close()
    return status
