"""Shell. Adapters that change while requests for them come: real gateway and worker processes, with
the simulated engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import Cluster, cluster, make_adapter, replace_file, second_gateway, sim_config

LIMIT_S = 60


def digest_of(body: Any) -> str:
    found = re.search(r"digest=(\w+)", body["choices"][0]["message"]["content"])
    assert found is not None
    return found[1]


class Load:
    """A steady stream of requests. `answers` are (status, digest or code) in the order in which the
    requests were sent.
    """

    def __init__(self, c: Cluster, model: str) -> None:
        self._c, self._model = c, model
        self.answers: list[tuple[int, str]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            while True:
                self.answers.append((0, ""))
                tasks.create_task(self._ask(len(self.answers) - 1))
                await asyncio.sleep(0.01)

    async def _ask(self, number: int) -> None:
        status, body, headers = await self._c.chat(self._model, max_tokens=5)
        found = digest_of(body) if status == 200 else body["error"]["code"]
        if status == 200:
            assert headers["x-loraplex-adapter"] == f"{self._model.partition(':')[2]}@{found[:12]}"
        self.answers[number] = (status, found)

    async def until(self, digest: str) -> None:
        while not self.answers or (200, digest) not in self.answers[-20:]:
            await asyncio.sleep(0.02)

    async def some_more(self, count: int = 20) -> None:
        target = len(self.answers) + count
        while len(self.answers) < target or any(status == 0 for status, _ in self.answers[:target]):
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def load(c: Cluster, model: str) -> AsyncIterator[Load]:
    asked = Load(c, model)
    task = asyncio.create_task(asked.run())
    try:
        async with asyncio.timeout(LIMIT_S):
            yield asked
    finally:
        task.cancel()
        await asyncio.wait([task])


async def listed_digest(c: Cluster, name: str) -> str:
    _, card = await c.get(f"/v1/models/sim:{name}")
    return str(card["loraplex_digest"])


async def until_gone(c: Cluster, count: int) -> None:
    """Waits until the workers hold so many adapters in their engines."""
    async with asyncio.timeout(LIMIT_S):
        while await c.metric("loraplex_worker_adapters") != count:
            await asyncio.sleep(0.05)


async def until_left(c: Cluster, digest: str) -> None:
    """Waits until every worker's engine has unloaded the version as often as it had loaded it. At
    least one worker must have loaded it.
    """
    async with asyncio.timeout(LIMIT_S):
        while True:
            lines = [
                line
                for w in c.workers.values()
                for line in w.output().splitlines()
                if digest in line
            ]
            loaded, unloaded = (
                sum(f'"adapter {what}"' in line for line in lines)
                for what in ("loaded", "unloaded")
            )
            if 0 < loaded == unloaded:
                return
            await asyncio.sleep(0.05)


def new_weights(folder: Path, size: int = 3000) -> None:
    replace_file(folder / "adapter_model.safetensors", b"new" + bytes(size))


def spoil(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    replace_file(folder / "adapter_config.json", json.dumps({**config, "r": 1024}).encode())


async def test_a_replaced_adapter_switches_once_without_a_failed_answer_and_the_old_one_leaves(
    tmp_path: Path, adapters: Path
) -> None:
    folder = make_adapter(adapters, "a")
    async with cluster(
        sim_config(adapters, catalog_refresh_s=0.2, sim={"load_ms": 400}), tmp_path
    ) as c:
        await c.start_worker("w0")
        await c.chat("sim:a", max_tokens=1)
        old = await listed_digest(c, "a")
        async with load(c, "sim:a") as asked:
            await asked.some_more()
            new_weights(folder)
            while (new := await listed_digest(c, "a")) == old:
                await asyncio.sleep(0.02)
            await asked.until(new)
            await asked.some_more()
        answers = [a for a in asked.answers if a[0]]
        assert {status for status, _ in answers} == {200}
        digests = [digest for _, digest in answers]
        assert set(digests) == {old, new}
        assert digests == sorted(digests, key=[old, new].index), (
            "an answer of the old version to a later request"
        )
        assert await c.metric("loraplex_ttft_seconds_count", cold="yes") == 1, (
            "a request waited for the load of the new version"
        )
        await until_left(c, old)
        assert await c.metric("loraplex_adapter_version_changes_total", outcome="switched") == 1


async def test_a_bad_new_version_leaves_the_old_one_in_charge_and_says_why(
    tmp_path: Path, adapters: Path
) -> None:
    folder = make_adapter(adapters, "a")
    async with cluster(sim_config(adapters, catalog_refresh_s=0.2), tmp_path) as c:
        await c.start_worker("w0")
        await c.chat("sim:a", max_tokens=1)
        old = await listed_digest(c, "a")
        good = (folder / "adapter_config.json").read_bytes()
        async with load(c, "sim:a") as asked:
            spoil(folder)
            while await c.metric("loraplex_adapters_refused", base="sim") != 1:
                await asyncio.sleep(0.02)
            await asked.some_more(100)
        assert {a for a in asked.answers if a[0]} == {(200, old)}
        assert c.gateway is not None and "new version refused" in c.gateway.output()
        assert await c.metric("loraplex_adapter_version_changes_total", outcome="refused") == 1, (
            "tried once"
        )
        _, row = await c.get("/admin/adapters/a")
        assert (row["state"], row["update"], row["code"], row["serving"]) == (
            "invalid",
            "refused",
            "invalid_adapter_rank",
            old,
        )
        assert row["digest"] != old and "1024" in row["reason"]
        assert (await c.chat("sim:a@" + "0" * 16))[1]["error"]["message"].count("refused") == 1

        replace_file(folder / "adapter_config.json", good)
        new_weights(folder)
        async with asyncio.timeout(LIMIT_S):
            while (new := digest_of((await c.chat("sim:a", max_tokens=1))[1])) == old:
                await asyncio.sleep(0.02)
        assert await c.metric("loraplex_adapters_refused", base="sim") == 0
        assert new == await listed_digest(c, "a")


async def test_a_pinned_adapter_that_nobody_has_asked_for_yet_is_not_replaced_by_a_bad_one_either(
    tmp_path: Path, adapters: Path
) -> None:
    folder = make_adapter(adapters, "a")
    config = sim_config(adapters, catalog_refresh_s=0.2)
    config["llm_configs"][0]["lora_config"]["pin"] = ["a"]
    async with cluster(config, tmp_path) as c:
        await c.start_worker("w0")
        assert c.gateway is not None
        async with asyncio.timeout(LIMIT_S):
            while "adapter command done" not in c.gateway.output():
                await asyncio.sleep(0.05)
        old = await listed_digest(c, "a")
        good = (folder / "adapter_config.json").read_bytes()
        spoil(folder)
        async with asyncio.timeout(LIMIT_S):
            while await c.metric("loraplex_adapters_refused", base="sim") != 1:
                await asyncio.sleep(0.02)
        assert digest_of((await c.chat("sim:a", max_tokens=1))[1]) == old
        replace_file(folder / "adapter_config.json", good)
        new_weights(folder)
        async with asyncio.timeout(LIMIT_S):
            while (await c.get("/admin/adapters/a"))[1]["serving"] == old:
                await asyncio.sleep(0.02)
            while not (workers := (await c.get("/admin/adapters/a"))[1]["workers"]) or not all(
                w["pinned"] and w["digest"] != old for w in workers
            ):
                await asyncio.sleep(0.05)


@pytest.mark.parametrize("in_one_piece", [False, True])
async def test_an_old_version_that_can_be_had_nowhere_gives_way_at_once(
    tmp_path: Path, adapters: Path, in_one_piece: bool
) -> None:
    """The version's worker is gone with its disk. The store has only the new version, which is bad,
    so clients get its refusal.
    """
    folder = make_adapter(adapters, "a")
    async with cluster(sim_config(adapters, catalog_refresh_s=0.2), tmp_path) as c:
        w0 = await c.start_worker("w0")
        await c.chat("sim:a", max_tokens=1)
        spoil(folder)
        async with asyncio.timeout(LIMIT_S):
            while await c.metric("loraplex_adapters_refused", base="sim") != 1:
                await asyncio.sleep(0.02)
        w0.signal(signal.SIGKILL)
        await w0.wait()
        shutil.rmtree(tmp_path / "state" / "adapters")
        await c.start_worker("w1")
        status, body = await (chat_in_one_piece(c) if in_one_piece else chat(c))
        assert (status, body["error"]["code"]) == (422, "invalid_adapter_rank"), body


@pytest.mark.parametrize("bad", [False, True])
async def test_a_worker_that_is_silent_for_a_moment_still_answers_with_the_version_it_alone_has(
    tmp_path: Path, adapters: Path, bad: bool
) -> None:
    """The store has not all of the new version yet, or it is bad. The other worker is asked in
    vain, for it never had the old one.
    """
    folder = make_adapter(adapters, "a")
    settle_s = 0 if bad else 600
    config = sim_config(adapters, catalog_refresh_s=0.2, adapter_settle_s=settle_s, lease_s=LIMIT_S)
    async with cluster(config, tmp_path) as c:
        for name in ("w0", "w1"):
            await c.start_worker(name, state_dir=tmp_path / name)
        _, body, headers = await c.chat("sim:a", max_tokens=1)
        old, holder = digest_of(body), c.workers[headers["x-loraplex-worker"]]
        async with asyncio.timeout(LIMIT_S):
            if bad:
                spoil(folder)
                while await c.metric("loraplex_adapters_refused", base="sim") != 1:
                    await asyncio.sleep(0.02)
            else:
                new_weights(folder)
            holder.signal(signal.SIGSTOP)
            while await c.metric("loraplex_worker_up", state="serving") != 1:
                await asyncio.sleep(0.02)
            asked = asyncio.create_task(c.chat("sim:a", max_tokens=1))
            in_vain = "/admin/requests?status=adapter_not_found"
            while not (await c.get(in_vain))[1]["requests"]:
                await asyncio.sleep(0.02)
            holder.signal(signal.SIGCONT)
            status, body, headers = await asked
        assert (status, headers.get("x-loraplex-worker")) == (200, holder.name), body
        assert digest_of(body) == old


async def chat(c: Cluster) -> tuple[int, Any]:
    status, body, _ = await c.chat("sim:a", max_tokens=1)
    return status, body


async def chat_in_one_piece(c: Cluster) -> tuple[int, Any]:
    """Head and body in one segment, so that the request takes the fast path. aiohttp's client would
    send two.
    """
    body = json.dumps(
        {"model": "sim:a", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    ).encode()
    host, port = c.url.removeprefix("http://").split(":")
    async with asyncio.timeout(LIMIT_S):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
            b"application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        answer = json.loads(await reader.readexactly(length))
        writer.close()
    return int(head.split()[1]), answer


async def test_a_deleted_adapter_is_not_found_and_leaves_the_engines(
    tmp_path: Path, adapters: Path
) -> None:
    make_adapter(adapters, "a")
    async with cluster(sim_config(adapters, catalog_refresh_s=0.2), tmp_path) as c:
        await c.start_worker("w0")
        await c.chat("sim:a", max_tokens=1)
        await until_gone(c, 1)
        shutil.rmtree(adapters / "a")
        async with asyncio.timeout(LIMIT_S):
            while (await c.chat("sim:a", max_tokens=1))[0] != 404:
                await asyncio.sleep(0.02)
        await until_gone(c, 0)


async def test_requests_that_run_when_the_version_switches_end_on_the_old_one(
    tmp_path: Path, adapters: Path
) -> None:
    folder = make_adapter(adapters, "a")
    async with cluster(
        sim_config(adapters, catalog_refresh_s=0.2, sim={"itl_ms": 20}), tmp_path
    ) as c:
        await c.start_worker("w0")
        old = digest_of((await c.chat("sim:a", max_tokens=1))[1])
        running = asyncio.create_task(c.chat("sim:a", max_tokens=150))
        async with asyncio.timeout(LIMIT_S):
            while await c.metric("loraplex_worker_load") != 1:
                await asyncio.sleep(0.01)
            new_weights(folder)
            while digest_of((await c.chat("sim:a", max_tokens=1))[1]) == old:
                await asyncio.sleep(0.02)
        assert not running.done()
        status, body, _ = await running
        assert (
            status == 200 and digest_of(body) == old and body["usage"]["completion_tokens"] == 150
        )
        await until_gone(c, 1)


async def test_two_gateways_switch_each_by_itself_and_both_end_at_the_new_version(
    tmp_path: Path, adapters: Path
) -> None:
    folder = make_adapter(adapters, "a")
    async with (
        cluster(sim_config(adapters, catalog_refresh_s=0.3), tmp_path) as c,
        second_gateway(c) as other,
    ):
        for name in ("w0", "w1"):
            await c.start_worker(name, gateways=[other.control])
        old = digest_of((await c.chat("sim:a", max_tokens=1))[1])
        async with asyncio.timeout(LIMIT_S):
            while (await other.get("/ready"))[0] != 200:
                await asyncio.sleep(0.02)
        async with load(c, "sim:a") as one, load(other, "sim:a") as two:
            await one.some_more()
            new_weights(folder)
            while digest_of((await c.chat("sim:a", max_tokens=1))[1]) == old:
                await asyncio.sleep(0.02)
            new = await listed_digest(c, "a")
            await one.until(new)
            await two.until(new)
        for asked in (one, two):
            answers = [a for a in asked.answers if a[0]]
            assert {status for status, _ in answers} == {200} and {d for _, d in answers} <= {
                old,
                new,
            }
        await until_left(c, old)


# ---- by digest -----------------------------------------------------------------------------------


async def test_a_version_can_be_asked_for_by_its_digest_while_a_worker_has_it(
    tmp_path: Path, adapters: Path
) -> None:
    folder = make_adapter(adapters, "a")
    async with cluster(sim_config(adapters, catalog_refresh_s=0.2), tmp_path) as c:
        await c.start_worker("w0")
        old = digest_of((await c.chat("sim:a", max_tokens=1))[1])
        for spec in (old, old[:8]):
            status, body, headers = await c.chat(f"sim:a@{spec}", max_tokens=1)
            assert status == 200 and digest_of(body) == old and body["model"] == f"sim:a@{spec}"
            assert headers["x-loraplex-adapter"] == f"a@{old[:12]}"
        new_weights(folder)
        async with asyncio.timeout(LIMIT_S):
            while (new := digest_of((await c.chat("sim:a", max_tokens=1))[1])) == old:
                await asyncio.sleep(0.02)
        assert digest_of((await c.chat(f"sim:a@{old}", max_tokens=1))[1]) == old, (
            "from a worker's disk"
        )
        assert digest_of((await c.chat(f"sim:a@{new[:8]}", max_tokens=1))[1]) == new
        assert digest_of((await c.chat("sim:a", max_tokens=1))[1]) == new, (
            "asking for the old one changed nothing"
        )


@pytest.mark.parametrize(
    "spec",
    ["", "1234567", "0123456789abcdef", "01234567", "0123456789abcdef0", "ABCDEF01", "../../etc"],
)
async def test_a_version_that_nobody_has_is_not_found_and_the_answer_says_which_there_are(
    versioned: Cluster, spec: str
) -> None:
    status, body, _ = await versioned.chat(f"sim:a@{spec}", max_tokens=1)
    assert (status, body["error"]["code"], body["error"]["param"]) == (
        404,
        "adapter_not_found",
        "model",
    ), body
    if len(spec) in (8, 16) and spec.islower():
        assert f"{await listed_digest(versioned, 'a')} (current)" in body["error"]["message"]


@pytest.fixture(scope="module")
async def versioned(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    folder = tmp_path_factory.mktemp("versions")
    make_adapter(folder / "adapters", "a")
    async with cluster(sim_config(folder / "adapters"), folder) as c:
        await c.start_worker("w0")
        assert (await c.chat("sim:a", max_tokens=1))[0] == 200
        yield c
