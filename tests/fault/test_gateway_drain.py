"""Shell. A gateway that is told to end (SIGTERM) while clients keep their connections. Each request
is answered, and each answer says that the connection ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from pathlib import Path

import pytest

from tests.harness import Cluster, chat_body, cluster, sim_config

END_S = 60.0


class KeptAlive:
    """One connection of a client that sends one request after the other."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, c: Cluster) -> KeptAlive:
        port = int(c.url.rpartition(":")[2])
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def ask(self, *, stream: bool, tokens: int = 3) -> tuple[bytes, bytes]:
        """(head, body) of one answer."""
        body = json.dumps(chat_body("sim", max_tokens=tokens, stream=stream)).encode()
        self._writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        head = await self._reader.readuntil(b"\r\n\r\n")
        if stream:
            return head, await self._reader.readuntil(b"\r\n0\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        return head, await self._reader.readexactly(length)

    async def at_end(self) -> bool:
        async with asyncio.timeout(END_S):
            return await self._reader.read() == b""

    def close(self) -> None:
        self._writer.close()


async def until_draining(c: Cluster) -> None:
    assert c.gateway is not None
    async with asyncio.timeout(END_S):
        while "draining" not in c.gateway.output():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_a_request_on_a_kept_alive_connection_is_answered_and_is_its_last(
    stream: bool, adapters: Path, tmp_path: Path
) -> None:
    async with cluster(sim_config(adapters), tmp_path) as c:
        await c.start_worker("w0")
        assert c.gateway is not None
        client = await KeptAlive.open(c)
        head, _ = await client.ask(stream=stream)
        assert b"connection: close" not in head.lower()
        c.gateway.signal(signal.SIGTERM)
        await until_draining(c)
        head, body = await client.ask(stream=stream)
        assert head.startswith(b"HTTP/1.1 200") and b"w1" in body
        assert b"connection: close" in head.lower()
        assert await client.at_end()
        assert await c.gateway.wait() == 0
        client.close()


async def test_clients_who_go_elsewhere_when_told_so_see_no_failure(
    adapters: Path, tmp_path: Path
) -> None:
    """Each client sends requests on one connection until an answer says that it ends."""
    async with cluster(sim_config(adapters), tmp_path) as c:
        await c.start_worker("w0")
        assert c.gateway is not None

        async def lane(number: int) -> int:
            client, answers = await KeptAlive.open(c), 0
            with contextlib.closing(client):
                while True:
                    head, _ = await client.ask(stream=bool(number % 2))
                    assert head.startswith(b"HTTP/1.1 200"), head
                    answers += 1
                    if b"connection: close" in head.lower():
                        return answers

        lanes = [asyncio.create_task(lane(number)) for number in range(32)]
        async with asyncio.timeout(END_S):
            while await c.metric("loraplex_requests_total", outcome="finished") < 200:
                await asyncio.sleep(0.02)
            c.gateway.signal(signal.SIGTERM)
            assert all(await asyncio.gather(*lanes))
        assert await c.gateway.wait() == 0


async def test_a_gateway_that_drains_is_not_ready_and_lets_nobody_new_in(
    adapters: Path, tmp_path: Path
) -> None:
    async with cluster(sim_config(adapters, sim={"itl_ms": 20}), tmp_path) as c:
        await c.start_worker("w0")
        assert c.gateway is not None
        client = await KeptAlive.open(c)
        going = asyncio.create_task(client.ask(stream=True, tokens=100))
        async with asyncio.timeout(END_S):
            while not await c.metric("loraplex_worker_load", worker="w0"):
                await asyncio.sleep(0.02)
        c.gateway.signal(signal.SIGTERM)
        await until_draining(c)
        with pytest.raises(OSError):
            await KeptAlive.open(c)
        _, body = await going
        assert b"w98" in body and b'"error"' not in body
        client.close()
        assert await c.gateway.wait() == 0
