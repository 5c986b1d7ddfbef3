"""Shell. An adapter that changes under load on real vLLM: every answer is that of one of its
versions, and of the right one.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest_asyncio

from examples.demo.styles import HELD_OUT
from shared.runtime.children import Zygote
from tests.bad_adapters import KINDS
from tests.harness import DEMO, Cluster, cluster, demo_config, replace_file

LIMIT_S = 120
OLD, NEW = "pirate", "haiku"  # two ranks, so that a mix of their files is no valid adapter
PROMPTS = HELD_OUT[:3]
GREEDY = {"temperature": 0, "max_tokens": 32}
LONG = {"temperature": 0, "max_tokens": 400, "ignore_eos": True}


async def say(c: Cluster, model: str, prompt: str, **more: Any) -> tuple[str, str]:
    """(text, version) of one answer."""
    status, body, headers = await c.chat(model, prompt, **more)
    assert status == 200, body
    assert body["model"] == model
    return body["choices"][0]["message"]["content"], headers["x-loraplex-adapter"]


async def only(style: str, folder: Path, zygote: Zygote) -> dict[str, str]:
    """The answer of an engine that has only ever had this version."""
    await asyncio.to_thread(folder.mkdir)
    shutil.copytree(DEMO / "adapters" / style, folder / "store" / "x")
    async with cluster(demo_config(adapters=folder / "store"), folder, zygote) as c:
        await c.start_worker("w0")
        answers = {prompt: (await say(c, "demo:x", prompt, **GREEDY))[0] for prompt in PROMPTS}
        return answers | {"long": (await say(c, "demo:x", PROMPTS[0], **LONG))[0]}


@dataclass
class Changing:
    cluster: Cluster
    adapter: Path
    old: dict[str, str]
    new: dict[str, str]
    # prompt, text, version; in the order in which they were asked for
    answers: list[tuple[str, str, str]] = field(default_factory=list)

    async def ask_for_ever(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for n in range(10_000):
                self.answers.append(("", "", ""))
                tasks.create_task(self._ask(n, PROMPTS[n % len(PROMPTS)]))
                while sum(not text for _, text, _ in self.answers) >= 4:
                    await asyncio.sleep(0.01)

    async def _ask(self, number: int, prompt: str) -> None:
        text, version = await say(self.cluster, "demo:x", prompt, **GREEDY)
        self.answers[number] = (prompt, text, version)

    async def some_more(self) -> None:
        target = len(self.answers) + 12
        while len(self.answers) < target or not all(text for _, text, _ in self.answers[:target]):
            await asyncio.sleep(0.02)

    async def version(self) -> str:
        _, card = await self.cluster.get("/v1/models/demo:x")
        return str(card["loraplex_digest"])

    def upload(self, style: str) -> None:
        for file in sorted((DEMO / "adapters" / style).iterdir(), reverse=True):
            replace_file(self.adapter / file.name, file.read_bytes())


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def changing(zygote: Zygote, tmp_path_factory: Any) -> AsyncIterator[Changing]:
    folder: Path = tmp_path_factory.mktemp("change")
    old, new = [await only(style, folder / style, zygote) for style in (OLD, NEW)]
    assert all(old[key] != new[key] for key in old), (
        "the versions must be told apart by every answer"
    )
    served = folder / "served"
    served.mkdir()
    shutil.copytree(DEMO / "adapters" / OLD, served / "store" / "x")
    async with cluster(
        demo_config(adapters=served / "store", catalog_refresh_s=0.3), served, zygote
    ) as c:
        await c.start_worker("w0")
        yield Changing(c, served / "store" / "x", old, new)


async def test_a_changed_adapter_answers_as_an_engine_that_only_ever_had_that_version(
    changing: Changing,
) -> None:
    c = changing.cluster
    await say(c, "demo:x", PROMPTS[0], **GREEDY)
    before = await changing.version()
    load = asyncio.create_task(changing.ask_for_ever())
    try:
        async with asyncio.timeout(LIMIT_S):
            await changing.some_more()
            running = asyncio.create_task(say(c, "demo:x", PROMPTS[0], **LONG))
            while await c.metric("loraplex_worker_load") < 2:
                await asyncio.sleep(0.01)
            asked_before = len(changing.answers)
            changing.upload(NEW)
            while (after := await changing.version()) == before:
                await asyncio.sleep(0.02)
            asked_after = len(changing.answers)
            await changing.some_more()
            assert await running == (changing.old["long"], f"x@{before[:12]}"), (
                "it ran through the switch"
            )
    finally:
        load.cancel()
        await asyncio.wait([load])
    answers = [a for a in changing.answers if a[1]]
    texts = {f"x@{before[:12]}": changing.old, f"x@{after[:12]}": changing.new}
    wrong = [
        (prompt, text, version)
        for prompt, text, version in answers
        if text != texts[version][prompt]
    ]
    assert not wrong
    versions = [version for _, _, version in answers]
    assert versions == sorted(versions, key=list(texts).index), (
        "the old version answered a later request"
    )
    assert versions[:asked_before].count(f"x@{after[:12]}") == 0
    assert len(versions) > asked_after and set(versions[asked_after:]) == {f"x@{after[:12]}"}
    await gone(c, before)


async def gone(c: Cluster, digest: str) -> None:
    """Waits until the worker says that its engine has removed the version and holds one adapter in
    all tiers.
    """
    assert c.gateway is not None
    async with asyncio.timeout(LIMIT_S):
        while not any(
            '"old version unloaded"' in line and digest in line
            for line in c.gateway.output().splitlines()
        ):
            await asyncio.sleep(0.05)
        while await c.metric("loraplex_worker_adapters", worker="w0") != 1:
            await asyncio.sleep(0.05)


async def test_a_new_version_with_nan_changes_no_answer_and_is_named(changing: Changing) -> None:
    c = changing.cluster
    before = await changing.version()
    texts = {prompt: (await say(c, "demo:x", prompt, **GREEDY))[0] for prompt in PROMPTS}
    assert texts == {prompt: changing.new[prompt] for prompt in PROMPTS}
    kind = KINDS["nan"]
    spoiled = c.folder / "spoiled"
    kind.make(DEMO / "adapters" / OLD, spoiled)
    for file in sorted(spoiled.iterdir(), reverse=True):
        replace_file(changing.adapter / file.name, file.read_bytes())
    async with asyncio.timeout(LIMIT_S):
        while await c.metric("loraplex_adapters_refused", base="demo") != 1:
            assert {p: (await say(c, "demo:x", p, **GREEDY))[0] for p in PROMPTS} == texts
    refused = [line for line in c.gateway.output().splitlines() if "new version refused" in line]
    assert json.loads(refused[-1])["code"] == kind.code
    assert await changing.version() == before
    assert {p: (await say(c, "demo:x", p, **GREEDY))[0] for p in PROMPTS} == texts


async def test_an_answer_by_alias_or_digest_bears_the_name_that_was_asked_for(
    changing: Changing,
) -> None:
    c = changing.cluster
    assert (await c.put("/admin/aliases/prod", {"adapter": "x"}))[0] == 200
    digest = await changing.version()
    for model in ("demo:prod", f"demo:x@{digest[:8]}"):
        said = await say(c, model, PROMPTS[0], **GREEDY)
        assert said == (changing.new[PROMPTS[0]], f"x@{digest[:12]}"), c.gateway.output()[-4000:]
        for path, ask in (
            ("chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
            ("completions", {"prompt": "a"}),
        ):
            body = {"model": model, "stream": True, "max_tokens": 3, **ask}
            async with c.http.post(f"{c.url}/v1/{path}", json=body) as answer:
                events = [
                    json.loads(line[6:])
                    for line in (await answer.read()).splitlines()
                    if line.startswith(b"data: {")
                ]
            assert {event["model"] for event in events} == {model}
