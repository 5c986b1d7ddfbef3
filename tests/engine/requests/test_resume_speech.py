"""Shell. Transcriptions that begin on one engine and go on on another."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from shared.link.token_ids import unpack
from tests.conformance.servers import HEARING_ENGINE
from tests.engine.in_process import engine_of
from tests.engine.requests.test_resume import Sent, cuts, heard
from tests.harness import demo_config
from tests.tiny_whisper import make_whisper, sound
from worker.engine.base import EngineRequest
from worker.engine.vllm.boot.warm_up_requests import warm_up

PATH = "/v1/audio/transcriptions"
LONGER_THAN_A_WINDOW_S = 31.0


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def hearing(
    vllm_environment: None, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Any]:
    """An engine with a tiny Whisper."""
    folder = tmp_path_factory.mktemp("hearing")
    config = demo_config()
    source = str(make_whisper(folder / "model"))
    config["llm_configs"] = [
        {
            "model_loading_config": {"model_id": "hearing", "model_source": source},
            "engine_kwargs": HEARING_ENGINE,
        }
    ]
    engine = await engine_of(config, folder)
    yield engine
    await engine.stop()


async def transcription(engine: Any, wave: bytes, seen: bytes = b"", **fields: str) -> Sent:
    asked = {"model": "hearing", "stream": "true", "max_completion_tokens": "24", **fields}
    parts = [f'name="{name}"\r\n\r\n{value}'.encode() for name, value in asked.items()]
    parts.append(b'name="file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n' + wave)
    body = b"".join(b"--edge\r\nContent-Disposition: form-data; %b\r\n" % p for p in parts)
    sent = Sent()
    call = EngineRequest(
        PATH,
        "request-1",
        body + b"--edge--\r\n",
        None,
        created=1_700_000_000,
        seen=seen,
        movable=True,
        content_type="multipart/form-data; boundary=edge",
    )
    await engine.serve(call, sent)
    assert sent.ended and sent.status == 200, sent.data()
    return sent


@pytest.mark.parametrize(
    ("seconds", "fields"),
    [
        (1.0, {"stream_include_usage": "true"}),
        (1.0, {"temperature": "1", "language": "en"}),
        (LONGER_THAN_A_WINDOW_S, {"temperature": "0"}),
    ],
    ids=["with usage", "sampled", "in two parts"],
)
async def test_a_transcription_that_moves_is_the_one_that_stays(
    hearing: Any, seconds: float, fields: dict[str, str]
) -> None:
    wave = sound(seconds)
    whole = await transcription(hearing, wave, **fields)
    due = heard(whole.data())
    assert len(whole.parts) > 3 and all(tokens for _, tokens in whole.parts[:-1])
    for cut in cuts(len(whole.parts)):
        rest = await transcription(hearing, wave, whole.tokens(cut), **fields)
        assert heard(whole.data(cut) + rest.data()) == due, f"cut after {cut} parts"
        assert unpack(whole.tokens(cut) + rest.tokens()) == unpack(whole.tokens())


@pytest.mark.parametrize("form", ["json", "verbose_json"])
async def test_a_transcription_that_is_answered_whole_costs_what_a_streamed_one_does(
    hearing: Any, form: str
) -> None:
    wave = sound(1.0)
    streamed = await transcription(hearing, wave, temperature="0")
    whole = await transcription(
        hearing, wave, temperature="0", stream="false", response_format=form
    )
    assert whole.output_tokens > 1 and whole.prompt_tokens > 1
    if form == "json":  # the other has times among its tokens
        assert (whole.prompt_tokens, whole.output_tokens) == (
            streamed.prompt_tokens,
            streamed.output_tokens,
        )


async def test_the_warm_up_of_a_model_that_only_hears_is_answered(hearing: Any) -> None:
    asked, sent = warm_up("hearing", hearing._tasks, {}), Sent()
    call = EngineRequest(asked.path, "warm-up", asked.body, None, content_type=asked.content_type)
    await hearing.serve(call, sent)
    assert sent.status == 200, sent.data()
