"""The simulated engine: its timing, its slots and its answers."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shared.adapters.identity import AdapterRef
from shared.config.engine import SimTiming
from shared.errors import CannotContinue, EngineFailure, InvalidAdapter
from shared.link.token_ids import pack, unpack
from worker.engine.base import Engine, EngineFacts, EngineRequest, EngineStats, Loaded
from worker.engine.sim.answers import SLICE_CHARACTERS, words
from worker.engine.sim.engine import SimEngine

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LIMIT_S = 20
NEVER_MS = 1e7  # nothing that takes this long ends within a test


def adapter(name: str, int_id: int = 1, rank: int = 8, size_bytes: int = 0) -> Loaded:
    return Loaded(
        AdapterRef("tiny", name, f"{int_id:016x}"),
        int_id,
        Path("/nowhere") / name,
        rank,
        size_bytes,
    )


PIRATE = adapter("pirate")
PIRATE_LABEL = "[base=tiny adapter=pirate digest=0000000000000001]"


class Turns:
    """Which streams got a frame in each turn of the event loop."""

    def __init__(self) -> None:
        self.seen: list[set[str]] = []
        self._open = False

    def note(self, name: str) -> None:
        if not self._open:
            self._open = True
            self.seen.append(set())
            asyncio.get_running_loop().call_soon(self._close)
        self.seen[-1].add(name)

    def _close(self) -> None:
        self._open = False


class Frames:
    """A Reply that keeps what it gets and wakes whoever waits for it."""

    def __init__(self, name: str = "", turns: Turns | None = None) -> None:
        self.prompt_tokens = self.output_tokens = 0
        self.name, self._turns = name, turns
        self.status, self.sse, self.ended = 0, False, False
        self.parts: list[bytes] = []
        self.tokens: list[int] = []
        self.times: list[float] = []
        self._news = asyncio.Event()

    def head(self, status: int, sse: bool, data: bytes, end: bool, tokens: bytes = b"") -> None:
        assert not self.parts
        self.status, self.sse = status, sse
        self.progress(tokens)
        self._put(data, end)

    def more(self, data: bytes, end: bool, tokens: bytes = b"") -> None:
        assert self.parts and self.sse
        self.progress(tokens)
        self._put(data, end)

    def progress(self, tokens: bytes) -> None:
        self.tokens += unpack(tokens).get(0, [])

    def lines(self, lines: bytes) -> None:
        raise AssertionError("the simulated engine answers in JSON")

    def _put(self, data: bytes, end: bool) -> None:
        assert not self.ended
        self.parts.append(data)
        self.times.append(time.monotonic())
        self.ended = end
        self._news.set()
        if self._turns is not None:
            self._turns.note(self.name)

    async def at_least(self, frames: int) -> None:
        while len(self.parts) < frames:
            self._news.clear()
            await self._news.wait()

    @property
    def json(self) -> Any:
        return json.loads(b"".join(self.parts))

    @property
    def events(self) -> list[Any]:
        """The decoded events of a stream; its last must be [DONE]."""
        *events, done, rest = b"".join(self.parts).split(b"\n\n")
        assert (done, rest) == (b"data: [DONE]", b"")
        return [json.loads(e.removeprefix(b"data: ")) for e in events]

    @property
    def text(self) -> str:
        return "".join(
            c["delta"].get("content", "") if "delta" in c else c["text"]
            for e in self.events
            for c in e["choices"]
        )


def chat(words: int = 3, use: Loaded | None = None, **fields: Any) -> EngineRequest:
    content = " ".join(["word"] * words)
    return EngineRequest(
        CHAT,
        "r1",
        json.dumps(
            {"model": "m", "messages": [{"role": "user", "content": content}], **fields}
        ).encode(),
        use,
    )


def completion(use: Loaded | None = None, **fields: Any) -> EngineRequest:
    return EngineRequest(
        COMPLETIONS,
        "r1",
        json.dumps({"model": "m", "prompt": "one two three", **fields}).encode(),
        use,
    )


QUICK = SimTiming(ttft_ms=0, itl_ms=1, prefill_tokens_per_s=1e6, load_ms=0, load_ms_per_mb=0)


@asynccontextmanager
async def started(**options: Any) -> AsyncIterator[SimEngine]:
    """`options` are fields of SimTiming and arguments of SimEngine."""
    times = {name: options.pop(name) for name in SimTiming.__struct_fields__ if name in options}
    engine = SimEngine("tiny", msgspec.structs.replace(QUICK, **times), **options)
    async with asyncio.timeout(LIMIT_S):
        await engine.start()
        yield engine
        await engine.stop()


async def answer(engine: SimEngine, call: EngineRequest) -> Frames:
    frames = Frames()
    await engine.serve(call, frames)
    assert frames.ended
    return frames


async def until(engine: SimEngine, holds: Callable[[EngineStats], bool]) -> None:
    """Lets the loop turn until this is true of the engine's figures."""
    while not holds(engine.stats()):
        await asyncio.sleep(0)


async def cancel(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


# ---- a deadly prompt -----------------------------------------------------------------------------


@pytest.mark.parametrize(("prompt", "tokens"), [("deadly", 0), ("it is deadly3", 3)])
async def test_a_prompt_with_the_deadly_word_ends_the_engine_before_its_token(
    prompt: str, tokens: int
) -> None:
    async with started(deadly_word="deadly") as engine:
        deaths: list[str] = []
        engine.died(deaths.append)
        frames = Frames()
        with pytest.raises(EngineFailure):
            await engine.serve(completion(stream=True, prompt=prompt), frames)
        assert len(frames.parts) == tokens and len(deaths) == 1


@pytest.mark.parametrize("prompt", ["deadlyish", "undeadly", "alive"])
async def test_other_prompts_and_engines_without_such_a_word_are_not_ended(prompt: str) -> None:
    async with started(deadly_word="deadly") as engine, started() as another:
        assert (await answer(engine, completion(prompt=prompt))).status == 200
        assert (await answer(another, completion(prompt="deadly"))).status == 200


# ---- answers -------------------------------------------------------------------------------------


async def test_facts_come_from_the_arguments() -> None:
    engine: Engine = SimEngine("tiny", SimTiming(max_num_seqs=7), max_loras=3, max_lora_rank=32)
    assert await engine.start() == EngineFacts(
        "sim",
        capacity=7,
        slots=3,
        max_lora_rank=32,
        host_places=15,
        tasks=("generate",),
        max_model_len=4096,
    )
    assert engine.stats() == EngineStats()
    await engine.stop()


async def test_all_four_kinds_of_answer_hold_the_same_text_of_exactly_max_tokens_words() -> None:
    async with started() as engine:
        await engine.load(PIRATE)
        replies = [
            await answer(engine, make(use=PIRATE, max_tokens=4, stream=stream))
            for make in (chat, completion)
            for stream in (False, True)
        ]
    expected = f"{PIRATE_LABEL} w0 w1 w2"
    assert replies[0].json["choices"][0]["message"] == {"role": "assistant", "content": expected}
    assert replies[2].json["choices"][0]["text"] == expected
    assert replies[1].text == replies[3].text == expected
    assert all((r.status, r.prompt_tokens, r.output_tokens) == (200, 3, 4) for r in replies)
    assert [r.sse for r in replies] == [False, True, False, True]


async def test_the_base_model_is_named_without_an_adapter() -> None:
    async with started() as engine:
        reply = await answer(engine, chat(max_tokens=1))
    assert reply.json["choices"][0]["message"]["content"] == "[base=tiny adapter=- digest=-]"


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({}, 16),
        ({"max_tokens": 2}, 2),
        ({"max_tokens": 2, "max_completion_tokens": 3}, 3),
        # as vLLM's pydantic takes them
        ({"max_tokens": 4.0}, 4),
        ({"max_tokens": " +1_0.0 "}, 10),
        ({"max_tokens": True}, 1),
        ({"max_tokens": 2, "stream": "yes"}, 2),
        ({"max_tokens": 2, "stream": 1.0, "n": "1"}, 2),
    ],
)
async def test_the_number_of_tokens_is_as_asked_or_sixteen(
    fields: dict[str, Any], tokens: int
) -> None:
    async with started() as engine:
        reply = await answer(
            engine, chat(**{"stream": True, "stream_options": {"include_usage": True}, **fields})
        )
    assert len(reply.parts) == tokens == reply.output_tokens
    assert reply.events[-1]["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": tokens,
        "total_tokens": 3 + tokens,
    }


async def test_a_chat_stream_has_the_openai_shape() -> None:
    async with started() as engine:
        reply = await answer(engine, chat(max_tokens=3, stream=True, model='odd "\u0000" name'))
    role, *tokens = reply.events
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [t["choices"][0]["delta"]["content"] for t in tokens] == [
        "[base=tiny adapter=- digest=-]",
        " w0",
        " w1",
    ]
    assert [t["choices"][0]["finish_reason"] for t in tokens] == [None, None, "length"]
    assert {(e["id"], e["object"], e["model"]) for e in reply.events} == {
        ("chatcmpl-r1", "chat.completion.chunk", 'odd "\u0000" name')
    }
    assert all(type(e["created"]) is int and e["choices"][0]["index"] == 0 for e in reply.events)


async def test_names_that_json_must_escape_come_out_whole_in_a_stream() -> None:
    engine = SimEngine('ti"ny\\', SimTiming(itl_ms=0))
    await engine.start()
    assert (
        await answer(engine, completion(max_tokens=1, stream=True))
    ).text == '[base=ti"ny\\ adapter=- digest=-]'
    await engine.stop()


async def test_a_stream_of_one_token_is_one_frame() -> None:
    async with started() as engine:
        reply = await answer(engine, completion(max_tokens=1, stream=True))
    (event,) = reply.events
    assert len(reply.parts) == 1
    assert (event["id"], event["object"]) == ("cmpl-r1", "text_completion")
    assert event["choices"][0]["finish_reason"] == "length"


async def test_a_whole_answer_has_the_openai_shape() -> None:
    async with started() as engine:
        body = (await answer(engine, chat(max_tokens=2))).json
    assert (body["id"], body["object"], body["model"]) == ("chatcmpl-r1", "chat.completion", "m")
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("a b", 2),
        ("", 1),
        (["a b c"], 3),
        ([5, 6, 7, 8], 4),
        ([[5, 6]], 2),
        ("a\n\t b", 2),
        ([7], 1),
    ],
)
async def test_prompt_tokens_are_words_or_given_tokens(prompt: Any, tokens: int) -> None:
    async with started() as engine:
        assert (await answer(engine, completion(prompt=prompt))).prompt_tokens == tokens


@pytest.mark.parametrize("spaces", [" ", "  ", "\n"])
def test_words_of_a_long_text_are_counted_in_pieces_as_in_one(spaces: str) -> None:
    for text in ("word" + spaces, "w", spaces, spaces + "ab", "a" + spaces * 3):
        long = text * (2 * SLICE_CHARACTERS // len(text) + 7)
        assert words(long) == len(long.split())


async def test_words_in_the_text_parts_of_all_messages_count() -> None:
    messages = [
        {"role": "system", "content": "be kind"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "a b"}, {"type": "text", "text": "c"}],
        },
        {"role": "assistant", "content": None},
    ]
    async with started() as engine:
        assert (await answer(engine, chat(messages=messages))).prompt_tokens == 5


BAD: list[tuple[str, bytes, str | None]] = [
    (CHAT, b"{", None),
    (CHAT, b"[]", None),
    (CHAT, b'{"x":' + b"[" * 100_000, None),
    (CHAT, b'{"messages": [{"role": "user", "content": "\xff"}]}', None),
    (CHAT, b"{}", "messages"),
    (CHAT, b'{"messages": []}', "messages"),
    (CHAT, b'{"messages": "hi"}', "messages"),
    (CHAT, b'{"messages": [{"content": "hi"}]}', "messages[0].role"),
    (CHAT, chat(stream="maybe").body, "stream"),
    (CHAT, chat(max_tokens="five").body, "max_tokens"),
    (CHAT, chat(max_tokens=0).body, "max_tokens"),
    (CHAT, chat(max_tokens=-(10**30)).body, "max_tokens"),
    (CHAT, chat(max_tokens=5, max_completion_tokens=0).body, "max_completion_tokens"),
    (CHAT, chat(max_tokens=98).body, "max_tokens"),
    (CHAT, chat(words=100).body, "messages"),
    (CHAT, chat(n=2).body, "n"),
    (COMPLETIONS, b"{}", "prompt"),
    (COMPLETIONS, completion(prompt={}).body, "prompt"),
    (COMPLETIONS, completion(prompt=["a", "b"]).body, "prompt"),
    (COMPLETIONS, completion(prompt=[]).body, "prompt"),
]


@pytest.mark.parametrize(("path", "body", "param"), BAD)
async def test_a_bad_request_is_answered_with_400_and_the_field(
    path: str, body: bytes, param: str | None
) -> None:
    async with started(max_model_len=100) as engine:
        reply = await answer(engine, EngineRequest(path, "r1", body, None))
        assert engine.stats() == EngineStats()
    error = reply.json["error"]
    assert (reply.status, reply.sse, error["type"], error["param"]) == (
        400,
        False,
        "invalid_request_error",
        param,
    )
    assert error["message"]


async def test_what_it_cannot_do_is_answered_with_400_and_names_what_it_can() -> None:
    async with started() as engine:
        frames = await answer(engine, EngineRequest("/v1/embeddings", "r1", b"{}", None))
    assert frames.status == 400 and b"/v1/chat/completions" in frames.parts[0]


async def test_the_context_can_be_filled_to_its_last_token_and_bounds_the_default() -> None:
    async with started(max_model_len=10) as engine:
        assert (await answer(engine, chat(words=3, max_tokens=7))).output_tokens == 7
        assert (await answer(engine, chat(words=8))).output_tokens == 2


# ---- timing --------------------------------------------------------------------------------------


async def test_every_running_stream_moves_in_the_same_turn_of_the_loop() -> None:
    turns = Turns()
    async with started(itl_ms=3) as engine:
        replies = [Frames(str(i), turns) for i in range(8)]
        await asyncio.gather(*(engine.serve(chat(max_tokens=5, stream=True), r) for r in replies))
    assert [len(names) for names in turns.seen] == [8] * 5


async def test_tokens_come_no_faster_than_scripted_and_the_rates_are_measured() -> None:
    async with started(ttft_ms=10, itl_ms=5, prefill_tokens_per_s=1000) as engine:
        before = time.monotonic()
        reply = await answer(engine, chat(words=20, max_tokens=11, stream=True))
        stats = engine.stats()
    # 10 ms + 20 words at 1000/s; timers may be early by a millisecond
    assert reply.times[0] - before >= 0.029
    assert reply.times[-1] - before >= 0.079
    assert stats.step_s >= 0.004
    assert stats.prefill_tokens_per_s == pytest.approx(1000)


async def test_prompts_are_prefilled_one_after_another() -> None:
    async with started(itl_ms=1, prefill_tokens_per_s=1000) as engine:
        before = time.monotonic()
        replies = await asyncio.gather(
            *(answer(engine, chat(words=10, max_tokens=1)) for _ in range(4))
        )
        firsts = [r.times[0] - before for r in replies]
    assert firsts == sorted(firsts)
    assert firsts[-1] >= 0.039


async def test_a_long_prefill_does_not_hold_up_streams_that_decode() -> None:
    async with started(prefill_tokens_per_s=10) as engine:
        first = Frames()
        decoding = asyncio.create_task(
            engine.serve(chat(words=1, max_tokens=2000, stream=True), first)
        )
        await first.at_least(1)
        prefilling = asyncio.create_task(engine.serve(chat(words=100), Frames()))
        await until(engine, lambda s: s.running == 2)
        await first.at_least(len(first.parts) + 20)
        assert engine.signs().prefill_tokens == 100
        await cancel(decoding, prefilling)


async def test_no_more_than_max_num_seqs_run_and_the_others_come_in_order() -> None:
    async with started(max_num_seqs=2, itl_ms=2) as engine:
        order: list[int] = []

        async def call(number: int) -> None:
            await engine.serve(chat(max_tokens=3), Frames())
            order.append(number)

        tasks = [asyncio.create_task(call(i)) for i in range(6)]
        await until(engine, lambda s: s.running == 2)
        assert engine.stats().waiting == 4
        while not all(t.done() for t in tasks):
            assert engine.stats().running <= 2
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED, timeout=0.001)
    assert order == list(range(6))


async def test_a_prompt_that_waited_for_a_place_is_prefilled_from_when_the_place_is_free() -> None:
    async with started(max_num_seqs=1, prefill_tokens_per_s=1000) as engine:
        first, second = await asyncio.gather(
            *(answer(engine, chat(words=20, max_tokens=30, stream=True)) for _ in range(2))
        )
    assert second.times[0] - first.times[-1] >= 0.018


async def test_kv_usage_is_the_share_of_tokens_held() -> None:
    async with started(max_num_seqs=2, max_model_len=50) as engine:
        reply = Frames()
        task = asyncio.create_task(engine.serve(chat(words=10, max_tokens=40, stream=True), reply))
        await reply.at_least(5)
        assert engine.stats().kv_usage == pytest.approx((10 + len(reply.parts)) / 100)
        await cancel(task)
        assert engine.stats().kv_usage == 0


# ---- cancelling and the end ----------------------------------------------------------------------


async def test_a_cancelled_call_is_gone_at_once_and_its_place_is_taken() -> None:
    async with started(max_num_seqs=1, max_model_len=1 << 20) as engine:
        endless = Frames()
        running = asyncio.create_task(engine.serve(chat(max_tokens=100_000, stream=True), endless))
        await endless.at_least(2)
        waiting = asyncio.create_task(answer(engine, chat()))
        await until(engine, lambda s: s.waiting == 1)
        running.cancel()
        await asyncio.wait([running])
        assert running.cancelled()
        assert engine.stats().running + engine.stats().waiting == 1
        frames = len(endless.parts)
        assert (await waiting).output_tokens == 16
        assert len(endless.parts) == frames
        assert 2 <= endless.output_tokens == frames


async def test_cancelling_a_prefill_gives_its_lane_to_the_next() -> None:
    async with started(prefill_tokens_per_s=100, max_model_len=1 << 20) as engine:
        huge = asyncio.create_task(engine.serve(chat(words=100_000), Frames()))
        await until(engine, lambda s: s.running == 1)
        short = asyncio.create_task(answer(engine, chat(words=1)))
        await until(engine, lambda s: s.waiting == 1)
        await cancel(huge)
        assert (await short).output_tokens == 16


async def test_whatever_is_cancelled_the_rest_is_answered_and_nothing_remains() -> None:
    rng = random.Random(7)
    async with started(
        max_num_seqs=4, ttft_ms=1, prefill_tokens_per_s=5000, load_ms=2, max_loras=2
    ) as engine:
        await engine.load(PIRATE)
        tasks = [
            asyncio.create_task(
                answer(
                    engine, chat(words=rng.randint(1, 20), use=PIRATE, max_tokens=rng.randint(1, 9))
                )
            )
            for _ in range(60)
        ]
        other = adapter("haiku", 2)
        victims = set(rng.sample(range(60), 30))
        for i in sorted(victims):
            await asyncio.wait([tasks[max(0, i - 6)]])
            if i % 10 == 0:
                load = asyncio.create_task(engine.load(other))
                await asyncio.sleep(0)
                tasks[i].cancel()
                await load
                await engine.unload(other)
            tasks[i].cancel()
        await asyncio.wait(tasks)
        assert all(not tasks[i].cancelled() for i in range(60) if i not in victims)
        left = engine.stats()
        assert (left.running, left.waiting, left.kv_usage) == (0, 0, 0)
        await engine.unload(PIRATE)


async def test_stop_fails_what_is_under_way_and_what_comes_after() -> None:
    async with started(itl_ms=NEVER_MS, load_ms=NEVER_MS) as engine:
        reply = Frames()
        call = asyncio.create_task(engine.serve(chat(stream=True), reply))
        await reply.at_least(1)
        load = asyncio.create_task(engine.load(PIRATE))
        await asyncio.sleep(0)
        await engine.stop()
        for pending in (call, load):
            with pytest.raises(EngineFailure):
                await pending
        with pytest.raises(EngineFailure):
            await engine.serve(chat(), Frames())


async def test_a_step_loop_that_breaks_is_reported_once_as_the_engines_death() -> None:
    class Broken(Frames):
        def head(self, status: int, sse: bool, data: bytes, end: bool) -> None:
            raise ZeroDivisionError

    reasons: list[str] = []
    async with started() as engine:
        engine.died(reasons.append)
        with pytest.raises(EngineFailure):
            await engine.serve(chat(), Broken())
    assert len(reasons) == 1
    assert "ZeroDivisionError" in reasons[0]


async def test_a_clean_stop_is_not_a_death() -> None:
    reasons: list[str] = []
    async with started() as engine:
        engine.died(reasons.append)
    assert reasons == []


# ---- slots ---------------------------------------------------------------------------------------


async def test_a_load_takes_its_time_and_stalls_every_stream_meanwhile() -> None:
    async with started(itl_ms=2, load_ms=20, load_ms_per_mb=10) as engine:
        reply = Frames()
        task = asyncio.create_task(engine.serve(chat(max_tokens=4000, stream=True), reply))
        await reply.at_least(3)
        await engine.load(adapter("big", size_bytes=3_000_000))
        loaded = time.monotonic()
        await reply.at_least(len(reply.parts) + 3)
        assert max(b - a for a, b in zip(reply.times, reply.times[1:], strict=False)) >= 0.049
        assert not [t for t in reply.times if loaded - 0.045 < t < loaded - 0.001]
        await cancel(task)


async def test_decoding_goes_on_after_a_load_where_it_was() -> None:
    async with started(itl_ms=50, load_ms=30) as engine:
        before = time.monotonic()
        reply = Frames()
        task = asyncio.create_task(engine.serve(chat(max_tokens=3, stream=True), reply))
        await reply.at_least(1)
        await engine.load(PIRATE)
        await task
    assert reply.times[-1] - before >= 0.129


async def test_a_prefill_stands_still_during_a_load() -> None:
    async with started(prefill_tokens_per_s=1000, load_ms=40) as engine:
        before = time.monotonic()
        task = asyncio.create_task(answer(engine, chat(words=30, max_tokens=1)))
        await until(engine, lambda s: s.running == 1)
        await engine.load(PIRATE)
        assert (await task).times[0] - before >= 0.069


async def test_loads_are_serialised() -> None:
    async with started(load_ms=15) as engine:
        before = time.monotonic()
        await asyncio.gather(*(engine.load(adapter(f"a{i}", i)) for i in range(3)))
        assert time.monotonic() - before >= 0.043


async def test_a_load_does_not_wait_for_a_long_prefill() -> None:
    async with started(prefill_tokens_per_s=0.01) as engine:
        prefilling = asyncio.create_task(engine.serve(chat(words=100), Frames()))
        await until(engine, lambda s: s.running == 1)
        await engine.load(PIRATE)
        await cancel(prefilling)


async def test_more_adapters_than_slots_is_a_bug_of_the_caller() -> None:
    async with started(max_loras=2) as engine:
        await engine.load(adapter("a", 1))
        second = asyncio.create_task(engine.load(adapter("b", 2)))
        await asyncio.sleep(0)
        with pytest.raises(AssertionError, match="no slot"):
            await engine.load(adapter("c", 3))  # the slot is taken from the start of the load on
        await second
        await engine.unload(adapter("a", 1))
        await engine.load(adapter("c", 3))


async def test_serving_an_adapter_that_is_not_loaded_is_a_bug_of_the_caller() -> None:
    async with started(max_loras=1) as engine:
        with pytest.raises(AssertionError, match="not loaded"):
            await engine.serve(chat(use=PIRATE), Frames())
        await engine.load(PIRATE)
        with pytest.raises(AssertionError, match="not loaded"):
            await engine.serve(chat(use=adapter("pirate", 2)), Frames())  # another digest
        await engine.unload(PIRATE)
        with pytest.raises(AssertionError, match="not loaded"):
            await engine.serve(chat(use=PIRATE), Frames())


async def test_unloading_an_adapter_in_flight_is_a_bug_of_the_caller() -> None:
    async with started() as engine:
        await engine.load(PIRATE)
        reply = Frames()
        task = asyncio.create_task(
            engine.serve(chat(use=PIRATE, max_tokens=4000, stream=True), reply)
        )
        await reply.at_least(1)
        with pytest.raises(AssertionError, match="in flight"):
            await engine.unload(PIRATE)
        await cancel(task)
        await engine.unload(PIRATE)
        with pytest.raises(AssertionError, match="not loaded"):
            await engine.unload(PIRATE)


async def test_a_rank_above_the_slots_is_refused_and_nothing_of_it_stays() -> None:
    async with started(max_loras=1, max_lora_rank=8) as engine:
        with pytest.raises(InvalidAdapter, match="rank 16"):
            await engine.load(adapter("wide", 1, rank=16))
        await engine.load(adapter("slim", 2, rank=8))


async def test_nothing_stays_of_a_load_that_was_cancelled() -> None:
    async with started(max_loras=1, load_ms=5) as engine:
        load = asyncio.create_task(engine.load(PIRATE))
        await asyncio.sleep(0)
        await cancel(load)
        await answer(engine, chat(max_tokens=1))  # comes after the load
        with pytest.raises(AssertionError, match="not loaded"):
            await engine.serve(chat(use=PIRATE), Frames())
        await engine.load(adapter("haiku", 2))


# ---- answers that began elsewhere ----------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 2, 5])
@pytest.mark.parametrize("ask", [chat, completion])
async def test_a_stream_that_began_elsewhere_goes_on_with_the_next_token(
    ask: Callable[..., EngineRequest], cut: int
) -> None:
    call = replace(ask(stream=True, max_tokens=6), created=1, movable=True)
    async with started() as engine:
        whole = await answer(engine, call)
        rest = await answer(engine, replace(call, seen=pack(range(cut))))
    assert whole.tokens == [0, 1, 2, 3, 4, 5] and rest.tokens == whole.tokens[cut:]
    assert b"".join(whole.parts[:cut] + rest.parts) == b"".join(whole.parts)
    assert rest.output_tokens == whole.output_tokens == 6


async def test_a_whole_answer_that_began_elsewhere_is_the_same_and_takes_the_rest_of_the_time() -> (
    None
):
    call = replace(chat(max_tokens=6), created=1, movable=True)
    async with started() as engine:
        whole = await answer(engine, call)
        rest = await answer(engine, replace(call, seen=pack(range(4))))
    assert rest.json == whole.json
    assert whole.tokens == [0, 1, 2, 3, 4] and rest.tokens == [4]


@pytest.mark.parametrize("seen", [[1], [0, 2], [0, 1, 2]])
async def test_tokens_that_do_not_begin_the_answer_are_refused(seen: list[int]) -> None:
    async with started() as engine:
        with pytest.raises(CannotContinue):
            await answer(engine, replace(chat(stream=True, max_tokens=3), seen=pack(seen)))
