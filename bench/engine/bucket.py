"""Shell. An S3 server of the benchmark's own: moto's, in a process of its own, behind a line of a
known bandwidth where that is wanted.

    python -m bench.engine.bucket HOST PORT BYTES_PER_S LATENCY_S
        # the line: prints its URL, ends with its parent
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

import uvloop

from bench import ROOT
from bench.process import Process, free_ports, until_answers
from shared.runtime.parent_death import die_with_parent

READY_S = 60.0
CHUNK_BYTES = 16 << 10
# moto takes any signature, but lets nobody without one write.
SIGNED = {
    "Authorization": "AWS4-HMAC-SHA256 Credential=bench/20200101/us-east-1/s3/aws4_request, "
    "SignedHeaders=host, Signature=0"
}
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "bench",
    "AWS_SECRET_ACCESS_KEY": "bench",
    "AWS_EC2_METADATA_DISABLED": "true",
}
"""What an SDK needs to speak to it at all."""


@dataclass(frozen=True, slots=True)
class LocalBucket:
    """`url` for workers and gateways, `endpoint` the HTTP server."""

    name: str
    endpoint: str

    @property
    def url(self) -> str:
        return f"s3://{self.name}/p"

    @property
    def options(self) -> dict[str, str]:
        return {"endpoint_url": self.endpoint, "region": "us-east-1"}

    def put(self, files: Mapping[str, bytes]) -> None:
        """Blocks. Keys are relative to `url`."""
        parts = urlsplit(self.endpoint)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
        for path, data in [
            (f"/{self.name}", b""),
            *((f"/{self.name}/{quote('p/' + key)}", data) for key, data in files.items()),
        ]:
            connection.request("PUT", path, data, SIGNED)
            reply = connection.getresponse()
            reply.read()
            if reply.status >= 300 and reply.status != 409:
                raise OSError(f"PUT {path}: {reply.status}")
        connection.close()


@contextlib.asynccontextmanager
async def open_bucket(folder: Path, name: str = "bench") -> AsyncIterator[LocalBucket]:
    """An empty bucket on a server that keeps everything in memory. Raises NotStarted."""
    (port,) = free_ports(1)
    server = Process(
        [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)],
        folder / "moto.log",
    )
    try:
        await until_answers(port, "/moto-api/data.json", server, READY_S)
        yield LocalBucket(name, f"http://127.0.0.1:{port}")
    finally:
        server.stop()


@contextlib.asynccontextmanager
async def behind_line(
    bucket: LocalBucket, folder: Path, bytes_per_s: float, latency_s: float
) -> AsyncIterator[LocalBucket]:
    """The same bucket over a line that all connections share."""
    parts, (port,) = urlsplit(bucket.endpoint), free_ports(1)
    argv = [
        sys.executable,
        "-m",
        "bench.engine.bucket",
        str(parts.hostname),
        str(parts.port),
        str(bytes_per_s),
        str(latency_s),
        str(port),
    ]
    line = Process(argv, folder / "line.log", cwd=ROOT)
    try:
        await until_answers(port, "/moto-api/data.json", line, READY_S)
        yield LocalBucket(bucket.name, f"http://127.0.0.1:{port}")
    finally:
        line.stop()


class _Line:
    """Bytes towards the client leave at `bytes_per_s` in all; every answer begins `latency_s`
    late.
    """

    def __init__(self, host: str, port: int, bytes_per_s: float, latency_s: float) -> None:
        self._host, self._port, self._bytes_per_s, self._latency_s = (
            host,
            port,
            bytes_per_s,
            latency_s,
        )
        self._free_at = 0.0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = asyncio.Event()
        try:
            source, sink = await asyncio.open_connection(self._host, self._port)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._up(reader, sink, asked), name="up")
                group.create_task(self._down(source, writer, asked), name="down")
        except* OSError:
            pass  # either side left
        finally:
            writer.close()

    async def _up(
        self, reader: asyncio.StreamReader, sink: asyncio.StreamWriter, asked: asyncio.Event
    ) -> None:
        while data := await reader.read(CHUNK_BYTES):
            asked.set()
            sink.write(data)
            await sink.drain()
        sink.close()

    async def _down(
        self, source: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: asyncio.Event
    ) -> None:
        while data := await source.read(CHUNK_BYTES):
            if asked.is_set():
                asked.clear()
                await asyncio.sleep(self._latency_s)
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + len(data) / self._bytes_per_s
            await asyncio.sleep(self._free_at - now)
            writer.write(data)
            await writer.drain()
        writer.close()


async def main(host: str, port: str, bytes_per_s: str, latency_s: str, own_port: str) -> None:
    line = _Line(host, int(port), float(bytes_per_s), float(latency_s))
    server = await asyncio.start_server(line.serve, "127.0.0.1", int(own_port))
    await server.serve_forever()


if __name__ == "__main__":
    die_with_parent(signal.SIGTERM, os.getppid())
    uvloop.run(main(*sys.argv[1:]))
