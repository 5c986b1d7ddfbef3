"""Shell. `loraplex serve` and its neighbours as a user starts them."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import psutil
import pytest
import yaml

from tests.harness import ROOT, chat_body, make_adapter, sim_config
from tests.processes import command_line, family_of, kill_with_family, lives, still_alive

START_S = 120.0  # generous: vLLM may have to be imported on two busy cores
LORAPLEX = str(Path(sys.executable).parent / "loraplex")


@dataclass
class Served:
    process: asyncio.subprocess.Process
    url: str
    greeting: str
    log: Path

    def family(self) -> list[psutil.Process]:
        return family_of(self.process.pid)

    def named(self, word: str) -> psutil.Process:
        return next(p for p in self.family() if word in command_line(p))


def write_config(folder: Path, replicas: int = 2, **gateway: object) -> Path:
    (folder / "adapters").mkdir(exist_ok=True)
    make_adapter(folder / "adapters", "pirate")
    config = sim_config(folder / "adapters", state_dir=str(folder / "state"), **gateway)
    config["llm_configs"][0]["deployment_config"] = {"num_replicas": replicas}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


async def start(folder: Path, *argv: str) -> tuple[asyncio.subprocess.Process, Path]:
    log = folder / "serve.log"
    with log.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            *argv, stdout=asyncio.subprocess.PIPE, stderr=stderr, cwd=ROOT, start_new_session=True
        )
    return process, log


@asynccontextmanager
async def served(
    folder: Path, *options: str, more: Sequence[object] = (), **gateway: object
) -> AsyncIterator[Served]:
    """`more`: other models beside the simulated one."""
    path = write_config(folder, **gateway)
    if more:
        config = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump({**config, "llm_configs": [*config["llm_configs"], *more]}))
    process, log = await start(folder, LORAPLEX, "serve", str(path), *options)
    try:
        greeting = ""
        async with asyncio.timeout(START_S):
            assert process.stdout is not None
            while "curl -N" not in greeting:
                line = (await process.stdout.readline()).decode()
                assert line, log.read_text()
                greeting += line
        found = re.search(r"serves at (\S+)/v1", greeting)
        assert found
        yield Served(process, found[1], greeting, log)
    finally:
        await kill_with_family(process)


async def chat(url: str, model: str = "sim", **more: object) -> dict[str, object]:
    async with (
        aiohttp.ClientSession() as http,
        http.post(url + "/v1/chat/completions", json=chat_body(model, **more)) as answer,
    ):
        return {
            "status": answer.status,
            "worker": answer.headers.get("x-loraplex-worker"),
            **json.loads(await answer.read()),
        }


@pytest.mark.parametrize("streams", [">/dev/full", "<&- >&-"], ids=["full disk", "closed"])
async def test_serve_goes_on_where_its_greeting_cannot_be_written(
    tmp_path: Path, streams: str
) -> None:
    shell = f'exec "$0" serve "$1" {streams}'
    config = write_config(tmp_path, 1)
    process, log = await start(tmp_path, "sh", "-c", shell, LORAPLEX, str(config))
    try:
        async with asyncio.timeout(START_S):
            while '"state":"serving"' not in log.read_text():
                assert process.returncode is None, log.read_text()
                await asyncio.sleep(0.1)
        found = re.search(r'"url":"([^"]+)"', log.read_text())
        assert found and (await chat(found[1]))["status"] == 200
        process.terminate()
        assert await process.wait() == 0 and "Traceback" not in log.read_text()
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)


async def test_serve_prints_the_url_and_three_lines_that_work_once_all_workers_serve(
    tmp_path: Path,
) -> None:
    async with served(tmp_path) as s:
        assert s.greeting.count("curl") == 3
        async with aiohttp.ClientSession() as http, http.get(s.url + "/ready") as answer:
            assert (await answer.json())["workers"] == {"sim": 2}
        lines = [
            line.strip() for line in s.greeting.splitlines() if line.strip().startswith("curl")
        ]
        for line in lines:
            shell = await asyncio.create_subprocess_shell(
                line.replace("ADAPTER", "pirate"), stdout=-1, stderr=-1
            )
            out, _ = await shell.communicate()
            assert b'"error"' not in out and (b'"object"' in out), (line, out)


async def test_serve_serves_although_its_greeting_cannot_be_written(tmp_path: Path) -> None:
    full, log = os.open("/dev/full", os.O_WRONLY), tmp_path / "serve.log"
    with log.open("wb") as stderr:
        path = write_config(tmp_path)
        argv = (LORAPLEX, "serve", str(path))
        process = await asyncio.create_subprocess_exec(*argv, stdout=full, stderr=stderr, cwd=ROOT)
    os.close(full)
    noted = tmp_path / "state" / "start-times.json"  # written just before the greeting
    try:
        async with asyncio.timeout(START_S):
            while not noted.exists():
                await asyncio.sleep(0.02)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2.0):
                await process.wait()
        assert "Traceback" not in log.read_text()
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def test_ctrl_c_ends_everything_and_leaves_nothing_behind(tmp_path: Path) -> None:
    async with served(tmp_path) as s:
        family = s.family()
        assert len(family) == 3
        s.process.send_signal(signal.SIGINT)
        async with asyncio.timeout(30):
            assert await s.process.wait() == 0
        assert not [p for p in family if lives(p)]
        assert "Traceback" not in s.log.read_text()


async def test_a_killed_serve_takes_its_children_along(tmp_path: Path) -> None:
    async with served(tmp_path) as s:
        family = s.family()
        s.process.send_signal(signal.SIGKILL)
        assert not await still_alive(family, 30)


async def test_a_killed_worker_and_a_killed_gateway_come_back(tmp_path: Path) -> None:
    async with served(tmp_path) as s:
        for name in ("w0", "g0"):
            word = "--worker" if name == "w0" else "--index"
            victim = next(
                p
                for p in s.family()
                if word in command_line(p) and (name in command_line(p) or name == "g0")
            )
            victim.kill()
            async with asyncio.timeout(60):
                while True:
                    try:
                        async with (
                            aiohttp.ClientSession() as http,
                            http.get(s.url + "/ready") as answer,
                        ):
                            if (await answer.json())["workers"] == {
                                "sim": 2
                            } and victim.pid not in [p.pid for p in s.family()]:
                                break
                    except aiohttp.ClientError:
                        pass
                    await asyncio.sleep(0.05)
            assert (await chat(s.url, max_tokens=1))["status"] == 200


async def test_a_used_port_is_a_clear_error(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process, log = await start(
            tmp_path, LORAPLEX, "serve", str(write_config(tmp_path)), "--port", str(port)
        )
        async with asyncio.timeout(60):
            assert await process.wait() == 2
        assert f"cannot listen on 127.0.0.1:{port}: the port is in use" in log.read_text()
        assert "Traceback" not in log.read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gateway": {"prot": 1}}, "did you mean"),
        ({"llm_configs": []}, "llm_configs"),
        ({"llm_config": 1}, "llm_configs"),
    ],
)
async def test_a_typo_in_the_config_is_named_with_its_line(
    tmp_path: Path, change: dict[str, object], said: str
) -> None:
    config = yaml.safe_load(write_config(tmp_path).read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, **change}))
    for verb in ("serve", "check", "gateway"):
        process, log = await start(tmp_path, LORAPLEX, verb, str(tmp_path / "config.yaml"))
        async with asyncio.timeout(60):
            assert await process.wait() == 2
        text = log.read_text()
        assert said in text and "config.yaml:" in text and "Traceback" not in text, text


async def test_a_missing_config_is_a_clear_error(tmp_path: Path) -> None:
    process, log = await start(tmp_path, LORAPLEX, "serve", str(tmp_path / "nowhere.yaml"))
    async with asyncio.timeout(60):
        assert await process.wait() == 2
    assert "nowhere.yaml" in log.read_text() and "Traceback" not in log.read_text()


async def test_gateway_and_worker_started_apart_find_each_other_over_tcp_with_a_secret(
    tmp_path: Path,
) -> None:
    ports = []
    for _ in range(2):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            ports.append(s.getsockname()[1])
    control, data = (f"tcp://127.0.0.1:{p}" for p in ports)
    config = write_config(
        tmp_path, link={"control": control, "data": data, "secret_env": "TEST_LINK_SECRET"}
    )
    env = {**os.environ, "TEST_LINK_SECRET": "a secret of some length"}
    started = []
    try:
        for argv in (
            ["gateway", str(config)],
            ["worker", str(config), "--gateway", control, "--worker", "far"],
        ):
            with (tmp_path / f"{argv[0]}.log").open("wb") as err:
                started.append(
                    await asyncio.create_subprocess_exec(
                        LORAPLEX, *argv, stdout=err, stderr=err, env=env, cwd=ROOT
                    )
                )
        facts = tmp_path / "state" / "run" / "g0.json"
        async with asyncio.timeout(60):
            while not facts.exists():
                await asyncio.sleep(0.05)
            url = f"http://127.0.0.1:{json.loads(facts.read_text())['port']}"
            while (answer := await chat(url, max_tokens=1))["status"] != 200:
                await asyncio.sleep(0.05)
        assert answer["worker"] == "far"
        wrong = {**env, "TEST_LINK_SECRET": "another secret, as long"}
        argv = ["worker", str(config), "--gateway", control, "--worker", "stranger"]
        with (tmp_path / "stranger.log").open("wb") as err:
            started.append(
                await asyncio.create_subprocess_exec(
                    LORAPLEX, *argv, stdout=err, stderr=err, env=wrong, cwd=ROOT
                )
            )
        async with asyncio.timeout(60):
            while "gateway does not answer" not in (tmp_path / "stranger.log").read_text():
                await asyncio.sleep(0.05)
        for _ in range(20):
            assert (await chat(url, max_tokens=1))["worker"] == "far"
        async with aiohttp.ClientSession() as http, http.get(url + "/metrics") as answer_:
            assert "stranger" not in await answer_.text()
    finally:
        for process in started:
            await kill_with_family(process)


async def test_the_python_example_of_ray_runs_with_only_its_imports_changed(tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapters", "pirate")
    script = tmp_path / "example.py"
    script.write_text(
        f"""
from loraplex import LLMConfig, build_openai_app, run

llm_config = LLMConfig(
    model_loading_config={{"model_id": "sim", "model_source": "sim/any"}},
    llm_engine="sim",
    lora_config={{
        "dynamic_lora_loading_path": "{tmp_path}/adapters", "max_num_adapters_per_replica": 4
    }},
    engine_kwargs={{"enable_lora": True, "max_loras": 4, "sim": {{"itl_ms": 1}}}},
    deployment_config={{"autoscaling_config": {{"min_replicas": 1, "max_replicas": 2}}}},
    accelerator_type="A10G",
)
gateway = {{"port": 0, "state_dir": "{tmp_path}/state"}}
app = build_openai_app({{"llm_configs": [llm_config], "gateway": gateway}})

if __name__ == "__main__":
    import json, urllib.request
    server = run(app, blocking=False)
    messages = [{{"role": "user", "content": "hi"}}]
    body = json.dumps({{"model": "sim:pirate", "max_tokens": 1, "messages": messages}}).encode()
    headers = {{"Content-Type": "application/json"}}
    request = urllib.request.Request(server.url + "/chat/completions", body, headers)
    print(json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"])
    print("stopped", server.stop())
"""
    )
    process, log = await start(tmp_path, sys.executable, str(script))
    async with asyncio.timeout(90):
        out, _ = await process.communicate()
    assert b"adapter=pirate" in out and b"stopped 0" in out, (out, log.read_text())


async def test_help_names_every_verb() -> None:
    process = await asyncio.create_subprocess_exec(LORAPLEX, "--help", stdout=-1)
    out, _ = await process.communicate()
    assert process.returncode == 0 and all(
        verb in out.decode() for verb in ("serve", "gateway", "worker", "check")
    )


async def test_a_state_dir_whose_sockets_linux_would_not_allow_is_refused_by_its_name(
    tmp_path: Path,
) -> None:
    """Linux counts bytes, of this letter three."""
    config = write_config(tmp_path)
    state = "/tmp/" + "本" * 32
    config.write_text(
        yaml.safe_dump(yaml.safe_load(config.read_text()) | {"gateway": {"state_dir": state}})
    )
    process, log = await start(tmp_path, LORAPLEX, "gateway", str(config))
    async with asyncio.timeout(START_S):
        assert await process.wait() == 2
    assert f"gateway.state_dir: {state}/run is too long" in log.read_text()
