"""Shell. What the `loraplex` command says when it is used wrongly: one line, no traceback."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from loraplex import __version__
from tests.harness import ROOT

CONFIG = str(ROOT / "examples/sim.yaml")
LORAPLEX = str(Path(sys.executable).with_name("loraplex"))
STOP_S = 60.0


async def loraplex(*argv: str | bytes) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(LORAPLEX, *argv, stdout=-1, stderr=-1)
    async with asyncio.timeout(STOP_S):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, (out + err).decode()


async def test_the_version_is_printed() -> None:
    assert await loraplex("--version") == (0, f"loraplex {__version__}\n")


@pytest.mark.parametrize(
    ("argv", "status", "said"),
    [
        (["worker", CONFIG, "--gateway", "foo"], 2, "--gateway foo: expected tcp://host:port"),
        (["worker", CONFIG, "--gateway", "tcp://127.0.0.1"], 2, "--gateway tcp://127.0.0.1:"),
        (["worker", CONFIG, "--gateway", "tcp://127.0.0.1:0"], 2, "--gateway tcp://127.0.0.1:0:"),
        (["worker", CONFIG, "--gateway", "tcp://h:65536"], 2, "--gateway tcp://h:65536:"),
        (["gateway", CONFIG, "--index", "-1"], 2, "--index -1"),
        (["serve", CONFIG, "--port", "99999"], 2, "--port 99999"),
        (["serve", CONFIG, "--host", "999.1.1.1"], 2, "--host"),
        (["serve", CONFIG, "--host", "203.0.113.7"], 2, "--host"),
        (["serve", CONFIG, "--host", "a..b"], 2, "--host"),
        (["adapters", "ls", "--url", "127.0.0.1:8000"], 2, "--url: expected http://host:port"),
        (["adapters", "ls", "--url", "http://127.0.0.1:99999"], 2, "--url: expected"),
        (["adapters", "ls", "--url", "http://[::1"], 2, "--url: expected"),
        (["adapters", "ls", "--url", "http://a..b:1"], 1, "no gateway answers at http://a..b:1"),
        (["bench", "load", "--url", "foo"], 2, "--url"),
        (["chat", "m", "--url", "foo", "--prompt", "x"], 2, "--url: expected http://host:port"),
        (["chat", "m", "--prompt", ""], 2, "--prompt"),
        (["rollout", "--url", "http://127.0.0.1:9"], 1, "no gateway answers"),
        (["keys", "new", "a b", "--file", "k.yaml"], 2, "loraplex keys: name: the text 'a b'"),
        (["keys", "ls", "--file", "/nosuch.yaml"], 2, "--file: cannot read /nosuch.yaml"),
    ],
    ids=lambda value: "-".join(value[-3:]) if isinstance(value, list) else None,
)
async def test_a_wrong_address_is_answered_with_one_line_that_names_the_option(
    argv: list[str], status: int, said: str
) -> None:
    got, text = await loraplex(*argv)
    lines = [line for line in text.splitlines() if not line.startswith("warning:")]
    assert got == status and len(lines) == 1 and said in lines[0], text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["adapters", "pin", "a", "--timeout", "nan"], "--timeout: a time of more than 0 seconds"),
        (["rollout", "--wait", "inf"], "--wait: a time of 0 seconds or more is needed"),
        (["advise", "--slots", "4.5"], "--slots: a whole number of at least 1 is needed"),
        (["advise", "--ttft-p99", "soon"], "--ttft-p99: a number is needed, got soon"),
        (["bench", "load", "--rate", "fast"], "--rate: a number is needed, got fast"),
        (["chat", "m", "--temperature", "nan"], "--temperature: a number is needed, got nan"),
        (["worker", CONFIG, "--probe-port", "99999"], "--probe-port: a port from 1 to 65535"),
    ],
    ids=lambda value: "-".join(value[-2:]) if isinstance(value, list) else None,
)
async def test_an_option_that_takes_another_number_says_which(argv: list[str], said: str) -> None:
    status, text = await loraplex(*argv)
    assert status == 2 and said in text.splitlines()[-1], text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("streams", "status", "said"),
    [
        (">/dev/full", 1, "loraplex: the output cannot be written: No space left on device\n"),
        (">&-", 0, ""),
        ("<&- >/dev/null", 0, ""),
    ],
)
async def test_an_output_that_takes_nothing_is_no_traceback(
    streams: str, status: int, said: str
) -> None:
    shell = ["sh", "-c", f'exec "$0" check "$1" {streams}', LORAPLEX, CONFIG]
    process = await asyncio.create_subprocess_exec(*shell, stderr=-1)
    async with asyncio.timeout(STOP_S):
        _, err = await process.communicate()
    assert (process.returncode, err.decode()) == (status, said)


async def test_a_name_that_is_no_text_is_no_traceback() -> None:
    async with asyncio.timeout(STOP_S):
        status, text = await loraplex("adapters", "show", b"\xe9", "--url", "http://127.0.0.1:9")
    assert status == 1 and "no gateway answers" in text and "Traceback" not in text


async def test_the_load_test_is_reached_by_the_command() -> None:
    status, text = await loraplex("bench", "load", "--help")
    assert status == 0 and "--adapters-from-models" in text
