"""Shell. Ray Serve in the shape of Serve LLM: proxy -> ingress deployment (FastAPI) -> server
deployment, streams in batches of 50 ms.

    PYTHON_OF_THE_PEER bench/gateways/peers/ray_app.py PORT

It runs in Ray's own environment and imports nothing of this project. The server deployment makes
the tokens itself, at the pace in the request's `seed` (milliseconds). The ingress renders them with
pydantic, as Serve LLM's OpenAI ingress does. The server's CPU counts as the gateway's; it is a
fifth of the whole.
"""

# mypy: ignore-errors
# (its imports are not installed here)

# No `from __future__ import annotations`: FastAPI looks types up by name in a module that Ray has
# pickled by value, and does not find them.
import asyncio
import sys
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

import ray
from fastapi import FastAPI, Request
from pydantic import BaseModel
from ray import serve
from starlette.responses import JSONResponse, StreamingResponse

BATCH_S = 0.05  # Serve LLM's default stream_batching_interval_ms
MAX_ONGOING = 8_192

app = FastAPI()


class Delta(BaseModel):
    role: str | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    index: int = 0
    delta: Delta
    logprobs: Any = None
    finish_reason: str | None = None


class Chunk(BaseModel):
    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]


@serve.deployment(
    name="LLMServer", max_ongoing_requests=MAX_ONGOING, ray_actor_options={"num_cpus": 0}
)
class RayServer:
    async def chat(
        self, body: dict[str, Any]
    ) -> AsyncGenerator[list[Chunk] | dict[str, Any], None]:
        count, pace_s = int(body.get("max_tokens") or 16), float(body.get("seed") or 0) / 1e3
        made = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body["model"],
        }
        if not body.get("stream"):
            text = "".join(f" tok{i:04d}" for i in range(count))
            usage = {"prompt_tokens": 128, "completion_tokens": count, "total_tokens": 128 + count}
            choice = {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": "length",
            }
            yield {**made, "object": "chat.completion", "choices": [choice], "usage": usage}
            return
        batch, sent = (
            [Chunk(**made, choices=[ChunkChoice(delta=Delta(role="assistant", content=""))])],
            time.monotonic(),
        )
        due = sent
        for i in range(count):
            if i and pace_s:
                due += pace_s
                await asyncio.sleep(max(0.0, due - time.monotonic()))
            last = i == count - 1
            batch.append(
                Chunk(
                    **made,
                    choices=[
                        ChunkChoice(
                            delta=Delta(content=f" tok{i:04d}"),
                            finish_reason="length" if last else None,
                        )
                    ],
                )
            )
            now = time.monotonic()
            if last or now - sent >= BATCH_S or i == 0:
                yield batch
                batch, sent = [], now


@serve.deployment(
    name="OpenAiIngress", max_ongoing_requests=MAX_ONGOING, ray_actor_options={"num_cpus": 0}
)
@serve.ingress(app)
class Ingress:
    def __init__(self, server: Any) -> None:
        self._server = server.options(stream=True)

    @app.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "base", "object": "model"}]}

    @app.post("/v1/chat/completions")
    async def chat(self, request: Request) -> Any:
        body = await request.json()
        answers = self._server.chat.remote(body)
        if not body.get("stream"):
            async for answer in answers:
                return JSONResponse(answer)

        async def events() -> AsyncGenerator[str, None]:
            async for batch in answers:
                yield "".join(f"data: {chunk.model_dump_json()}\n\n" for chunk in batch)
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")


def main() -> None:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(Ingress.bind(RayServer.bind()), name="llm", route_prefix="/")
    while True:  # until it is killed
        time.sleep(3600)


if __name__ == "__main__":
    main()
