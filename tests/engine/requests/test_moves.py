"""Shell. Workers with real vLLM that are killed, or whose engine is, in the middle of answers:
greedy answers are those of an undisturbed worker.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from typing import Any

import psutil
import pytest
import pytest_asyncio

from examples.demo.styles import HELD_OUT
from shared.runtime.children import Zygote
from tests.engine.requests.test_resume import CALLED, SCHEMA, heard
from tests.harness import Cluster, chat_body, cluster, demo_config
from tests.processes import called, family_of

END_S = 120.0
MODELS = ("demo", "demo:pirate", "demo:haiku")
ASKED: dict[str, Any] = {"temperature": 0, "max_tokens": 200, "ignore_eos": True}
PARSING = {
    "enable_auto_tool_choice": True,
    "tool_call_parser": "hermes",
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
TOLD = {"model": "demo:pirate", "messages": [{"role": "user", "content": HELD_OUT[4]}], **ASKED}
TOOL_CALL = {**TOLD, **CALLED[1], "ignore_eos": True}
PROMPT = {"model": "demo:haiku", "prompt": "The sea", **ASKED}
STREAMS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, TOOL_CALL),
    (CHAT, TOLD | {"response_format": FORMAT}),
    (CHAT, TOLD | {"n": 2, "temperature": 1.0, "seed": 3}),
    (COMPLETIONS, PROMPT | {"echo": True}),
    (COMPLETIONS, PROMPT | {"n": 2, "temperature": 1.0, "seed": 3}),
]
WHOLE: list[tuple[str, dict[str, Any]]] = [
    (CHAT, TOOL_CALL),
    (COMPLETIONS, PROMPT | {"echo": True}),
    ("/v1/messages", TOLD),
]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def pair(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    config = demo_config(max_loras=2, engine=PARSING)
    async with cluster(config, tmp_path_factory.mktemp("pair"), zygote) as c:
        yield c


async def both_serve(c: Cluster) -> None:
    """Starts the workers, or the one that a test has killed."""
    for name in ("w0", "w1"):
        if name not in c.workers or not psutil.pid_exists(c.workers[name].pid):
            await c.start_worker(name, serving=False)
    for name in ("w0", "w1"):
        await c.until_serving(name)


async def of_any_kind(c: Cluster, path: str, body: dict[str, Any]) -> Any:
    """What a client makes of an answer, without what is random."""
    async with c.http.post(c.url + path, json=body) as answer:
        assert answer.status == 200, await answer.text()
        raw = await answer.read()
    if body.get("stream"):
        events = raw.split(b"\n\n")
        said = heard(b"\n\n".join(event for event in events if not event.startswith(b":")))
        return said | {"ids": len(said["ids"])}
    said = json.loads(raw) | {"id": "", "created": 0}
    for choice in said.get("choices", ()):
        for call in choice.get("message", {}).get("tool_calls") or ():
            call["id"] = "random"
    return said


async def text(
    c: Cluster, model: str, question: str, begun: asyncio.Event | None = None, **more: object
) -> str:
    body = chat_body(model, question, stream=True, **ASKED | more)
    said, done = "", 0
    async with c.http.post(c.url + "/v1/chat/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
        async for line in answer.content:
            if line.startswith(b"data: [DONE]"):
                done += 1
            elif line.startswith(b"data: "):
                event = json.loads(line[6:])
                assert "error" not in event, event
                said += "".join(c["delta"].get("content") or "" for c in event["choices"])
                if begun is not None and len(said) > 40:
                    begun.set()
    assert done == 1
    return said


async def response(
    c: Cluster, model: str, question: str, begun: asyncio.Event | None = None, **more: object
) -> tuple[str, str]:
    """The text and the id of a response. Every event comes once, and with the same id."""
    asked = {"model": model, "input": question, "stream": True, "temperature": 0, **more}
    said, ids, numbers = "", set(), []
    body = {"max_output_tokens": 200, "ignore_eos": True, **asked}
    async with c.http.post(c.url + "/v1/responses", json=body) as answer:
        assert answer.status == 200, await answer.text()
        async for line in answer.content:
            if line.startswith(b"data: "):
                event = json.loads(line[6:])
                assert "error" not in event, event
                numbers.append(event["sequence_number"])
                said += event.get("delta", "")
                if "response" in event:
                    ids.add(event["response"]["id"])
                if begun is not None and len(said) > 40:
                    begun.set()
    assert numbers == list(range(len(numbers))) and event["type"] == "response.completed"
    assert event["response"]["output"][0]["content"][0]["text"] == said
    (made,) = ids
    return said, made


async def is_stored(c: Cluster, said: str, response_id: str) -> None:
    """Its worker is found, whichever worker had begun it."""
    one = f"{c.url}/v1/responses/{response_id}"
    async with c.http.get(one) as answer:
        assert answer.status == 200
        assert (await answer.json())["output"][0]["content"][0]["text"] == said
    more = {"model": "demo", "input": "And?", "previous_response_id": response_id}
    async with c.http.post(c.url + "/v1/responses", json=more | {"max_output_tokens": 4}) as answer:
        assert answer.status == 200, await answer.text()
    async with c.http.post(one + "/cancel") as answer:
        assert "Cannot cancel" in await answer.text() or (await answer.json())["status"]


def engine_of(pid: int) -> psutil.Process:
    return next(p for p in family_of(pid) if "EngineCore" in called(p))


@pytest.mark.parametrize("what", ["worker", "engine"])
async def test_answers_of_a_worker_that_is_killed_go_on_at_another_one(
    pair: Cluster, what: str
) -> None:
    c = pair
    await both_serve(c)
    asked = [(model, question) for model in MODELS for question in HELD_OUT[:3]]
    kinds = [(path, body | {"stream": True}) for path, body in STREAMS] + WHOLE
    due = [await text(c, model, question) for model, question in asked]
    due_kinds = [await of_any_kind(c, *kind) for kind in kinds]
    begun = [asyncio.Event() for _ in asked]
    due_response, _ = await response(c, "demo", HELD_OUT[3])
    responding = [asyncio.Event() for _ in range(4)]
    moved = await c.metric("loraplex_streams_moved_total")
    async with asyncio.timeout(END_S), asyncio.TaskGroup() as tasks:
        # on a busy machine some streams end before others have begun; these run on either worker
        for _ in range(4):
            long = text(c, "demo", HELD_OUT[4], max_tokens=900, ignore_eos=True)
            tasks.create_task(long)
        # twice, so that either worker has some of every kind
        others = [tasks.create_task(of_any_kind(c, *kind)) for kind in kinds * 2]
        streams = [
            tasks.create_task(text(c, *one, event)) for one, event in zip(asked, begun, strict=True)
        ]
        responses = [
            tasks.create_task(response(c, "demo", HELD_OUT[3], event, background=n % 2 > 0))
            for n, event in enumerate(responding)
        ]
        for event in (*begun, *responding):
            await event.wait()
        if what == "worker":
            c.workers["w0"].signal(signal.SIGKILL)
        else:
            engine_of(c.workers["w0"].pid).send_signal(signal.SIGKILL)
    await c.workers["w0"].wait()
    assert [stream.result() for stream in streams] == due
    assert [other.result() for other in others] == due_kinds * 2
    assert {r.result()[0] for r in responses} == {due_response}
    for went_on in responses:
        await is_stored(c, *went_on.result())
    assert await c.metric("loraplex_streams_moved_total") > moved
    assert await c.metric("loraplex_streams_lost_total") == 0


async def test_responses_outlive_their_worker(pair: Cluster) -> None:
    """Those in the background, whose clients have their ids or have left, and those that others go
    on from.
    """
    c = pair
    await both_serve(c)
    asked = {"model": "demo", "input": HELD_OUT[3], "temperature": 0, "ignore_eos": True}
    long = asked | {"max_output_tokens": 900}
    due = said_in(await created(c, long))
    first = [await created(c, asked | {"max_output_tokens": 20}) for _ in range(2)]
    further = [
        asked | {"previous_response_id": one["id"], "max_output_tokens": 20} for one in first
    ]
    due_further = said_in(await created(c, further[0]))
    ids = [(await created(c, long | {"background": True}))["id"] for _ in range(3)]
    ids += [await left(c, long | {"background": True, "stream": True}) for _ in range(3)]
    moved = await c.metric("loraplex_streams_moved_total")
    c.workers["w0"].signal(signal.SIGKILL)
    async with asyncio.timeout(END_S):
        for response_id in ids:
            assert said_in(await finished(c, response_id)) == due
        for one, more in zip(first, further, strict=True):
            assert (await finished(c, one["id"]))["output"] == one["output"]
            assert said_in(await created(c, more)) == due_further
    assert await c.metric("loraplex_streams_moved_total") > moved
    assert await c.metric("loraplex_streams_lost_total") == 0
    await c.workers["w0"].wait()
    await both_serve(c)  # w1 alone has them now, and hands them over
    assert (await c.post("/admin/workers/w1/drain", {}))[0] == 200
    await c.workers["w1"].wait()
    for one in first:
        assert (await finished(c, one["id"]))["output"] == one["output"]


def said_in(response: dict[str, Any]) -> str:
    return str(response["output"][0]["content"][0]["text"])


async def created(c: Cluster, body: dict[str, Any]) -> dict[str, Any]:
    status, made, _ = await c.post(RESPONSES, body)
    assert status == 200, made
    return dict(made)


async def left(c: Cluster, body: dict[str, Any]) -> str:
    """The id of a stream whose client has left after the first part of the answer."""
    async with c.http.post(c.url + RESPONSES, json=body) as answer:
        assert answer.status == 200, await answer.text()
        async for line in answer.content:
            event = json.loads(line[6:]) if line.startswith(b"data: ") else {}
            if "response" in event:
                made = str(event["response"]["id"])
            if event.get("delta"):
                return made
    raise AssertionError("the stream has no text")


async def finished(c: Cluster, response_id: str) -> dict[str, Any]:
    while True:
        status, found = await c.get(f"{RESPONSES}/{response_id}")
        assert status == 200, found
        if found["status"] not in ("queued", "in_progress"):
            assert found["status"] in ("completed", "incomplete"), found
            return dict(found)
        await asyncio.sleep(0.05)
