"""A config file that changes while real gateway processes and a real `serve` use it."""

from __future__ import annotations

import asyncio
import os
import pty
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import yaml

from tests.harness import Cluster, cluster, make_adapter, replace_file, second_gateway, sim_config
from tests.integration.serve.test_serve import LORAPLEX, chat, served, write_config
from tests.processes import command_line, family_of, kill, lives

LIMIT_S = 60


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not await holds():
            await asyncio.sleep(0.05)


def write(folder: Path, config: dict[str, Any]) -> None:
    replace_file(folder / "config.yaml", yaml.safe_dump(config).encode())


async def test_aliases_pins_and_limits_change_in_every_gateway_process_without_a_restart(
    tmp_path: Path, adapters: Path
) -> None:
    for name in ("v1", "v2"):
        make_adapter(adapters, name)
    config = sim_config(adapters, log_level="info")
    async with cluster(config, tmp_path) as c, second_gateway(c) as other:
        await c.start_worker("w0", gateways=[other.control])
        assert (await c.chat("sim:prod", max_tokens=1))[0] == 404
        lora = config["llm_configs"][0]["lora_config"]
        lora["aliases"], lora["pin"] = {"prod": "v2"}, ["v1"]
        config["gateway"] |= {"bounds": {"max_sequences": 1}, "port": 1}
        write(tmp_path, config)

        async def taken(gateway: Cluster) -> bool:
            return (await gateway.chat("sim:prod", max_tokens=1))[0] == 200

        async def pinned() -> bool:
            _, body = await c.get("/admin/adapters?state=pinned")
            return [a["name"] for a in body["adapters"]] == ["v1"]

        for gateway in (c, other):
            await until(lambda gateway=gateway: taken(gateway))  # type: ignore[misc]
            _, _, headers = await gateway.chat("sim:prod", max_tokens=1)
            assert headers["x-loraplex-adapter"].startswith("v2@")
            assert (await gateway.chat("sim", n=2, max_tokens=1))[0] == 400, "a bound of the file"
            assert gateway.gateway is not None
            assert "gateway.port" in gateway.gateway.output(), "what waits for a restart is named"
        await until(pinned)
        assert await c.metric("loraplex_config_reloads_total", outcome="done") >= 1


async def test_a_file_with_a_mistake_changes_nothing_and_is_counted_and_told(
    tmp_path: Path, adapters: Path
) -> None:
    make_adapter(adapters, "v1")
    config = sim_config(adapters)
    config["llm_configs"][0]["lora_config"]["aliases"] = {"prod": "v1"}
    async with cluster(config, tmp_path) as c:
        await c.start_worker("w0")
        config["llm_configs"][0]["lora_config"]["aliases"] = {}
        write(tmp_path, {**config, "gateway": {**config["gateway"], "max_body_byte": 5}})

        async def refused() -> bool:
            return await c.metric("loraplex_config_reloads_total", outcome="refused") == 1

        await until(refused)
        assert c.gateway is not None and "max_body_byte" in c.gateway.output()
        assert (await c.chat("sim:prod", max_tokens=1))[0] == 200
        c.gateway.signal(signal.SIGHUP)

        async def again() -> bool:
            return await c.metric("loraplex_config_reloads_total", outcome="refused") == 2

        await until(again)
        write(tmp_path, config)

        async def mended() -> bool:
            return (await c.chat("sim:prod", max_tokens=1))[0] == 404

        await until(mended)


async def test_serve_reads_it_for_all_its_processes_and_starts_the_workers_that_are_now_wanted(
    tmp_path: Path,
) -> None:
    async with served(tmp_path, processes=2) as s:
        path = write_config(tmp_path, replicas=3, processes=2)
        config = yaml.safe_load(path.read_text())
        config["llm_configs"][0]["lora_config"]["aliases"] = {"prod": "pirate"}
        replace_file(path, yaml.safe_dump(config).encode())
        gateways = {p.pid for p in s.family() if "--index" in command_line(p)}

        async def three() -> bool:
            async with aiohttp.ClientSession() as http, http.get(s.url + "/ready") as answer:
                return bool((await answer.json())["workers"] == {"sim": 3})

        async def everywhere() -> bool:
            """Each new connection may get to the other process."""
            statuses = set()
            for _ in range(12):
                async with (
                    aiohttp.ClientSession() as http,
                    http.get(s.url + "/v1/models/sim:prod") as answer,
                ):
                    statuses.add(answer.status)
            return statuses == {200}

        await until(three)
        await until(everywhere)
        assert "gateway.port" not in s.log.read_text(), "the port that was found for 0 is none"
        assert gateways == {p.pid for p in s.family() if "--index" in command_line(p)}
        replace_file(path, b"llm_configs: 5\n")

        async def refused() -> bool:
            async with aiohttp.ClientSession() as http, http.get(s.url + "/metrics") as answer:
                text = await answer.text()
            return 'loraplex_config_reloads_total{outcome="refused"} 2.0' in text

        await until(refused)
        assert s.process.returncode is None and "llm_configs" in s.log.read_text()


async def test_a_config_that_becomes_a_pipe_or_asks_for_too_many_workers_holds_no_end_of_serve(
    tmp_path: Path,
) -> None:
    async with served(tmp_path, replicas=1) as s, asyncio.timeout(LIMIT_S):

        async def said(words: str) -> None:
            while words not in s.log.read_text():
                await asyncio.sleep(0.05)

        write_config(tmp_path, replicas=10**12)
        await said("at most 1000")
        (tmp_path / "config.yaml").unlink()
        os.mkfifo(tmp_path / "config.yaml")
        await said("is no plain file")
        assert (await chat(s.url))["status"] == 200
        s.process.terminate()
        assert await s.process.wait() == 0


async def test_a_serve_whose_terminal_is_closed_ends(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may ignore it
        os.execv(LORAPLEX, [LORAPLEX, "serve", str(path)])
    process = psutil.Process(pid)
    try:

        async def family() -> bool:
            return len(family_of(pid)) == 3

        await until(family)
        os.close(terminal)
        assert await asyncio.to_thread(os.waitpid, pid, 0) == (pid, 0)
    finally:
        if lives(process):
            for member in [*family_of(pid), process]:
                kill(member)
