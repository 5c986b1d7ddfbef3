"""Shell. A real Chromium for tests. It is driven by its own protocol (CDP) over a WebSocket,
without a driver and without a further package.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp

from tests.harness import START_S, STOP_S
from tests.processes import kill_with_family

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--remote-debugging-port=0", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--hide-scrollbars", "--disable-extensions"),
)


class Page:
    """One tab. `asked` are the URLs that it has requested. `complaints` are the errors and the
    violations of the content security policy on its console.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.asked: list[str] = []
        self.complaints: list[str] = []

    async def listen(self) -> None:
        async for message in self._socket:
            event = json.loads(message.data)
            if "id" in event:
                self._waiting.pop(event["id"]).set_result(event)
                continue
            facts = event.get("params", {})
            match event["method"]:
                case "Network.requestWillBeSent":
                    self.asked.append(facts["request"]["url"])
                case "Runtime.exceptionThrown":
                    self.complaints.append(json.dumps(facts["exceptionDetails"]))
                case "Log.entryAdded" if facts["entry"]["level"] == "error":
                    self.complaints.append(json.dumps(facts["entry"]))

    async def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        async with asyncio.timeout(STOP_S):
            found = await answer
        assert "error" not in found, (method, found)
        return dict(found["result"])

    async def run(self, script: str) -> Any:
        """The value of a JavaScript expression; promises are waited for."""
        found = await self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, script: str, holds: Callable[[Any], bool] = bool) -> Any:
        seen: Any = None
        try:
            async with asyncio.timeout(STOP_S):
                while not holds(seen := await self.run(script)):
                    await asyncio.sleep(0.05)
        except TimeoutError:
            text = await self.run("document.body.innerText")
            raise AssertionError(f"{script} is still {seen!r} on:\n{text}") from None
        return seen

    async def text(self, selector: str) -> str:
        return str(await self.until(f"document.querySelector({json.dumps(selector)})?.innerText"))

    async def click(self, selector: str) -> None:
        await self.until(f"!!document.querySelector({json.dumps(selector)})")
        await self.run(f"document.querySelector({json.dumps(selector)}).click()")

    async def type(self, selector: str, text: str) -> None:
        await self.until(f"!!document.querySelector({json.dumps(selector)})")
        script = f"document.querySelector({json.dumps(selector)})"
        await self.run(f"{script}.focus(), {script}.select()")
        await self.send("Input.insertText", text=text)

    async def press(self, key: str) -> None:
        """One key, as a person presses it: Tab moves the focus, Enter activates."""
        known = {"Tab": 9, "Enter": 13, "Escape": 27}
        named = {"key": key, "code": key, "windowsVirtualKeyCode": known[key]}
        text = {"text": "\r"} if key == "Enter" else {}
        await self.send("Input.dispatchKeyEvent", type="keyDown", **named, **text)
        await self.send("Input.dispatchKeyEvent", type="keyUp", **named)

    async def open(self, url: str) -> None:
        await self.send("Page.navigate", url=url)

    async def look(self, *, width: int, height: int, dark: bool = False) -> None:
        await self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.send("Emulation.setEmulatedMedia", features=[scheme])

    async def cpu_s(self) -> float:
        """The processor's time that the page's main thread has used for its tasks."""
        await self.send("Performance.enable", timeDomain="threadTicks")
        found = (await self.send("Performance.getMetrics"))["metrics"]
        return float(next(m["value"] for m in found if m["name"] == "TaskDuration"))

    async def picture(self) -> bytes:
        return base64.b64decode((await self.send("Page.captureScreenshot", format="png"))["data"])


@contextlib.asynccontextmanager
async def browser() -> AsyncIterator[Page]:
    """A running browser. Raises AssertionError if no Chromium is installed."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    assert program is not None, "these tests need Chromium: apt-get install chromium"
    async with contextlib.AsyncExitStack() as stack:
        profile = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        process = await asyncio.create_subprocess_exec(
            program, *FLAGS, f"--user-data-dir={profile}", "about:blank",
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        stack.push_async_callback(_end, process)
        http = await stack.enter_async_context(aiohttp.ClientSession())
        socket = await http.ws_connect(await _endpoint(http, Path(profile)), max_msg_size=0)
        page = Page(socket)
        async with asyncio.TaskGroup() as tasks:
            listening = tasks.create_task(page.listen(), name="browser")
            for domain in ("Page", "Runtime", "Network", "Log"):
                await page.send(f"{domain}.enable")
            try:
                yield page
            finally:
                listening.cancel()
                await socket.close()


async def _endpoint(http: aiohttp.ClientSession, profile: Path) -> str:
    """The WebSocket of the browser's one tab."""
    async with asyncio.timeout(START_S):
        while True:
            facts = profile / "DevToolsActivePort"
            if facts.exists() and (port := facts.read_text().partition("\n")[0]):
                async with http.get(f"http://127.0.0.1:{port}/json/list") as answer:
                    tabs = [t for t in await answer.json() if t["type"] == "page"]
                    if tabs:
                        return str(tabs[0]["webSocketDebuggerUrl"])
            await asyncio.sleep(0.05)


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(STOP_S):
            await process.wait()
    except TimeoutError:
        await kill_with_family(process)
