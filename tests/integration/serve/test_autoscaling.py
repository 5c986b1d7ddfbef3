"""Shell. `loraplex serve` scales its workers up, down, to zero and from zero, and no request fails
by it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
import yaml

from tests.harness import chat_body, make_adapter, sim_config
from tests.integration.serve.test_serve import LORAPLEX, start
from tests.processes import command_line, family_of, kill, kill_with_family

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
        """The first status for which this is true."""
        async with asyncio.timeout(WAIT_S):
            while True:
                status = await self.status()
                if all(status.get(name) == value for name, value in wanted.items()):
                    return status
                await asyncio.sleep(0.05)

    async def stream(
        self, tokens: int, adapter: str = "", on_begin: Callable[[], object] = bool
    ) -> str:
        """One whole stream, with its comments. Fails if the stream is cut or refused. `on_begin` is
        called once its first bytes are here.
        """
        name = f"{self.model}:{adapter}" if adapter else self.model
        body = chat_body(name, max_tokens=tokens, stream=True, ignore_eos=True)
        async with self.http.post(self.url + "/v1/chat/completions", json=body) as answer:
            begin = await answer.content.readany()
            on_begin()
            text = (begin + await answer.read()).decode()
            assert answer.status == 200, text
            self.workers_seen.add(answer.headers.get("x-loraplex-worker", ""))
        whole = text.rstrip().endswith("data: [DONE]") and '"finish_reason":"length"' in text
        assert whole, text[-300:]
        self.streams.append(text)
        return text

    async def load(self, clients: int, stop: asyncio.Event, tokens: int = 40) -> None:
        """Keeps so many streams open until it is told to stop. Each must end whole."""

        async def client() -> None:
            while not stop.is_set():
                await self.stream(tokens)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(clients):
                tasks.create_task(client())

    async def hold_the_next_worker(self) -> psutil.Process:
        """Stops it as soon as its process is there."""
        async with asyncio.timeout(WAIT_S):
            while not (found := self.processes("--worker")):
                await asyncio.sleep(0.005)
        found[0].suspend()
        return found[0]

    def processes(self, word: str) -> list[psutil.Process]:
        return [p for p in family_of(self.process.pid) if word in command_line(p)]


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
async def own_rules(folder: Path, source: str) -> AsyncIterator[None]:
    """A module `my_rules` that a `serve` can import, until the block ends."""
    (folder / "my_rules.py").write_text(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        yield


@asynccontextmanager
async def scaled_by_hand(folder: Path, **gateway: Any) -> AsyncIterator[tuple[Scaled, Path]]:
    """As many workers as the file says, which begins with two."""
    wanted = folder / "wanted"
    wanted.write_text("2")
    rule = f"def as_written(ctx): return int(open({str(wanted)!r}).read()), {{}}\n"
    scaling = {"min_replicas": 1, "policy": {"policy_function": "my_rules:as_written"}}
    async with own_rules(folder, rule), scaled(folder, scaling, **gateway) as s:
        yield s, wanted


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
        await kill_with_family(process)


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
        # it is held until the comment is there: a start may be over before the first one is due
        held = asyncio.create_task(s.hold_the_next_worker())
        text = await s.stream(5, "pirate", on_begin=lambda: held.result().resume())
        assert text.startswith(": starting a worker, about "), text
        assert (await s.until(serving=1))["start_s"] > 0
        assert len(s.workers_seen) >= 4 and len(s.streams) > 20
        lost = [line for line in s.log.read_text().splitlines() if '"worker lost"' in line]
        assert lost and all('"requests":0' in line for line in lost), lost


async def test_more_requests_than_the_first_worker_takes_wait_on_for_it_after_a_long_start(
    tmp_path: Path,
) -> None:
    """They have waited for longer than `queue_timeout_s` when it begins to serve."""
    config = sim_config(
        tmp_path / "adapters",
        sim={"itl_ms": 5, "max_num_seqs": 2},
        state_dir=str(tmp_path / "state"),
        queue_timeout_s=2.0,
        progress_s=2.5,
    )
    scaling = {**QUICK, "initial_replicas": 0, "max_replicas": 1}
    config["llm_configs"][0]["deployment_config"] = {"autoscaling_config": scaling}
    async with serving(tmp_path, config) as s:
        held = asyncio.create_task(s.hold_the_next_worker())

        def go_on() -> None:  # its first bytes are the first comment
            if held.result().status() == psutil.STATUS_STOPPED:
                held.result().resume()

        await asyncio.gather(*(s.stream(10, on_begin=go_on) for _ in range(12)))
        assert all(text.startswith(": starting a worker") for text in s.streams)


async def test_where_nobody_may_wait_a_request_that_is_refused_starts_a_worker_all_the_same(
    tmp_path: Path,
) -> None:
    async with scaled(
        tmp_path, {"initial_replicas": 0}, deployment={"max_queued_requests": 0}
    ) as s:
        await s.until(serving=0)
        body = chat_body("sim", max_tokens=1)
        async with s.http.post(s.url + "/v1/chat/completions", json=body) as answer:
            assert answer.status == 503 and answer.headers["Retry-After"]
        await s.until(serving=1)


async def test_a_batch_wakes_a_model_that_sleeps_and_is_whole_before_it_sleeps_again(
    tmp_path: Path,
) -> None:
    scaling = {"initial_replicas": 0, "max_replicas": 1, "downscale_delay_s": 0.2}
    async with scaled(tmp_path, scaling, drain_s=0.2) as s:
        line = {"url": "/v1/chat/completions", "body": chat_body("sim", max_tokens=40)}
        lines = "\n".join(json.dumps({"custom_id": str(n), **line}) for n in range(30))
        form = aiohttp.FormData({"purpose": "batch"})
        form.add_field("file", lines, filename="in.jsonl")
        async with s.http.post(s.url + "/v1/files", data=form) as answer:
            asked = {"input_file_id": (await answer.json())["id"], "completion_window": "24h"}
        asked["endpoint"] = line["url"]
        async with s.http.post(s.url + "/v1/batches", json=asked) as answer:
            batch = (await answer.json())["id"]
        async with asyncio.timeout(WAIT_S):
            while True:
                async with s.http.get(f"{s.url}/v1/batches/{batch}") as answer:
                    found = await answer.json()
                if found["status"] == "completed":
                    break
                await asyncio.sleep(0.05)
        assert found["request_counts"] == {"total": 30, "completed": 30, "failed": 0}
        await s.until(serving=0, draining=0, wanted=0)


async def test_two_models_share_two_gpus_and_no_gpu_ever_has_two_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first takes both under load. One of its workers leaves for the second model, and no
    stream is cut.
    """
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    for name in ("pirate", "haiku"):
        make_adapter(tmp_path / "adapters", name)
    config = sim_config(tmp_path / "adapters", sim={"itl_ms": 20}, state_dir=str(tmp_path / "s"))
    (first,) = config["llm_configs"]
    first["accelerator_config"] = {"kind": "gpu"}
    scaling = {"autoscaling_config": {**QUICK, "max_replicas": 2}}
    first["deployment_config"] = scaling
    config["llm_configs"].append({**first, "model_loading_config": {"model_id": "two"}})
    async with serving(tmp_path, config) as s:
        two = Scaled(s.process, s.url, s.log, "two")
        seen: set[tuple[str, str]] = set()

        async def look() -> None:
            while True:
                taken = []
                for process in s.processes("--worker"):
                    with contextlib.suppress(psutil.Error):
                        model = process.cmdline()[process.cmdline().index("--model") + 1]
                        taken.append((model, process.environ()["CUDA_VISIBLE_DEVICES"]))
                gpus = [gpu for _, gpu in taken]
                assert len(set(gpus)) == len(gpus) and set(gpus) <= {"GPU-a", "GPU-b"}, taken
                seen.update(taken)
                await asyncio.sleep(0.05)

        looking, stop = asyncio.create_task(look()), asyncio.Event()
        try:
            async with two.http:
                load = asyncio.create_task(s.load(8, stop))
                await s.until(serving=2)
                assert {gpu for _, gpu in seen} == {"GPU-a", "GPU-b"}
                assert "adapter=haiku" in await two.stream(20, "haiku")
                assert {model for model, _ in seen} == {"sim", "two"}
                assert "the GPUs of this machine allow" in (await s.status())["reason"]
                stop.set()
                await load
                await s.until(serving=0, draining=0, wanted=0)
                await two.until(serving=0, draining=0, wanted=0)
            assert not looking.done(), looking.exception()
        finally:
            looking.cancel()


async def test_a_worker_that_leaves_gives_its_long_streams_to_another_one_and_does_not_wait(
    tmp_path: Path,
) -> None:
    async with scaled_by_hand(tmp_path, drain_s=0.5) as (s, wanted):
        await s.until(serving=2)
        streams = [asyncio.create_task(s.stream(1200, adapter)) for adapter in ("", "pirate")]
        await s.until(ongoing=2)
        wanted.write_text("1")
        await s.until(serving=1, draining=0, starting=0)
        assert not any(stream.done() for stream in streams)  # 1,200 tokens take 30 s and more
        for text in await asyncio.gather(*streams):
            words = [event for event in text.split("\n\n") if '"content":' in event]
            assert len(words) >= 1200
        assert len(s.workers_seen) == 2
        async with s.http.get(s.url + "/metrics") as answer:
            moved = [x for x in (await answer.text()).splitlines() if "_moved_total{" in x]
        assert sum(float(line.split()[-1]) for line in moved) == 1


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
        async with s.http.get(s.url + "/metrics") as metrics:
            assert 'loraplex_scales_to_zero{base="sim"} 1.0' in await metrics.text()

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
                kill(process)
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


async def test_the_advisor_counts_what_was_asked_for_and_the_command_shows_it(
    tmp_path: Path,
) -> None:
    async with scaled(tmp_path, {"min_replicas": 1, "initial_replicas": 1}) as s:
        await s.until(serving=1)
        await asyncio.gather(*(s.stream(5, name) for name in ("pirate", "haiku", "pirate")))
        await s.stream(5)
        command = await asyncio.create_subprocess_exec(
            *(LORAPLEX, "advise", "--url", s.url, "--miss-rate", "0.5", "--simulate", "--json"),
            stdout=-1,
        )
        out, _ = await command.communicate()
        assert command.returncode == 0, out.decode()
        advice = json.loads(out)[s.model]
        assert (advice["requests"], advice["adapters"]) == (4, 2)
        assert advice["fleet"]["workers"] == 1 and advice["workers"] == 1
        assert advice["simulated"]["requests"] == 15 and advice["simulated"]["workers"] == 1
        async with s.http.get(s.url + "/admin/advise?miss_rate=2") as answer:
            assert answer.status == 400


async def test_the_adapters_of_a_worker_that_leaves_are_loaded_elsewhere_before_it_retires(
    tmp_path: Path,
) -> None:
    """There are two workers, and each is the only holder of an adapter in use. Then one is
    enough. The other leaves as soon as its adapter is loaded, while its stream runs.
    """
    async with scaled_by_hand(tmp_path, drain_s=0.5) as (s, wanted):
        await s.until(serving=2)
        both = [asyncio.create_task(s.stream(600, name)) for name in ("pirate", "haiku")]
        await s.until(ongoing=2)
        wanted.write_text("1")
        await s.until(serving=1, draining=0, wanted=1)
        assert not any(stream.done() for stream in both)
        await asyncio.gather(*both)
        async with s.http.get(s.url + "/admin/adapters") as answer:
            rows = {row["name"]: row for row in (await answer.json())["adapters"]}
        holders = {name: [w["tier"] for w in row["workers"]] for name, row in rows.items()}
        assert holders == {"pirate": ["gpu"], "haiku": ["gpu"]}


async def test_a_policy_of_ones_own_is_imported_made_once_and_asked(tmp_path: Path) -> None:
    rule = (
        "class Fixed:\n"
        "    def __init__(self, workers): self.workers = workers\n"
        "    def __call__(self, ctx): return self.workers, {}\n"
    )
    policy = {"policy_function": "my_rules:Fixed", "policy_kwargs": {"workers": 2}}
    async with (
        own_rules(tmp_path, rule),
        scaled(tmp_path, {"min_replicas": 1, "policy": policy}) as s,
    ):
        assert (await s.until(serving=2))["cause"] == "policy"


async def test_a_policy_that_cannot_be_imported_ends_serve_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no_such_rules:f cannot be loaded"):
        async with scaled(tmp_path, {"policy": {"policy_function": "no_such_rules:f"}}):
            pass
