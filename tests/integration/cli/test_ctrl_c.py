"""Shell. Ctrl-C and a closed terminal while a command has not come far: it ends at once, without a
traceback, and leaves nothing. tests/engine/boot/test_start.py has the same for the starts of vLLM.

Modules of ours import others. Here one of those is replaced by a module that presses the key, or
that never comes to its end, so the moment is the same on every machine.
"""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import sys
from pathlib import Path

import pytest

from loraplex.start import command
from tests.integration.serve.test_serve import LORAPLEX, served, write_config
from tests.processes import family_of, lives

ENDS_WITHIN_S = 20.0
PRESSED = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
STUCK = (
    "import os, pathlib, time\n"
    "if 'LORAPLEX_SUPERVISOR' in os.environ:\n"
    "    pathlib.Path(__file__).with_name('reached').touch()\n"
    "    time.sleep(60)\n"
    "raise ImportError('only the gateway needs it')\n"
)


async def run(folder: Path, module: str, text: str, *argv: str) -> asyncio.subprocess.Process:
    (folder / f"{module}.py").write_text(text)
    env = os.environ | {"PYTHONPATH": str(folder), "TMPDIR": str(folder / "tmp")}
    (folder / "tmp").mkdir()
    return await asyncio.create_subprocess_exec(
        *argv, env=env, stdout=-1, stderr=-1, start_new_session=True,
        # a shell that runs the tests in the background ignores it
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


@pytest.mark.parametrize(
    "argv",
    [
        [LORAPLEX, "serve", "no-such-file.yaml"],
        [LORAPLEX, "adapters", "ls"],
        command("bench.load", "--url", "http://127.0.0.1:9", "--model", "x", "--requests", "1"),
    ],
    ids=["serve", "adapters", "bench"],
)
async def test_ctrl_c_while_a_command_is_imported_ends_it_with_one_word(
    tmp_path: Path, argv: list[str]
) -> None:
    process = await run(tmp_path, "msgspec", PRESSED, *argv)
    async with asyncio.timeout(ENDS_WITHIN_S):
        said = await process.communicate()
    assert (process.returncode, said) == (130, (b"", b"stopped\n"))


async def test_ctrl_c_while_the_gateway_is_imported_waits_for_nothing(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    process = await run(tmp_path, "prometheus_client", STUCK, LORAPLEX, "serve", str(config))
    async with asyncio.timeout(ENDS_WITHIN_S):
        while not (tmp_path / "reached").exists():
            assert process.returncode is None, await process.communicate()
            await asyncio.sleep(0.02)
        (gateway,) = family_of(process.pid)
        process.send_signal(signal.SIGINT)
        out, err = await process.communicate()
    assert process.returncode == 0 and not out and b"Traceback" not in err, err
    assert b"did not start" not in err
    assert not lives(gateway)
    assert not [*(tmp_path / "tmp").iterdir()]


async def test_a_serve_that_shall_outlive_its_terminal_does(tmp_path: Path) -> None:
    """`nohup` starts it with SIGHUP ignored. It reads its config again then, and goes on."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        async with served(tmp_path, "--port", "0") as s:
            s.process.send_signal(signal.SIGHUP)
            async with asyncio.timeout(ENDS_WITHIN_S):
                while "config read again" not in s.log.read_text():
                    assert s.process.returncode is None
                    await asyncio.sleep(0.02)
    finally:
        signal.signal(signal.SIGHUP, before)


async def test_a_background_job_of_a_shell_ignores_ctrl_c_while_it_is_imported(
    tmp_path: Path,
) -> None:
    """A shell starts it with SIGINT ignored."""
    text = PRESSED.replace("time.sleep(60)", "raise SystemExit(7)")
    ignoring = "import os, signal, sys; signal.signal(2, signal.SIG_IGN); os.execv(*sys.argv[1:2], "
    argv = [sys.executable, "-c", f"{ignoring}sys.argv[1:])", *command("bench.load")]
    process = await run(tmp_path, "msgspec", text, *argv)
    async with asyncio.timeout(ENDS_WITHIN_S):
        await process.communicate()
    assert process.returncode == 7
