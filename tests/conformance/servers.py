"""Shell. Loraplex and vLLM's own server on the same models, side by side, and one question to
both.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from bench.process import Process, free_ports, until_answers
from shared.runtime.children import Zygote
from tests.conformance.answers import Answer
from tests.conformance.cases import BASE, HEARING, POOLING, Case
from tests.harness import DEMO, cluster, demo_config
from tests.tiny_whisper import make_whisper
from worker.engine.factory import VLLM_CPU_ENV, VLLM_ENV

BOOT_S = 300.0
ANSWER_S = 60.0
SLOTS = 4
POOLING_ENGINE = {
    "runner": "pooling",
    "enforce_eager": True,
    "dtype": "float32",
    "max_model_len": 512,
    "kv_cache_memory_bytes": 32 << 20,
}
HEARING_ENGINE = {
    "enforce_eager": True,
    "dtype": "float32",
    "max_model_len": 448,
    "kv_cache_memory_bytes": 32 << 20,
}
ENV = VLLM_ENV | VLLM_CPU_ENV | {"OMP_NUM_THREADS": "1", "VLLM_ENABLE_RESPONSES_API_STORE": "1"}


@dataclass(frozen=True, slots=True)
class Pair:
    """Our gateway, and vLLM's server of each model."""

    http: aiohttp.ClientSession
    ours: str
    theirs: Mapping[str, str]

    async def ask(self, case: Case) -> tuple[Answer, Answer]:
        model = POOLING if case.pooling else HEARING if case.audio else BASE
        theirs = self.theirs[model]
        ours, vllms = await asyncio.gather(self._ask(self.ours, case), self._ask(theirs, case))
        return ours, vllms

    async def _ask(self, url: str, case: Case) -> Answer:
        async with (
            asyncio.timeout(ANSWER_S),
            self.http.request(
                case.method,
                url + case.path,
                data=case.body or None,
                headers=dict(case.headers),
                skip_auto_headers=("Content-Type",),
                allow_redirects=False,
            ) as answer,
        ):
            kind, allow = answer.headers.get("Content-Type", ""), answer.headers.get("Allow", "")
            try:
                return Answer(answer.status, kind, await answer.read(), allow)
            except aiohttp.ClientPayloadError:
                return Answer(answer.status, kind, b"(broken off)", allow)


@contextlib.asynccontextmanager
async def both(zygote: Zygote, folder: Path, cases: Sequence[Case]) -> AsyncIterator[Pair]:
    """The servers that these cases need, booted one after the other."""
    config = demo_config(max_loras=SLOTS)
    (chat,) = config["llm_configs"]
    engine = chat["engine_kwargs"] | {"max_loras": SLOTS, "max_cpu_loras": 16}
    models: dict[str, tuple[Path, Mapping[str, Any]]] = {}
    if any(not (case.pooling or case.audio) for case in cases):
        models[BASE] = (DEMO / "model", engine)
    if any(case.pooling for case in cases):
        models[POOLING] = (DEMO / "model", POOLING_ENGINE)
    if any(case.audio for case in cases):
        models[HEARING] = (make_whisper(folder / "whisper"), HEARING_ENGINE)
    config["llm_configs"] = [
        chat if name == BASE else _model(name, source, kwargs)
        for name, (source, kwargs) in models.items()
    ]
    async with contextlib.AsyncExitStack() as stack:
        urls = {
            name: await stack.enter_async_context(_vllm(folder, name, source, kwargs))
            for name, (source, kwargs) in models.items()
        }
        ours = await stack.enter_async_context(cluster(config, folder, zygote))
        for name in models:
            await ours.start_worker(f"of-{name}", name, serving=False)
        for name in models:
            await ours.until_serving(f"of-{name}")
        yield Pair(ours.http, ours.url, urls)


def _model(name: str, source: Path, engine: Mapping[str, Any]) -> dict[str, Any]:
    loading = {"model_id": name, "model_source": str(source)}
    return {"model_loading_config": loading, "engine_kwargs": engine}


@contextlib.asynccontextmanager
async def _vllm(
    folder: Path, name: str, source: Path, engine: Mapping[str, Any]
) -> AsyncIterator[str]:
    """The API server's module: the CPU build's `vllm` command stops at the name of its package."""
    (port,) = free_ports(1)
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    argv += ["--model", str(source), "--served-model-name", name]
    argv += ["--host", "127.0.0.1", "--port", str(port)]
    for key, value in engine.items():
        argv += [f"--{key.replace('_', '-')}", *([] if value is True else [str(value)])]
    if engine.get("enable_lora"):
        adapters = sorted((DEMO / "adapters").iterdir())
        argv += ["--lora-modules", *(f"{name}:{path.name}={path}" for path in adapters)]
    server = Process(argv, folder / f"vllm-{name}.log", ENV, cwd=folder)
    try:
        await until_answers(port, "/health", server, BOOT_S)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop()
