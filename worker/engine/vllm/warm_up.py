"""Pure. What a worker asks its engine before it says that it is ready: the first request of each
kind compiles kernels inside the step loop.
"""

from __future__ import annotations

from collections.abc import Collection
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


def warm_up(tasks: Collection[str]) -> tuple[str, dict[str, Any]]:
    """(path, body without its model) of a small request that a model with these tasks answers."""
    if "generate" in tasks:
        return "/v1/completions", {"prompt": [1, 1], "max_tokens": WARM_UP_TOKENS}
    if "embed" in tasks:
        return "/v1/embeddings", {"input": [1, 1]}
    if "classify" in tasks:
        return "/classify", {"input": "warm"}
    return "/pooling", {"input": [1, 1]}


MOST_PROMPTS = 64
"""Of one prefill: where prompts must be short, large ones are left out."""


def prefills(above: int, most: int, longest: int) -> list[list[list[int]]]:
    """Prompts for one prefill of each size in tokens: double `above`, the largest batch that a
    graph was captured for, up to `most`.

    Kernels for adapters are compiled per size of batch: without this, the first burst of adapters
    stood still for 7 s on an H200. Each inner list is sent at once; no prompt is longer than
    `longest` tokens or begins as another one does, for what is in the prefix cache is not computed.
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
