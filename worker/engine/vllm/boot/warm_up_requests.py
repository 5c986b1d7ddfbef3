"""Pure. The requests that a worker sends to its engine before it says that it is ready. The first
request of each kind compiles kernels inside the step loop.
"""

from __future__ import annotations

import io
import json
import wave
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

WARM_UP_TOKENS = 2
WARM_UPS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.5, "seed": 1, "logprobs": 1},
    {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.1,
        "repetition_penalty": 1.1,
    },
    {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "warm", "schema": {"type": "object"}},
        }
    },
)
"""One request each: greedy, seeded with logprobs, sampled with penalties, structured."""


@dataclass(frozen=True, slots=True)
class WarmUpRequest:
    """One request to the engine."""

    path: str
    body: bytes
    content_type: str = "application/json"


def warm_up(model: str, tasks: Collection[str], extra: Mapping[str, Any]) -> WarmUpRequest:
    """A small request that a model with these tasks answers. `extra`: more fields of its body."""
    if "transcription" in tasks and "generate" not in tasks:
        return WarmUpRequest("/v1/audio/transcriptions", _form(model, _silence()), FORM)
    path, fields = _small(tasks)
    return WarmUpRequest(path, json.dumps({"model": model, **fields, **extra}).encode())


def _small(tasks: Collection[str]) -> tuple[str, dict[str, Any]]:
    if "generate" in tasks:
        return "/v1/completions", {"prompt": [1, 1], "max_tokens": WARM_UP_TOKENS}
    if "embed" in tasks:
        return "/v1/embeddings", {"input": [1, 1]}
    if "classify" in tasks:
        return "/classify", {"input": "warm"}
    return "/pooling", {"input": [1, 1]}


FORM = "multipart/form-data; boundary=part"


def _form(model: str, sound: bytes) -> bytes:
    part = b"--part\r\nContent-Disposition: form-data; name="
    return b"".join(
        (
            part + b'"model"\r\n\r\n' + model.encode() + b"\r\n",
            part + b'"file"; filename="warm-up.wav"\r\nContent-Type: audio/wav\r\n\r\n' + sound,
            b"\r\n--part--\r\n",
        )
    )


def _silence() -> bytes:
    """A tenth of a second, as a WAV file."""
    file = io.BytesIO()
    with wave.open(file, "wb") as made:
        made.setnchannels(1)
        made.setsampwidth(2)
        made.setframerate(16_000)
        made.writeframes(bytes(2 * 1600))
    return file.getvalue()


MOST_PROMPTS = 64
"""Prompts of one prefill. If prompts must be short, a large prefill would need more and is left
out.
"""


def prefills(above: int, most: int, longest: int) -> list[list[list[int]]]:
    """Prompts for one prefill of each size in tokens. The sizes begin at twice `above`, the largest
    batch that a graph was captured for, and double up to `most`.

    Kernels for adapters are compiled per batch size. Without these prefills, the first burst of
    adapters stood still for 7 s on an H200. Each inner list is sent at once. No prompt is longer
    than `longest` tokens. No two begin alike, because what the prefix cache has is not computed.
    """
    made: list[list[list[int]]] = []
    size, token = 2 * above, 0
    while size <= most and -(-size // longest) <= MOST_PROMPTS:
        prompts = []
        for at in range(0, size, longest):
            token += 1
            prompts.append([token] * min(longest, size - at))
        made.append(prompts)
        size *= 2
    return made
