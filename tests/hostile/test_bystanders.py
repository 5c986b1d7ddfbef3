"""Shell. Sixteen honest streams of another key beside each attack of the corpus: all are whole, and
the gateway's books, memory and log are as before.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from urllib.parse import urlsplit

from tests.harness import Cluster, chat_body, cluster, sim_config
from tests.hostile.attacks import KEY, corpus

HONEST = "tenant-b-key-000000"
STREAMS, TOKENS, COPIES = 16, 40, 2
MAX_GROWTH_MB = 200
"""Of the gateway; one attack alone sends 2 x 30 MB."""
ATTACK_S = 3.0


async def attack(port: int, data: bytes) -> None:
    """Sends, takes what comes for a moment, and leaves without a word."""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(ATTACK_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(data)
                await writer.drain()
                await asyncio.wait_for(reader.read(100), 0.2)
            finally:
                writer.transport.abort()


async def stream(c: Cluster) -> bytes:
    body = chat_body("sim", stream=True, max_tokens=TOKENS)
    async with c.http.post(
        c.url + "/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {HONEST}"}
    ) as answer:
        assert answer.status == 200
        return await answer.read()


def rss_mb(c: Cluster) -> float:
    assert c.gateway is not None
    pages = int(Path(f"/proc/{c.gateway.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


async def test_no_attack_costs_another_tenant_a_token(tmp_path: Path) -> None:
    attacks = list(corpus())
    assert len(attacks) >= 60
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n{HONEST}\n")
    (tmp_path / "adapters").mkdir()
    config = sim_config(tmp_path / "adapters", api_keys_file=str(keys))
    async with cluster(config, tmp_path) as c:
        await c.start_worker("w0")
        port = urlsplit(c.url).port
        assert port is not None
        before, hurt = rss_mb(c), []
        for name, data in attacks:
            streams = [asyncio.create_task(stream(c)) for _ in range(STREAMS)]
            await asyncio.gather(*(attack(port, data) for _ in range(COPIES)))
            answers = await asyncio.gather(*streams)
            whole = [b"[DONE]" in a and a.count(b'"content"') >= TOKENS for a in answers]
            if not all(whole):
                hurt.append((name, whole.count(False)))
        assert hurt == []
        async with asyncio.timeout(60):
            while await c.metric("loraplex_worker_load"):
                await asyncio.sleep(0.05)
        assert await c.metric("loraplex_internal_errors_total") == 0
        assert await c.metric("loraplex_reservation_repairs_total") == 0
        assert rss_mb(c) < before + MAX_GROWTH_MB
        assert c.gateway is not None and KEY not in c.gateway.output()
        assert "Traceback" not in c.gateway.output()
