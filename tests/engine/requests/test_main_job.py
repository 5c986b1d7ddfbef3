"""Shell. The main job on real vLLM: base and adapters behind one endpoint, streaming and not, by
the OpenAI SDK and by hand.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path

import openai
import pytest
import yaml

from examples.demo.styles import HELD_OUT, is_style
from shared.runtime.children import Zygote
from tests.harness import DEMO, ROOT, Cluster, chat_body, cluster, demo_config
from tests.processes import family_of, lives, still_alive

ADAPTERS = sorted(p.name for p in (DEMO / "adapters").iterdir())
STYLES = {"demo": "plain", **{f"demo:{name}": name for name in ADAPTERS}}
PROMPTS = HELD_OUT[:3]


@pytest.mark.parametrize("model", STYLES)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_the_openai_sdk_gets_each_model_in_its_own_style(
    demo: Cluster, model: str, stream: bool
) -> None:
    async with openai.AsyncOpenAI(base_url=demo.url + "/v1", api_key="none") as client:
        for prompt in PROMPTS:
            messages = [{"role": "user", "content": prompt}]
            if stream:
                text = ""
                answer = await client.chat.completions.create(
                    model=model, messages=messages, temperature=0, max_tokens=120, stream=True
                )  # type: ignore[arg-type,call-overload]
                async for chunk in answer:
                    assert chunk.model == model
                    text += chunk.choices[0].delta.content or ""
            else:
                whole = await client.chat.completions.create(
                    model=model, messages=messages, temperature=0, max_tokens=120
                )  # type: ignore[arg-type,call-overload]
                assert (
                    whole.model == model
                    and whole.usage is not None
                    and whole.usage.completion_tokens > 0
                )
                text = whole.choices[0].message.content or ""
            assert is_style(STYLES[model], text), (model, prompt, text)


async def test_the_sdk_lists_bases_and_adapters(demo: Cluster) -> None:
    async with openai.AsyncOpenAI(base_url=demo.url + "/v1", api_key="none") as client:
        assert {m.id async for m in client.models.list()} == set(STYLES)
        assert (await client.models.retrieve("demo:pirate")).id == "demo:pirate"


async def test_four_times_more_adapters_than_slots_cycle_with_the_answers_of_single_runs(
    demo: Cluster,
) -> None:
    models = [f"demo:{name}" for name in ADAPTERS]
    assert len(models) >= 3 * 2
    alone = {(m, p): await demo.text(m, p) for m in models for p in PROMPTS[:2]}
    for _ in range(2):
        keys = list(alone) * 2
        together = await asyncio.gather(*(demo.text(m, p) for m, p in keys))
        wrong = [(k, a) for k, a in zip(keys, together, strict=True) if a != alone[k]]
        assert not wrong
    assert await demo.metric("loraplex_worker_adapters", worker="w0", tier="gpu") <= 2


async def test_base_and_adapters_in_one_batch_do_not_disturb_each_other(demo: Cluster) -> None:
    models = ["demo", f"demo:{ADAPTERS[0]}", f"demo:{ADAPTERS[1]}"] * 6
    alone = {m: await demo.text(m, PROMPTS[0]) for m in set(models)}
    assert await asyncio.gather(*(demo.text(m, PROMPTS[0]) for m in models)) == [
        alone[m] for m in models
    ]


async def test_what_vllm_can_do_passes_through(demo: Cluster) -> None:
    status, body, _ = await demo.chat(
        "demo:pirate", PROMPTS[0], max_tokens=2, logprobs=True, top_logprobs=2
    )
    assert status == 200 and len(body["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 2
    full = await demo.text("demo", PROMPTS[0])
    word = full.split()[2]
    status, body, _ = await demo.chat("demo", PROMPTS[0], temperature=0, max_tokens=64, stop=[word])
    assert (
        body["choices"][0]["finish_reason"] == "stop"
        and word not in body["choices"][0]["message"]["content"]
    )
    status, body, _ = await demo.chat("demo", PROMPTS[0], n=2, temperature=1, max_tokens=4)
    assert status == 200 and len(body["choices"]) == 2
    status, body, _ = await demo.post(
        "/v1/completions",
        {"model": "demo:haiku", "prompt": ["a", "b"], "max_tokens": 3, "echo": True},
    )
    assert (
        status == 200 and len(body["choices"]) == 2 and body["choices"][1]["text"].startswith("b")
    )
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    status, body, _ = await demo.chat(
        "demo", PROMPTS[0], temperature=0, max_tokens=200, response_format=form
    )
    assert status == 200 and (
        body["choices"][0]["finish_reason"] == "length"
        or "ok" in json.loads(body["choices"][0]["message"]["content"])
    )


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (chat_body("demo", temperature=-1), 400, "temperature"),
        (chat_body("demo:pirate", max_tokens=100_000), 400, "max_tokens"),
        (chat_body("demo", "word " * 3000), 400, "input_text"),
        ({"model": "demo", "messages": "not a list"}, 400, None),
        (chat_body("demo", stream=True, temperature=-1), 400, "temperature"),
        (chat_body("demo:nobody"), 404, "model"),
        (chat_body("nobody"), 404, "model"),
    ],
)
async def test_errors_of_a_request_have_their_status_and_say_no_paths(
    demo: Cluster, body: dict[str, object], status: int, param: str | None
) -> None:
    got, answer, _ = await demo.post("/v1/chat/completions", body)
    assert got == status, answer
    if param is not None:
        assert answer["error"]["param"] == param
    assert str(DEMO) not in str(answer) and "Traceback" not in str(answer)


async def test_a_client_that_leaves_stops_generation_within_100_ms(
    zygote: Zygote, tmp_path: Path
) -> None:
    """The engine's CPU time shows it. The engine works while the client reads, and rests from 100
    ms after the client has left.
    """
    async with cluster(demo_config(), tmp_path, zygote) as c:
        worker = await c.start_worker("w0")
        core = family_of(worker.pid)[0]

        async def cpu_s_of_next(seconds: float) -> float:
            before = sum(core.cpu_times()[:2])
            await asyncio.sleep(seconds)
            return sum(core.cpu_times()[:2]) - before

        for stream in (True, False):
            body = chat_body("demo", max_tokens=900, ignore_eos=True, stream=stream)
            task = asyncio.create_task(_read_all(c, body))
            async with asyncio.timeout(60):
                while (busy := await cpu_s_of_next(0.4)) < 0.1:
                    pass
            task.cancel()
            await asyncio.sleep(0.1)
            assert await cpu_s_of_next(0.4) < busy / 2, stream
            async with asyncio.timeout(60):
                while await c.metric("loraplex_worker_load") != 0:
                    await asyncio.sleep(0.01)
        assert await c.metric("loraplex_requests_total", outcome="aborted") == 2


async def _read_all(demo: Cluster, body: dict[str, object]) -> bytes:
    async with demo.http.post(demo.url + "/v1/chat/completions", json=body) as answer:
        return await answer.read()


async def test_a_stream_through_drain_is_complete_and_nothing_stays_behind(
    zygote: Zygote, tmp_path: Path
) -> None:
    async with cluster(demo_config(), tmp_path, zygote) as c:
        worker = await c.start_worker("w0")
        family = family_of(worker.pid)
        assert family
        reading = asyncio.create_task(
            _read_all(c, chat_body("demo:pirate", max_tokens=300, ignore_eos=True, stream=True))
        )
        async with asyncio.timeout(20):
            while await c.metric("loraplex_worker_load", worker="w0") != 1:
                await asyncio.sleep(0.01)
        worker.signal(signal.SIGTERM)
        async with asyncio.timeout(20):
            while await c.metric("loraplex_worker_up", worker="w0", state="serving"):
                await asyncio.sleep(0.01)
        assert (await reading).endswith(b"data: [DONE]\n\n")
        assert await worker.wait() == 0
        assert not [p for p in family if lives(p)]


async def test_a_killed_worker_takes_its_engine_along_and_a_stream_without_another_ends_in_error(
    zygote: Zygote, tmp_path: Path
) -> None:
    """No other worker can go on with the stream before its time in the queue is over."""
    config = demo_config(lease_s=1.0, queue_timeout_s=2.0)
    async with cluster(config, tmp_path, zygote) as c:
        worker = await c.start_worker("w0")
        family = family_of(worker.pid)
        body = chat_body("demo", max_tokens=900, ignore_eos=True, stream=True)
        async with c.http.post(c.url + "/v1/chat/completions", json=body) as answer:
            assert (await answer.content.readline()).startswith(b"data:")
            worker.signal(signal.SIGKILL)
            assert not await still_alive(family, 10)
            text = await answer.read()
        assert b'"error"' in text and text.endswith(b"data: [DONE]\n\n"), text[-500:]


async def test_the_yaml_of_ray_starts_it_with_the_local_model_put_in(
    zygote: Zygote, tmp_path: Path
) -> None:
    ray = yaml.safe_load((ROOT / "examples" / "ray.yaml").read_text())
    model = ray["applications"][0]["args"]["llm_configs"][0]
    model["model_loading_config"] = {"model_id": "demo", "model_source": str(DEMO / "model")}
    model["lora_config"]["dynamic_lora_loading_path"] = str(DEMO / "adapters")
    model["engine_kwargs"] |= {
        "max_model_len": 512,
        "kv_cache_memory_bytes": 64 << 20,
        "dtype": "float32",
        "enforce_eager": True,
    }
    ray["gateway"] = {"port": 0}
    async with cluster(ray, tmp_path, zygote) as c:
        await c.start_worker("w0")
        assert is_style("pirate", await c.text("demo:pirate", PROMPTS[0], max_tokens=120))


async def test_vllm_bench_serve_runs_against_it_unchanged(demo: Cluster, tmp_path: Path) -> None:
    # `vllm bench serve` itself: the CPU build's command line stops on its own package name, so its
    # main is called.
    program = (
        "import argparse, vllm.benchmarks.serve as s; p = argparse.ArgumentParser(); "
        "s.add_cli_args(p); s.main(p.parse_args())"
    )
    argv = [sys.executable, "-c", program, "--backend", "openai-chat", "--base-url", demo.url]
    argv += [
        "--endpoint",
        "/v1/chat/completions",
        "--model",
        "demo",
        "--tokenizer",
        str(DEMO / "model"),
        "--dataset-name",
        "random",
    ]
    argv += [
        "--random-input-len",
        "32",
        "--random-output-len",
        "16",
        "--num-prompts",
        "20",
        "--max-concurrency",
        "8",
        "--ignore-eos",
    ]
    argv += [
        "--lora-modules",
        "demo:pirate",
        "demo:haiku",
        "--save-result",
        "--result-filename",
        str(tmp_path / "result.json"),
    ]
    process = await asyncio.create_subprocess_exec(
        *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, cwd=tmp_path
    )
    async with asyncio.timeout(180):
        out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()[-2000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["completed"] == 20 and result["total_output_tokens"] == 320
