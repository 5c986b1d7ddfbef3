"""Shell. Our plain streams against vLLM's own: the same bytes from the same engine output, and from
the same requests.
"""

from __future__ import annotations

import asyncio
import copy
import json
import random
import re
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from shared.api_endpoints import ErrorFamily
from tests.engine.in_process import ADAPTERS
from tests.harness import DEMO
from worker.engine.base import EngineRequest

pytestmark = pytest.mark.usefixtures("vllm_environment")
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
PROMPT = "Tell me about the sea."
UNICODE = 'Zoë schrieb: 漢字 und 🎉👩‍🚀, «naïve» Ελληνικά — ok?\t"quoted" \\ back\x01\x7f'


class Written:
    """A Reply that keeps what it gets."""

    def __init__(self) -> None:
        self.prompt_tokens = self.output_tokens = self.status = self.frames = 0
        self.data = b""
        self.finish_reasons = ""
        self.ended = False
        self.first = asyncio.Event()

    def head(self, status: int, sse: bool, data: bytes, end: bool, tokens: bytes = b"") -> None:
        assert not self.frames
        self.status, self.sse = status, sse
        self.more(data, end)

    async def room(self) -> None:
        return None

    def progress(self, tokens: bytes) -> None:
        assert not tokens, "no answer is sent whole here"

    def more(self, data: bytes, end: bool, tokens: bytes = b"") -> None:
        assert not self.ended
        self.frames += 1
        self.data += data
        self.ended = end
        self.first.set()


# ---- from the same engine output, token by token -------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(vllm_environment: None) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO / "model")


def _steps(
    tokenizer: Any, seed: int
) -> tuple[list[list[int]], dict[str, Any], int | None, int | str | None]:
    """Tokens per engine step, sampling parameters, and how the answer ends: what an engine may say,
    even if it is unlikely.
    """
    rng = random.Random(seed)
    source = rng.choice(
        [
            tokenizer.encode(UNICODE),
            [rng.randrange(len(tokenizer)) for _ in range(rng.randrange(1, 60))],
            [5],
        ]
    )
    steps, rest = [], list(source)
    while rest:
        n = 1 if rng.random() < 0.8 else rng.randrange(0, 4)
        steps.append(rest[:n])
        rest = rest[n:]
    text = tokenizer.decode(source)
    stops = rng.choice(
        [[], [], [text[len(text) // 2 :][:3] or "x"], ["never to be seen"], ["e", "漢"]]
    )
    params = {
        "stop": stops,
        "include_stop_str_in_output": rng.random() < 0.3,
        "skip_special_tokens": rng.random() < 0.7,
        "spaces_between_special_tokens": rng.random() < 0.5,
        "stream_interval": rng.choice([None, None, 2, 5]),
        "min_tokens": rng.choice([0, 0, 3]),
    }
    finish = rng.choice([0, 1, 1, 2, 3, 4])
    return steps, params, finish, rng.choice([None, 7, '\n"stop']) if finish == 0 else None


def _core_outputs(tokenizer: Any, seed: int) -> tuple[Any, list[Any]]:
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason

    steps, params, finish, stop_reason = _steps(tokenizer, seed)
    request = EngineCoreRequest(
        request_id="internal",
        prompt_token_ids=tokenizer.encode("hello"),
        mm_features=None,
        sampling_params=SamplingParams(
            max_tokens=10_000, output_kind=RequestOutputKind.DELTA, **params
        ),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    request.external_req_id = "external"
    outputs = [EngineCoreOutput("internal", ids) for ids in steps]
    assert finish is not None
    outputs[-1].finish_reason, outputs[-1].stop_reason = FinishReason(finish), stop_reason
    if finish == FinishReason.ABORT:
        outputs.append(EngineCoreOutput("internal", [], finish_reason=FinishReason.ABORT))
        outputs[-2].finish_reason = None
    return request, outputs


async def _by_vllm(
    tokenizer: Any, path: str, include_usage: bool, request: Any, outputs: list[Any], early: int
) -> bytes:
    """What vLLM's generator writes if its reader sees the first `early` outputs together and then
    keeps up with the engine.
    """
    from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

    processor = OutputProcessor(tokenizer, log_stats=False)
    queue = RequestOutputCollector(request.sampling_params.output_kind, request.request_id)
    processor.add_request(request, "hello", None, 0, queue)
    made = []
    for i, output in enumerate(outputs, start=1):
        processor.process_outputs([output], weight_version="1")
        if i >= min(early, len(outputs)):
            made.append(queue.get_nowait())

    async def results(numbered: bool) -> AsyncIterator[Any]:
        for out in made:
            if out is not None:
                yield (0, out) if numbered else out

    options = {"include_usage": True} if include_usage else None
    meta = RequestResponseMetadata(request_id="id-1")
    if path == CHAT:
        body = ChatCompletionRequest(
            model="demo",
            messages=[{"role": "user", "content": "hello"}],
            stream=True,
            stream_options=options,
        )
        stream = _serving(path).chat_completion_stream_generator(
            body, results(False), "id-1", "demo", [], tokenizer, meta
        )
    else:
        body = CompletionRequest(model="demo", prompt="hello", stream=True, stream_options=options)
        stream = _serving(path).completion_stream_generator(
            body, [None], results(True), "id-1", 1700000000, "demo", 1, tokenizer, meta
        )
    # error events are in our own shape in both
    return b"".join([_in_our_shape(event.encode()) async for event in stream])


def _in_our_shape(event: bytes) -> bytes:
    from worker.engine.vllm.app.errors import event_in_our_shape

    return event_in_our_shape(event, ErrorFamily.OPENAI, ()) or event


def _serving(path: str) -> Any:
    """vLLM's serving object with the attributes that its stream generator reads, and without an
    engine.
    """
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion

    serving: Any = object.__new__(OpenAIServingChat if path == CHAT else OpenAIServingCompletion)
    serving.__dict__.update(
        parser_cls=None,
        enable_auto_tools=False,  # vLLM 0.33 reads it
        response_role="assistant",
        enable_force_include_usage=False,
        enable_log_outputs=False,
        enable_prompt_tokens_details=False,
        enable_per_request_metrics=False,
        request_logger=None,
        system_fingerprint="vllm-0.32.0-test",
        _include_reasoning_tokens_details=False,
    )
    return serving


def _by_us(
    tokenizer: Any,
    path: str,
    include_usage: bool,
    request: Any,
    outputs: list[Any],
    created: int,
    early: int,
) -> Written:
    """What a PlainStream writes. The first `early` outputs come before it is attached."""
    from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

    from worker.engine.vllm.fast_path import FIELDS, in_words
    from worker.engine.vllm.plain_stream import Draft, PlainStream, Submission
    from worker.engine.vllm.sse import chat_chunks, completion_chunks
    from worker.engine.vllm.write_interval import WriteInterval

    processor = OutputProcessor(tokenizer, log_stats=False)
    queue = RequestOutputCollector(request.sampling_params.output_kind, request.request_id)
    processor.add_request(request, "hello", None, 0, queue)
    serving = _serving(path)
    if path == CHAT:
        chunks = chat_chunks(
            "id-1", created, "demo", "assistant", serving.system_fingerprint, include_usage, FIELDS
        )
    else:
        chunks = completion_chunks(
            "id-1", created, "demo", serving.system_fingerprint, include_usage, FIELDS
        )
    written = Written()
    stream = PlainStream(
        Draft(chunks, Submission(None, None, "", {}), lambda exc: in_words(serving, exc)),
        written,
        WriteInterval(0.0),
    )
    for output in outputs[:early]:
        processor.process_outputs([output], weight_version="1")
    if request.request_id in processor.request_states:
        stream.attach(processor.request_states[request.request_id])
    stream.catch_up(queue.output)
    for output in outputs[early:]:
        processor.process_outputs([output], weight_version="1")
    assert stream.ended.done() and written.ended
    return written


def assert_refused_before_a_token(ours: Written, wanted: bytes) -> None:
    """An error before any token is an answer with a status, where vLLM's is an event."""
    events = [event for event in wanted.split(b"\n\n") if b'"role"' not in event]
    assert events == [b"data: " + ours.data, b"data: [DONE]", b""] and ours.status == 500


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize("include_usage", [False, True], ids=["plain", "usage"])
async def test_the_same_engine_output_gives_the_same_bytes(
    tokenizer: Any, path: str, include_usage: bool
) -> None:
    kinds = set()
    for seed in range(150):
        # outputs that come before the stream is attached are one output, as in vLLM's queue
        for early in (0, 1, 3):
            request, outputs = _core_outputs(tokenizer, seed)
            wanted = await _by_vllm(
                tokenizer,
                path,
                include_usage,
                copy.deepcopy(request),
                copy.deepcopy(outputs),
                early,
            )
            found = re.search(rb'"created":(\d+)', wanted)
            ours = _by_us(
                tokenizer,
                path,
                include_usage,
                request,
                outputs,
                int(found[1]) if found else 0,
                early,
            )
            if ours.status == 200:
                assert ours.data == wanted, f"seed {seed}, {early} early"
            else:
                assert_refused_before_a_token(ours, wanted)
            kinds |= set(re.findall(rb'"finish_reason":"(\w+)"|"(error)":', wanted))
    assert {k for pair in kinds for k in pair if k} == {
        b"stop",
        b"length",
        b"abort",
        b"repetition",
        b"error",
    }


async def test_a_text_that_is_not_unicode_ends_its_own_stream_and_no_other(tokenizer: Any) -> None:
    from worker.engine.vllm.fast_path import in_words
    from worker.engine.vllm.plain_stream import Draft, PlainStream, Submission
    from worker.engine.vllm.sse import chat_chunks
    from worker.engine.vllm.write_interval import WriteInterval

    written, serving = Written(), _serving(CHAT)
    draft = Draft(
        chat_chunks("1", 1, "demo", "assistant", None, False),
        Submission(None, None, "", {}),
        lambda e: in_words(serving, e),
    )
    stream = PlainStream(draft, written, WriteInterval(0.0))
    stream.catch_up(
        SimpleNamespace(
            prompt_token_ids=[1],
            outputs=[
                SimpleNamespace(text=text, token_ids=[1], finish_reason=None, stop_reason=None)
                for text in ("a", "\ud800")
            ],
        )
    )
    assert (
        stream.ended.done()
        and b'"error"' in written.data
        and written.data.endswith(b"data: [DONE]\n\n")
    )


# ---- from the same requests, on one engine -------------------------------------------------------


async def serve_plain(
    engine: Any, body: dict[str, Any], request_id: str = "r1", path: str = ""
) -> Written:
    written = Written()
    adapter = ADAPTERS.get(str(body.get("model")).partition(":")[2])
    path = path or (CHAT if "messages" in body else COMPLETION)
    async with asyncio.timeout(60):
        await asyncio.create_task(
            engine.serve(
                EngineRequest(path, request_id, json.dumps(body).encode(), adapter), written
            )
        )
    return written


def chat(model: str = "demo", prompt: str = PROMPT, **more: Any) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "stream": True,
        "temperature": 0,
        "max_tokens": 24,
        **more,
    }


@pytest.mark.parametrize(
    "more", [{}, {"stream_options": {"include_usage": True}}, {"stop": ["the"]}, {"max_tokens": 1}]
)
async def test_tokens_that_leave_together_are_the_same_text_with_the_same_end(
    engine: Any, more: dict[str, Any]
) -> None:
    alone = (await serve_plain(engine, chat(**more))).data
    # longer than the answer lasts, and no look at the load may shorten it
    engine._pacing._most_s = engine._pacing.gap_s = 100.0
    engine._pacing._flushed_at = time.monotonic()
    engine._pacing.flush = False
    try:
        together = (await serve_plain(engine, chat(**more))).data
    finally:
        engine._pacing._most_s = engine._pacing.gap_s = 0.0
        engine._pacing.flush = True

    def read(data: bytes) -> tuple[str, list[Any], Any]:
        events = [
            json.loads(line.removeprefix(b"data: "))
            for line in data.split(b"\n\n")
            if line and line != b"data: [DONE]"
        ]
        choices = [c for e in events for c in e["choices"]]
        text = "".join(c["delta"].get("content") or "" for c in choices)
        return (
            text,
            [c["finish_reason"] for c in choices if c["finish_reason"]],
            [e["usage"] for e in events if e.get("usage")],
        )

    assert read(together) == read(alone) and together.endswith(b"data: [DONE]\n\n")
    # role, first token, last, usage, DONE
    assert together.count(b"data: ") <= min(alone.count(b"data: "), 5)


def completion(model: str = "demo", prompt: Any = PROMPT, **more: Any) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": prompt,
        "stream": True,
        "temperature": 0,
        "max_tokens": 24,
        **more,
    }


MORE: list[dict[str, Any]] = [
    {},
    {"stream_options": {"include_usage": True}},
    {"stream_options": {"include_usage": False}},
    {"stream_options": None, "n": None, "user": "somebody"},
    {"max_tokens": 1},
    {"max_tokens": 1, "stream_options": {"include_usage": True}},
    {"stop": ["e"]},
    {"stop": "the", "include_stop_str_in_output": True},
    {"stop": ["nowhere in it", "q"], "stream_options": {"include_usage": True}},
    {"stop_token_ids": [*range(260, 300)]},
    {"ignore_eos": True, "max_tokens": 60},
    {"min_tokens": 20, "stop": ["a"]},
    {"skip_special_tokens": False, "max_tokens": 80},
    {"spaces_between_special_tokens": False, "skip_special_tokens": False, "ignore_eos": True},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.2, "presence_penalty": 0.1},
    # single bytes, so characters are split over tokens, and some are invalid
    {"allowed_token_ids": [*range(10, 140)], "max_tokens": 40},
    {"logit_bias": {"300": 5.0}},
    {"seed": 3, "top_k": 1, "top_p": 0.9, "min_p": 0.1, "temperature": 0.7},
]


@pytest.mark.parametrize("model", ["demo", "demo:pirate", "demo:haiku"])
@pytest.mark.parametrize("form", [chat, completion])
async def test_the_same_request_gives_the_same_bytes(engine: Any, form: Any, model: str) -> None:
    for prompt in (PROMPT, UNICODE):
        for more in MORE if (model, prompt) == ("demo", PROMPT) else MORE[:12:3]:
            body = form(model, prompt, **more)
            if form is completion and "n" in more:
                del body["n"]
            before = engine.fast.served
            ours = await serve_plain(engine, body)
            assert engine.fast.served == before + 1, body
            # changes nothing, but only vLLM's app knows it
            wanted = await serve_plain(engine, body | {"return_token_ids": False})
            assert engine.fast.served == before + 1
            assert (
                (ours.status, ours.sse, ours.ended)
                == (wanted.status, wanted.sse, wanted.ended)
                == (200, True, True)
            )
            assert (ours.prompt_tokens, ours.output_tokens) == (
                wanted.prompt_tokens,
                wanted.output_tokens,
            ), body
            assert ours.output_tokens > 0
            _assert_same(ours.data, wanted.data, body)


async def test_token_prompts_and_other_shapes_of_messages_are_plain_too(engine: Any) -> None:
    parts = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    bounds = {"max_tokens": None, "max_completion_tokens": 5}
    for body in (
        completion(prompt=[1, 40, 50]),
        completion(max_tokens=None),
        chat() | {"messages": parts},
        chat() | bounds,
    ):
        before = engine.fast.served
        ours = await serve_plain(engine, body)
        assert engine.fast.served == before + 1
        _assert_same(
            ours.data, (await serve_plain(engine, body | {"return_token_ids": False})).data, body
        )


@pytest.mark.parametrize(
    "body",
    [
        chat(logprobs=True, top_logprobs=2),
        chat(n=2, temperature=1),
        chat(echo=True),
        chat(return_token_ids=True),
        chat(stream_options={"include_usage": True, "continuous_usage_stats": True}),
        chat(response_format={"type": "json_object"}),
        chat(stream=False),
        chat(stream_interval=3),
        completion(prompt=["a", "b"]),
        completion(echo=True, logprobs=1),
        completion(prompt_logprobs=1, stream=False),
    ],
)
async def test_what_is_not_plain_goes_through_vllm(engine: Any, body: dict[str, Any]) -> None:
    before = engine.fast.served
    answer = await serve_plain(engine, body)
    assert (
        engine.fast.served == before
        and answer.status == 200
        and answer.ended
        and b'"error"' not in answer.data
    )


@pytest.mark.parametrize(
    "body",
    [
        chat(temperature=-1),
        chat(max_tokens=0),
        chat(prompt="word " * 3000),
        chat() | {"messages": "no list"},
        chat() | {"messages": []},
        chat("nobody"),
        chat(stop=[1]),
        chat(logit_bias={"99999999": 1}),
        completion(max_tokens=5000),
        completion(prompt=[1, 99_999_999]),
    ],
)
async def test_what_vllm_refuses_is_refused_in_its_words(engine: Any, body: dict[str, Any]) -> None:
    before = engine.fast.served
    ours, wanted = (
        await serve_plain(engine, body),
        await serve_plain(engine, body | {"return_token_ids": False}),
    )
    assert engine.fast.served == before
    assert ours.status == wanted.status
    _assert_same(ours.data, wanted.data, body)
    assert b'"error"' in ours.data


async def test_many_streams_at_once_say_what_each_says_alone(engine: Any) -> None:
    bodies = [
        chat(m, p, max_tokens=40)
        for m in ("demo", "demo:pirate", "demo:haiku")
        for p in (PROMPT, "hello", "Where is the moon?")
    ]
    alone = [_text((await serve_plain(engine, b)).data) for b in bodies]
    before = engine.fast.served
    together = await asyncio.gather(
        *(serve_plain(engine, b, f"r{i}") for i, b in enumerate(bodies * 4))
    )
    assert [_text(w.data) for w in together] == alone * 4
    assert engine.fast.served == before + 4 * len(bodies)
    assert all(b'chatcmpl-r%d"' % i in w.data for i, w in enumerate(together))


async def test_a_cancelled_stream_leaves_the_engine_at_once(engine: Any) -> None:
    written = Written()
    call = EngineRequest(
        CHAT, "gone", json.dumps(chat(max_tokens=900, ignore_eos=True)).encode(), None
    )
    task = asyncio.create_task(engine.serve(call, written))
    async with asyncio.timeout(30):
        await written.first.wait()
        task.cancel()
        # what its worker reports of a client that leaves
        assert written.prompt_tokens and 0 < written.output_tokens < 900
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine._engine.get_num_unfinished_requests() == 0
        frames = written.frames
        after = await serve_plain(engine, chat(max_tokens=30))
        while engine.stats().running:
            await asyncio.sleep(0.01)
    assert written.frames == frames and not written.ended and after.ended


async def test_who_leaves_ends_no_stream_that_has_the_same_request_id(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client gives its request the id of another one, and leaves while the engine gets it."""
    asked = asyncio.create_task(serve_plain(engine, chat(max_tokens=200, ignore_eos=True), "same"))
    core, given = engine._engine.engine_core, asyncio.Event()
    async with asyncio.timeout(30):
        while not engine._engine.get_num_unfinished_requests():
            await asyncio.sleep(0.001)

        async def slow(_: object) -> None:
            given.set()
            await asyncio.Event().wait()

        with monkeypatch.context() as patch:
            patch.setattr(core, "add_request_async", slow)
            leaving = asyncio.create_task(serve_plain(engine, chat(max_tokens=200), "same"))
            await given.wait()
            leaving.cancel()
            await asyncio.wait([leaving])
        written = await asked
    assert written.ended and b'"finish_reason":"length"' in written.data


def _assert_same(ours: bytes, wanted: bytes, body: dict[str, Any]) -> None:
    """Compares two streams. The number of tokens per event may differ: a late reader gets two in
    one event, or a whole short answer with its end.
    """
    (events, between, text), (events_wanted, between_wanted, text_wanted) = (
        _steady(ours),
        _steady(wanted),
    )
    assert (events, text) == (events_wanted, text_wanted), body
    assert between == between_wanted or not between or not between_wanted, body


def _steady(data: bytes) -> tuple[list[bytes], set[bytes], bytes]:
    """The events without ids and texts: those that open or end the answer, and the forms of those
    that only carry text. Then all texts together, still escaped.
    """
    data = re.sub(rb'"created":\d+', b'"created":0', data)
    data = re.sub(rb'"id":"(chatcmpl|cmpl)-[^"]+"', rb'"id":"\1"', data)
    said = rb'("delta":\{"content"|"index":0,"text"):"((?:[^"\\]|\\.)*)"'
    texts = b"".join(text for _, text in re.findall(said, data))
    events = re.sub(said, rb'\1:""', data).split(b"\n\n")
    between = {e for e in events if re.search(said, e) and b'"finish_reason":null' in e}
    return [e for e in events if e not in between], between, texts


def _text(data: bytes) -> str:
    events = [json.loads(line[6:]) for line in data.split(b"\n\n") if line.startswith(b"data: {")]
    choices = [e["choices"][0] for e in events if e.get("choices")]
    return "".join(c["delta"].get("content") or "" if "delta" in c else c["text"] for c in choices)
