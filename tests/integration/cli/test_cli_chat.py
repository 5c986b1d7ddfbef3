"""Shell. `loraplex chat` against a gateway with a simulated worker."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import os
import pty
import signal
import struct
import sys
import termios
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest

from gateway.cli.chat import for_terminal
from tests.harness import ROOT, cluster, make_adapter, sim_config


async def begin(
    url: str, *more: str, stdout: int = -1, env: Mapping[str, str] | None = None
) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "loraplex", "chat", "sim:pirate", "--url", url, *more),
        stdin=-1, stdout=stdout, stderr=-1, cwd=ROOT, env=env,
        # a shell that runs the tests in the background ignores it
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


async def talk(url: str, given: str, *more: str) -> tuple[int, str, str]:
    process = await begin(url, *more)
    out, err = await process.communicate(given.encode())
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_a_conversation_shows_the_answers_and_who_gave_them(
    tmp_path: Path, adapters: Path
) -> None:
    make_adapter(adapters, "pirate")
    async with cluster(sim_config(adapters), tmp_path) as c:
        await c.start_worker("w0")
        status, out, err = await talk(c.url, "hello\n/clear\nagain\n/exit\n", "--max-tokens", "4")
        assert status == 0 and out.count("adapter=pirate") == 2
        assert err.count("worker w0") == 2 and err.count("4 tokens]") == 2 and "tokens/s" in err
        for url in (c.url + "/", c.url + "/v1", c.url + "/v1/"):
            status, out, _ = await talk(url, "", "--prompt", "hi", "--max-tokens", "2")
            assert status == 0 and "adapter=pirate" in out
        status, out, err = await talk(c.url, "", "--prompt", "hi", "--max-tokens", "100000")
        assert status == 1 and "8192 tokens" in err and "Traceback" not in err


WORD = b'data: {"choices": [{"index": 0, "delta": {"content": "one \xc3\xa9"}}]}\n\n'


@contextlib.asynccontextmanager
async def speaking(rest: bytes, stays: bool = False) -> AsyncIterator[str]:
    """A server that says a word, then `rest`, and leaves in the middle of its answer."""

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(b"%x\r\n%b\r\n" % (len(WORD + rest), WORD + rest))
        await writer.drain()
        if stays:
            await reader.read()
        writer.close()

    async with await asyncio.start_server(speak, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize(
    ("rest", "told"),
    [
        (b"", "answer"),
        (b'data: {"error": {"message": "no worker"}}\n\n', "the answer broke off: no worker"),
    ],
)
async def test_an_answer_that_breaks_off_is_told(rest: bytes, told: str) -> None:
    async with speaking(rest) as url:
        status, out, err = await talk(url, "", "--prompt", "hi")
    assert status == 1 and out == "one \xe9\n" and told in err and "Traceback" not in err


async def test_ctrl_c_stops_the_answer_and_not_the_conversation() -> None:
    async with speaking(b"", stays=True) as url:
        process = await begin(url)
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"hi\n")
        assert await process.stdout.readexactly(len("> one \xe9".encode()))
        process.send_signal(signal.SIGINT)
        out, err = await process.communicate(b"/exit\n")
    assert (process.returncode, out, err) == (0, b"\n> ", b"stopped\n")


async def test_what_is_no_text_or_cannot_be_shown_ends_nothing() -> None:
    async with speaking(b"data: [DONE]\n\n") as url:
        env = {"PYTHONIOENCODING": "ascii"}
        process = await begin(url, env=os.environ | env)
        out, err = await process.communicate(b"h\xff\n")
    assert process.returncode == 0 and b"one \\xe9" in out and b"Traceback" not in err


async def test_a_reader_that_leaves_is_no_fault() -> None:
    async with speaking(b"data: [DONE]\n\n") as url:
        unread, end = os.pipe()
        os.close(unread)
        process = await begin(url, "--prompt", "hi", stdout=end)
        os.close(end)
        _, err = await process.communicate()
    assert process.returncode == 141 and b"Traceback" not in err and b"BrokenPipe" not in err


async def test_no_gateway_is_one_line() -> None:
    status, _, err = await talk("http://127.0.0.1:9", "", "--prompt", "hi")
    assert status == 1 and "no gateway answers" in err and "Traceback" not in err


# ---- in a terminal -------------------------------------------------------------------------------

CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"
PROMPT = "\r\n> "
WITHIN_S = 60.0


def _own_terminal() -> None:
    """Tests may run as a background job of a shell, which ignores Ctrl-C."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Terminal:
    """A pseudo-terminal in which `loraplex chat` runs. `until` returns what came before a text."""

    def __init__(self) -> None:
        self._keyboard, self._inside = pty.openpty()
        self._shown, self._news, self._ended = "", asyncio.Event(), False
        self.process: asyncio.subprocess.Process

    async def run(self, *argv: str) -> None:
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "loraplex", "chat", *argv),
            stdin=self._inside, stdout=self._inside, stderr=self._inside, cwd=ROOT,
            env=os.environ | {"TERM": "xterm"}, start_new_session=True,
            preexec_fn=_own_terminal,
        )  # fmt: skip
        os.close(self._inside)
        asyncio.get_running_loop().add_reader(self._keyboard, self._read)

    def _read(self) -> None:
        try:
            self._shown += os.read(self._keyboard, 1 << 16).decode(errors="replace")
        except OSError:  # the last process in it has ended
            self._ended = True
            asyncio.get_running_loop().remove_reader(self._keyboard)
        self._news.set()

    def press(self, keys: str) -> None:
        os.write(self._keyboard, keys.encode())

    def resize(self, rows: int, columns: int) -> None:
        size = struct.pack("HHHH", rows, columns, 0, 0)
        fcntl.ioctl(self._keyboard, termios.TIOCSWINSZ, size)

    async def until(self, text: str) -> str:
        async with asyncio.timeout(WITHIN_S):
            while text not in self._shown:
                assert not self._ended, self._shown
                self._news.clear()
                await self._news.wait()
        before, _, self._shown = self._shown.partition(text)
        return before

    async def close(self) -> int:
        """Closes the window, and returns the command's exit status."""
        asyncio.get_running_loop().remove_reader(self._keyboard)
        os.close(self._keyboard)
        async with asyncio.timeout(WITHIN_S):
            return await self.process.wait()


async def test_a_conversation_in_a_terminal_stands_its_keys_and_its_gateways_end(
    tmp_path: Path, adapters: Path
) -> None:
    make_adapter(adapters, "pirate")
    async with cluster(sim_config(adapters, sim={"itl_ms": 20}), tmp_path) as c:
        await c.start_worker("w0")
        t = Terminal()
        await t.run("sim:pirate", "--url", c.url, "--max-tokens", "1000")
        assert "Ctrl-C stops an answer" in await t.until(PROMPT)
        t.press("hello\r")
        assert "adapter=pirate" in await t.until(" w3 ")
        t.resize(10, 30)
        await t.until(" w6 ")
        t.press(CTRL_C)
        assert "stopped" in await t.until(PROMPT)
        async with asyncio.timeout(WITHIN_S):  # the gateway was told, and the worker ended it
            while not await c.metric("loraplex_requests_total", outcome="aborted"):
                await asyncio.sleep(0.05)
        t.press("a line that is not sent" + CTRL_C)
        await t.until(PROMPT)
        t.press(UP + "\r")  # what was asked before, once more
        assert "hello" in await t.until(" w3 ")
        assert c.gateway is not None
        c.gateway.signal(signal.SIGKILL)
        assert "before it was whole" in await t.until(PROMPT)
        t.press("still there?\r")
        assert "no gateway answers" in await t.until(PROMPT)
        t.press(CTRL_D)
        async with asyncio.timeout(WITHIN_S):
            assert await t.process.wait() == 0
        assert "Traceback" not in t._shown
        await t.close()


async def test_a_closed_terminal_ends_the_conversation(tmp_path: Path, adapters: Path) -> None:
    async with cluster(sim_config(adapters), tmp_path) as c:
        t = Terminal()
        await t.run("sim:nosuch", "--url", c.url)
        await t.until(PROMPT)
        t.press("hi\r")
        assert "`nosuch` of model `sim` does not exist" in await t.until(PROMPT)
        assert await t.close() != 0


def test_what_a_model_writes_commands_no_terminal() -> None:
    written = "\x1b]52;c;aGk=\x07 \x9b2J caf\xe9\tone\r\ntwo\x7f"
    assert for_terminal(written) == "�]52;c;aGk=� �2J caf\xe9\tone\ntwo�"
