"""Shell. `loraplex serve` scales its workers, up, down, to zero and from zero, and no request fails
by it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
import yaml

from tests.harness import chat_body, make_adapter, sim_config
from tests.integration.test_serve import LORAPLEX, start

WAIT_S = 120.0
QUICK = {
    "min_replicas": 0,
    "max_replicas": 4,
    "target_ongoing_requests": 2,
    "upscale_delay_s": 0.3,
    "downscale_delay_s": 1.0,
    "look_back_period_s": 1.0,
    "metrics_interval_s": 0.2,
}


class Scaled:
    """A running `serve` and its clients."""

    def __init__(
        self, process: asyncio.subprocess.Process, url: str, log: Path, model: str
    ) -> None:
        self.process, self.url, self.log, self.model = process, url, log, model
        self.http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True))
        self.streams: list[str] = []
        self.workers_seen: set[str] = set()

    async def status(self) -> dict[str, Any]:
        async with self.http.get(self.url + "/admin/autoscale") as answer:
            assert answer.status == 200
            found: dict[str, Any] = (await answer.json())["models"][self.model]
            return found

    async def until(self, **wanted: int) -> dict[str, Any]:
        """The first status that is so."""
        async with asyncio.timeout(WAIT_S):
            while True:
                status = await self.status()
                if all(status[name] == value for name, value in wanted.items()):
                    return status
                await asyncio.sleep(0.05)

    async def stream(self, tokens: int, adapter: str = "") -> str:
        """One whole stream, comments included. Fails if it is cut or refused."""
        name = f"{self.model}:{adapter}" if adapter else self.model
        body = chat_body(name, max_tokens=tokens, stream=True, ignore_eos=True)
        async with self.http.post(self.url + "/v1/chat/completions", json=body) as answer:
            text = await answer.text()
            assert answer.status == 200, text
            self.workers_seen.add(answer.headers.get("x-loraplex-worker", ""))
        whole = text.rstrip().endswith("data: [DONE]") and '"finish_reason":"length"' in text
        assert whole, text[-300:]
        self.streams.append(text)
        return text

    async def load(self, clients: int, stop: asyncio.Event, tokens: int = 40) -> None:
        """So many streams at every moment, until told to stop; each ends whole."""

        async def client() -> None:
            while not stop.is_set():
                await self.stream(tokens)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(clients):
                tasks.create_task(client())

    def processes(self, word: str) -> list[psutil.Process]:
        family = psutil.Process(self.process.pid).children(recursive=True)
        return [p for p in family if word in p.cmdline()]


@asynccontextmanager
async def scaled(
    folder: Path, scaling: dict[str, Any], *, deployment: Any = None, **gateway: Any
) -> AsyncIterator[Scaled]:
    for name in ("pirate", "haiku"):
        make_adapter(folder / "adapters", name)
    config = sim_config(
        folder / "adapters", sim={"itl_ms": 25}, state_dir=str(folder / "state"), **gateway
    )
    config["llm_configs"][0]["deployment_config"] = {
        "autoscaling_config": {**QUICK, **scaling},
        **(deployment or {}),
    }
    async with serving(folder, config) as s:
        yield s


@asynccontextmanager
async def serving(
    folder: Path, config: dict[str, Any], model: str = "sim"
) -> AsyncIterator[Scaled]:
    """`loraplex serve` with this config, until the block ends."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    process, log = await start(folder, LORAPLEX, "serve", str(path))
    try:
        async with asyncio.timeout(WAIT_S):
            assert process.stdout is not None
            line = ""
            while "serves at" not in line:
                line = (await process.stdout.readline()).decode()
                assert line, log.read_text()
        s = Scaled(process, line.split("serves at ")[1].split("/v1")[0], log, model)
        async with s.http:
            yield s
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def test_load_steps_up_and_down_to_zero_and_back_fail_no_request_and_cut_no_stream(
    tmp_path: Path,
) -> None:
    async with scaled(tmp_path, {"initial_replicas": 1}, progress_s=0.2) as s:
        once, four = asyncio.Event(), asyncio.Event()
        low = asyncio.create_task(s.load(2, once))
        await s.until(serving=1, wanted=1)
        high = asyncio.create_task(s.load(6, four))
        await s.until(serving=4)
        long = [asyncio.create_task(s.stream(200)) for _ in range(4)]
        await asyncio.sleep(0)
        four.set()
        await high
        await asyncio.gather(*long)
        await s.until(serving=1, draining=0, starting=0)
        once.set()
        await low
        await s.until(serving=0, draining=0, wanted=0)
        async with asyncio.timeout(WAIT_S):
            while s.processes("--worker"):
                await asyncio.sleep(0.05)
        async with s.http.get(s.url + "/ready") as answer:
            assert answer.status == 200
        text = await s.stream(5, "pirate")
        assert ": starting a worker, about " in text
        assert (await s.until(serving=1))["start_s"] > 0
        assert len(s.workers_seen) >= 4 and len(s.streams) > 20
        lost = [line for line in s.log.read_text().splitlines() if '"worker lost"' in line]
        assert lost and all('"requests":0' in line for line in lost), lost


async def test_at_zero_an_unknown_adapter_is_404_at_once_and_a_full_queue_503_with_the_start_time(
    tmp_path: Path,
) -> None:
    async with scaled(
        tmp_path,
        {"initial_replicas": 1, "downscale_delay_s": 0.2},
        deployment={"max_queued_requests": 1},
    ) as s:
        start_s = (await s.until(serving=0, wanted=0, draining=0))["start_s"]
        answer = await s.http.post(
            s.url + "/v1/chat/completions", json=chat_body("sim:nobody", max_tokens=1)
        )
        assert answer.status == 404 and (await s.status())["wanted"] == 0

        async def ask() -> tuple[int, str | None]:
            body = chat_body("sim", max_tokens=1)
            async with s.http.post(s.url + "/v1/chat/completions", json=body) as answer:
                await answer.read()
                return answer.status, answer.headers.get("Retry-After")

        answers = await asyncio.gather(*(ask() for _ in range(5)))
        assert sorted(status for status, _ in answers) == [200, 503, 503, 503, 503]
        told = [int(after) for status, after in answers if status == 503 and after]
        assert len(told) == 4 and max(told) <= start_s + 1 and min(told) >= 1


async def test_the_load_of_several_gateway_processes_counts_together_and_ends_with_its_process(
    tmp_path: Path,
) -> None:
    async with scaled(
        tmp_path, {"min_replicas": 1, "max_replicas": 8, "upscale_delay_s": 1.0}, processes=2
    ) as s:
        streams = [asyncio.create_task(s.stream(4000)) for _ in range(6)]
        try:
            status = await s.until(wanted=3, serving=3)
            assert 4 < status["ongoing"] <= 6 and status["cause"] == "requests"
            for process in s.processes("--index"):
                process.kill()
            async with asyncio.timeout(WAIT_S):
                while True:  # the gateways come back without their requests
                    try:
                        if (await s.status())["ongoing"] == 0:
                            break
                    except (aiohttp.ClientError, AssertionError, KeyError):
                        pass
                    await asyncio.sleep(0.05)
        finally:
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)


async def test_the_command_and_the_path_say_what_is_wanted_and_why(tmp_path: Path) -> None:
    async with scaled(tmp_path, {"min_replicas": 1}) as s:
        status = await s.until(serving=1)
        assert (status["min_replicas"], status["max_replicas"], status["present"]) == (1, 4, 1)
        for option, said in (((), "sim    1       1        0"), (("--json",), '"wanted": 1')):
            command = await asyncio.create_subprocess_exec(
                LORAPLEX, "status", "--url", s.url, *option, stdout=-1
            )
            out, _ = await command.communicate()
            assert command.returncode == 0 and said in out.decode(), out.decode()


async def test_the_adapters_of_a_worker_that_leaves_are_loaded_elsewhere_before_it_retires(
    tmp_path: Path,
) -> None:
    """Two workers, each the only holder of an adapter in use; then the load fits on one."""
    async with scaled(
        tmp_path, {"min_replicas": 1, "initial_replicas": 2, "downscale_delay_s": 3.0}
    ) as s:
        await s.until(serving=2)
        both = [asyncio.create_task(s.stream(240, name)) for name in ("pirate", "haiku")]
        await s.until(draining=1)
        await asyncio.gather(*both)
        status = await s.until(serving=1, draining=0)
        assert status["wanted"] == 1
        async with s.http.get(s.url + "/admin/adapters") as answer:
            rows = {row["name"]: row for row in (await answer.json())["adapters"]}
        holders = {name: [w["tier"] for w in row["workers"]] for name, row in rows.items()}
        assert holders == {"pirate": ["gpu"], "haiku": ["gpu"]}


async def test_a_policy_of_ones_own_is_imported_made_once_and_asked(tmp_path: Path) -> None:
    (tmp_path / "my_rules.py").write_text(
        "class Fixed:\n"
        "    def __init__(self, workers): self.workers = workers\n"
        "    def __call__(self, ctx): return self.workers, {}\n"
    )
    path = os.environ.get("PYTHONPATH", "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{path}")
        policy = {"policy_function": "my_rules:Fixed", "policy_kwargs": {"workers": 2}}
        async with scaled(tmp_path, {"min_replicas": 1, "policy": policy}) as s:
            assert (await s.until(serving=2))["cause"] == "policy"


async def test_a_policy_that_cannot_be_imported_ends_serve_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no_such_rules:f cannot be loaded"):
        async with scaled(tmp_path, {"policy": {"policy_function": "no_such_rules:f"}}):
            pass
