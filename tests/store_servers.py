"""Real S3 and GCS servers for tests, as processes on loopback, and one way to put files into any
store.

Everything is a context manager. Pytest fixtures are built on them: `moto_url` and `gcs_url` (one
process each per session) and `store_credentials`.
"""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, urlsplit

import aiohttp
import pytest
from aiohttp import web

READY_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 10.0


NPM_TIMEOUT_S = 300


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True)
class StoreProcess:
    """A running server: its base URL, and its process, so that a test may kill it."""

    url: str
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(STOP_TIMEOUT_S)


@contextmanager
def _server(
    command: list[str], port: int, ready_path: str, ready_status: int = 200
) -> Iterator[StoreProcess]:
    """Starts a console script of this virtual environment, or a program by its path. Waits until it
    answers, and ends it by its process id.
    """
    script = Path(sys.executable).parent / command[0]
    process = subprocess.Popen(
        [str(script), *command[1:]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait_ready(process, port, ready_path, ready_status)
        yield StoreProcess(f"http://127.0.0.1:{port}", process)
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_TIMEOUT_S)


def _wait_ready(
    process: subprocess.Popen[bytes], port: int, ready_path: str, ready_status: int
) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ended with {process.returncode} before it served")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", ready_path)
            if connection.getresponse().status == ready_status:
                return
        except OSError:
            time.sleep(0.05)  # Nobody listens yet, and the process offers no event to wait for.
        finally:
            connection.close()
    raise TimeoutError(f"{process.args!r} did not serve within {READY_TIMEOUT_S} s")


def _azurite_program(home: Path) -> Path:
    """Installs Azurite into `home` once. Test processes that run side by side wait for each other:
    npm fails when two of it write into one folder.
    """
    home.mkdir(exist_ok=True)
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        program = home / "node_modules" / ".bin" / "azurite-blob"
        if not program.exists():
            argv = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(home)]
            subprocess.run([*argv, "azurite@3"], check=True, timeout=NPM_TIMEOUT_S)
    return program


@contextmanager
def azurite_process(folder: Path) -> Iterator[StoreProcess]:
    """Microsoft's own emulator of Azure Blob Storage, from npm. It is installed beside this
    environment.
    """
    program = _azurite_program(Path(sys.prefix) / "azurite")
    port = free_port()
    argv = ["--blobPort", str(port), "--location", str(folder), "--silent"]
    command = [str(program), *argv, "--skipApiVersionCheck"]
    with _server(command, port, "/", ready_status=400) as server:  # no account is named
        yield server


@contextmanager
def moto_process() -> Iterator[StoreProcess]:
    """An S3 server (and the rest of AWS) that keeps everything in memory."""
    port = free_port()
    with _server(
        ["moto_server", "-H", "127.0.0.1", "-p", str(port)], port, "/moto-api/data.json"
    ) as server:
        yield server


@contextmanager
def gcs_process() -> Iterator[StoreProcess]:
    """A GCS server that keeps everything in memory. It never paginates and it ignores
    preconditions; see `paging_proxy`.
    """
    port = free_port()
    with _server(
        ["gcp-storage-emulator", "start", "--host", "127.0.0.1", "--port", str(port), "-M", "-q"],
        port,
        "/",
    ) as server:
        yield server


@pytest.fixture(scope="session")
def moto_url() -> Iterator[str]:
    with moto_process() as server:
        yield server.url


@pytest.fixture(scope="session")
def gcs_url() -> Iterator[str]:
    with gcs_process() as server:
        yield server.url


@pytest.fixture
def store_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials for moto, and nothing from this host: no profile, no instance role, no exported
    emulator.
    """
    for name in [
        n for n in os.environ if n.startswith(("AWS_", "GOOGLE_")) or n == "STORAGE_EMULATOR_HOST"
    ]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test-access-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret-key")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)


@dataclass
class HTTP:
    """One kept-alive connection for seeding. An SDK would take ten times as long for a thousand
    small files.
    """

    base_url: str
    connection: http.client.HTTPConnection = field(init=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        self.connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)

    def __call__(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> bytes:
        self.connection.request(method, path, body, dict(headers or {}))
        reply = self.connection.getresponse()
        data = reply.read()
        if reply.status >= 300:
            raise RuntimeError(f"{method} {path}: {reply.status} {data[:200]!r}")
        return data


class LocalPlace:
    """A folder to put files into, and what `open_store` needs to read them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"file://{folder}"
        self.options: dict[str, object] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, key: str, data: bytes) -> None:
        target = self.folder / key
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(target.name + ".part")
        aside.write_bytes(data)
        aside.rename(target)

    def delete(self, key: str) -> None:
        (self.folder / key).unlink()

    def elsewhere(self, name: str) -> str:
        return f"file://{self.folder.parent / name}"


# moto accepts any signature, but an unsigned client may not replace or delete an object.
_SIGNED = {
    "Authorization": "AWS4-HMAC-SHA256 Credential=test/20200101/us-east-1/s3/aws4_request, "
    "SignedHeaders=host, Signature=0"
}


class S3Place:
    """A prefix in a bucket of a moto server."""

    def __init__(self, base_url: str, bucket: str, prefix: str) -> None:
        self._http, self._bucket, self._prefix = HTTP(base_url), bucket, prefix
        self.url = f"s3://{bucket}/{prefix}"
        self.options: dict[str, object] = {"endpoint_url": base_url, "region": "us-east-1"}
        self._http("PUT", f"/{bucket}", headers=_SIGNED)

    def put(self, key: str, data: bytes) -> None:
        self._http("PUT", f"/{self._bucket}/{quote(self._prefix + key)}", data, _SIGNED)

    def delete(self, key: str) -> None:
        self._http("DELETE", f"/{self._bucket}/{quote(self._prefix + key)}", headers=_SIGNED)

    def elsewhere(self, name: str) -> str:
        return f"s3://{name}/{self._prefix}"

    @contextmanager
    def access_denied(self) -> Iterator[None]:
        """While inside, the server checks signatures and accepts no key."""
        plain = {"Content-Type": "text/plain"}
        self._http("POST", "/moto-api/reset-auth", b"0", plain)
        try:
            yield
        finally:
            self._http("POST", "/moto-api/reset-auth", b"inf", plain)


class GCSPlace:
    """A prefix in a bucket of a GCS server."""

    def __init__(self, base_url: str, bucket: str, prefix: str) -> None:
        self._http, self._bucket, self._prefix = HTTP(base_url), bucket, prefix
        self.url = f"gs://{bucket}/{prefix}"
        self.options: dict[str, object] = {"endpoint_url": base_url}
        self._http(
            "POST",
            "/storage/v1/b?project=test",
            json.dumps({"name": bucket}).encode(),
            {"Content-Type": "application/json"},
        )

    def put(self, key: str, data: bytes) -> None:
        path, name = f"/upload/storage/v1/b/{self._bucket}/o", self._prefix + key
        if data:
            self._http(
                "POST",
                f"{path}?uploadType=media&name={quote(name, safe='')}",
                data,
                {"Content-Type": "application/octet-stream"},
            )
            return
        # The emulator breaks on an empty plain upload, not on an empty part.
        meta = json.dumps({"name": name})
        parts = (
            f"--b\r\nContent-Type: application/json\r\n\r\n{meta}\r\n--b\r\nContent-Type: "
            "text/plain\r\n\r\n\r\n--b--\r\n"
        )
        self._http(
            "POST",
            f"{path}?uploadType=multipart",
            parts.encode(),
            {"Content-Type": "multipart/related; boundary=b"},
        )

    def delete(self, key: str) -> None:
        self._http("DELETE", f"/storage/v1/b/{self._bucket}/o/{quote(self._prefix + key, safe='')}")

    def elsewhere(self, name: str) -> str:
        return f"gs://{name}/{self._prefix}"


Place = LocalPlace | S3Place | GCSPlace
Respond = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def http_server(
    respond: Respond, certificate: ssl.SSLContext | None = None
) -> AsyncIterator[str]:
    """An HTTP server of the test's own, with a certificate an HTTPS server. `respond` makes every
    answer, for replies that no emulator gives.
    """
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", respond)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=certificate)
        await site.start()
        host, port = runner.addresses[0][:2]
        yield f"{'https' if certificate else 'http'}://{host}:{port}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def paging_proxy(gcs_base_url: str, page_size: int) -> AsyncIterator[tuple[str, list[str]]]:
    """A proxy in front of a GCS server that cuts its listings into pages, as GCS does. Yields its
    URL and the page tokens that it was asked for.
    """
    asked: list[str] = []

    async def respond(request: web.Request) -> web.Response:
        async with (
            aiohttp.ClientSession() as upstream,
            upstream.get(gcs_base_url + request.raw_path) as reply,
        ):
            data, kind = await reply.read(), reply.headers.get("Content-Type", "")
        if reply.status == 200 and request.path.endswith("/o"):
            start = int(request.query.get("pageToken") or 0)
            asked.append(request.query.get("pageToken", ""))
            listing = json.loads(data)
            if start + page_size < len(listing["items"]):
                listing["nextPageToken"] = str(start + page_size)
            listing["items"] = listing["items"][start : start + page_size]
            data = json.dumps(listing).encode()
        return web.Response(
            status=reply.status, body=data, headers={"Content-Type": kind} if kind else None
        )

    async with http_server(respond) as url:
        yield url, asked
