"""Shell. Compares what is served with PEFT and transformers in float32 on this host. It serves
`loraplex adapters verify` and the tests.

    python -m worker.validation.oracle NAME --config CONFIG --url GATEWAY [--model BASE]

Each token that was served must be PEFT's own greedy choice for the same prefix, and its logprob
must be PEFT's. The prefix is the served one, so one deviation does not make all later tokens look
wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from shared.config.llm import LLMConfig
from shared.config.settings_file import read_settings
from shared.errors import AdapterNotFound, ConfigError, LoraplexError
from shared.stores import open_store
from worker.validation.__main__ import choose_model

SAME, DIFFERENT, NOT_COMPARED = 0, 1, 2
PROMPT_TOKENS = (5, 11, 30)
ANSWER_TOKENS = 16
CLOSE = 0.02
"""The largest difference of logprobs that other float32 kernels cause. bfloat16 causes ten times as
much.
"""


@dataclass(frozen=True, slots=True)
class GreedyAnswer:
    """One greedy answer: the token ids, and the logprob of each token of the answer."""

    prompt: Sequence[int]
    tokens: Sequence[int]
    logprobs: Sequence[float]


@dataclass(frozen=True, slots=True)
class ReferenceDistance:
    """How far what was served is from the reference. `other` of the `tokens` are not the
    reference's choice. `off` is the largest difference of logprobs.
    """

    other: int
    tokens: int
    off: float

    def within(self, close: float) -> bool:
        """Whether no token differs and no logprob differs by more than `close`."""
        return self.other == 0 and self.off <= close


def prompts(words: int) -> list[list[int]]:
    """Token ids that any vocabulary has. The first few ids are left out, because they are often
    special.
    """
    return [
        [10 + (7 * n + 131 * i * i + 17 * i) % (words - 20) for i in range(n)]
        for n in PROMPT_TOKENS
    ]


def request(model: str, prompt: Sequence[int], tokens: int = ANSWER_TOKENS) -> dict[str, Any]:
    """The body of a request to /v1/completions."""
    return {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 1,
        "return_token_ids": True,
    }


def row(prompt: Sequence[int], body: Any) -> GreedyAnswer:
    """The row that an answer of /v1/completions holds."""
    choice = body["choices"][0]
    return GreedyAnswer(prompt, choice["token_ids"], choice["logprobs"]["token_logprobs"])


def distance(model: Any, rows: Sequence[GreedyAnswer], close: float = CLOSE) -> ReferenceDistance:
    """The distance between the rows and a causal language model of transformers, with or without
    PEFT.
    """
    import torch

    other, off = 0, 0.0
    with torch.no_grad():
        for r in rows:
            ids = torch.tensor([[*r.prompt, *r.tokens]])
            logits = model(input_ids=ids, use_cache=False).logits[0, len(r.prompt) - 1 : -1]
            logprobs = logits.float().log_softmax(-1)
            mine = logprobs[torch.arange(len(r.tokens)), torch.tensor(r.tokens)]
            other += int((logprobs.max(-1).values - mine > close).sum())
            off = max(off, float((mine - torch.tensor(r.logprobs)).abs().max()))
    return ReferenceDistance(other, sum(len(r.tokens) for r in rows), off)


def load_base(source: str, **more: Any) -> Any:
    """The base model in float32, with the plainest kernels."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation="eager", local_files_only=True, **more
    ).eval()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="loraplex adapters verify", description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--config", required=True)
    parser.add_argument("--model")
    parser.add_argument("--url", required=True)
    parser.add_argument("--close", type=float, default=CLOSE)
    args = parser.parse_args(argv)
    try:
        model = choose_model(read_settings(args.config), args.model)
        found, base = verify(model, args.name, args.url, args.close)
    except LoraplexError as exc:
        sys.stdout.write(f"not compared: {exc.message}\n")
        return NOT_COMPARED
    same = found.within(args.close)
    sys.stdout.write(
        f"{'the same' if same else 'DIFFERENT'}: {found.other} of {found.tokens} tokens are not "
        f"PEFT's choice, logprobs off by at most {found.off:.2g} "
        f"(from the base without the adapter: {base.other} tokens, {base.off:.2g})\n"
    )
    return SAME if same else DIFFERENT


def verify(
    model: LLMConfig, name: str, url: str, close: float
) -> tuple[ReferenceDistance, ReferenceDistance]:
    """Returns (the distance from PEFT with the adapter, the distance from the base without it).
    Raises LoraplexError if they cannot be compared.
    """
    try:
        from peft import PeftModel
    except ImportError as exc:
        raise ConfigError(f"To verify needs PEFT here: {exc}.") from exc
    try:
        base = load_base(model.model_source)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as exc:
        raise ConfigError(f"transformers cannot load {model.model_source}: {exc}") from exc
    words = base.get_input_embeddings().weight.shape[0]
    rows = [_ask(url, f"{model.model_id}:{name}", prompt) for prompt in prompts(words)]
    without = distance(base, rows, close)
    with tempfile.TemporaryDirectory(prefix="loraplex-verify-") as folder:
        asyncio.run(_fetch(model, name, Path(folder)))
        adapted = PeftModel.from_pretrained(base, folder).eval().float()
        return distance(adapted, rows, close), without


async def _fetch(model: LLMConfig, name: str, into: Path) -> None:
    lora = model.lora_config
    if model.adapters_path is None or lora is None:
        raise ConfigError(f"`{model.model_id}` is served without adapters.")
    async with open_store(model.adapters_path, msgspec.structs.asdict(lora.store)) as store:
        found = await store.find(name)
        if found is None:
            raise AdapterNotFound(f"There is no adapter `{name}` in {store.url}.")
        await store.fetch(found, into)


def _ask(url: str, model: str, prompt: Sequence[int]) -> GreedyAnswer:
    headers = {"content-type": "application/json"}
    if key := os.environ.get("LORAPLEX_API_KEY"):
        headers["authorization"] = f"Bearer {key}"
    data = json.dumps(request(model, prompt)).encode()
    try:
        http_request = urllib.request.Request(f"{url.rstrip('/')}/v1/completions", data, headers)
        with urllib.request.urlopen(http_request, timeout=120) as answer:
            return row(prompt, json.load(answer))
    except urllib.error.HTTPError as exc:
        raise ConfigError(f"{url} answered {exc.code}: {exc.read()[:300].decode()}") from exc
    except (OSError, ValueError, KeyError) as exc:
        raise ConfigError(f"{url} did not answer as a gateway does: {exc}") from exc


if __name__ == "__main__":
    sys.exit(main())
