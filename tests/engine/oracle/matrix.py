"""Shell. Every module of every base, served by real vLLM and judged by PEFT: `make oracle` prints
the table of docs/ADAPTERS.md.

python -m tests.engine.oracle.matrix [BASE ...]
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import peft

from shared.runtime.children import Zygote
from tests.engine.oracle.bases import BASES, WORDS, Base, make_adapter, make_base
from tests.harness import Cluster, cluster
from worker.validation.oracle import distance, load_base, prompts, request, row

ALL = "all together"


async def judge(name: str, folder: Path, zygote: Zygote | None = None) -> dict[str, str]:
    """module -> `right`, `refused: CODE`, `base` (the adapter has no effect) or `wrong: ...`."""
    base = BASES[name]
    at = make_base(base, folder / "base")
    served = [m for m in base.modules if m not in base.refused]
    kinds = {**{m: [m] for m in base.modules}, ALL: served}
    for seed, (kind, modules) in enumerate(kinds.items()):
        make_adapter(at, folder / "store" / kind.replace(" ", "-"), modules, seed)
    async with cluster(_config(at, folder / "store"), folder, zygote) as c:
        await c.start_worker("w0")
        return {kind: await _judged(c, base, at, kind) for kind in kinds}


async def _judged(c: Cluster, base: Base, at: Path, kind: str) -> str:
    rows = []
    for prompt in prompts(WORDS):
        status, body = await _ask(c, f"tiny:{kind.replace(' ', '-')}", prompt)
        if status != 200:
            return f"refused: {body['error']['code']}"
        rows.append(row(prompt, body))
    plain = load_base(str(at))
    if distance(plain, rows, base.close).within(base.close):
        return "base"
    adapted = peft.PeftModel.from_pretrained(plain, at.parent / "store" / kind.replace(" ", "-"))
    found = distance(adapted.eval().float(), rows, base.close)
    if found.within(base.close):
        return "right"
    return f"wrong: {found.other} of {found.tokens} tokens, logprobs off by {found.off:.2g}"


async def _ask(c: Cluster, model: str, prompt: list[int]) -> tuple[int, Any]:
    async with c.http.post(f"{c.url}/v1/completions", json=request(model, prompt)) as answer:
        return answer.status, await answer.json()


def _config(at: Path, store: Path) -> dict[str, Any]:
    engine = {
        "enable_lora": True,
        "max_loras": 4,
        "max_lora_rank": 16,
        "enforce_eager": True,
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 64 << 20,
    }
    return {
        "llm_configs": [
            {
                "model_loading_config": {"model_id": "tiny", "model_source": str(at)},
                "engine_kwargs": engine,
                "lora_config": {"dynamic_lora_loading_path": str(store)},
            }
        ],
        "gateway": {"port": 0, "lease_s": 5.0},
    }


def table(found: dict[str, dict[str, str]]) -> str:
    lines = ["| architecture | served right | refused (why) | wrong |", "|---|---|---|---|"]
    for name, verdicts in found.items():
        refused = BASES[name].refused
        right = ", ".join(m for m, v in verdicts.items() if v == "right")
        out = "; ".join(
            f"{m} ({refused.get(m, v)})" for m, v in verdicts.items() if v.startswith("refused")
        )
        bad = "; ".join(
            f"{m} ({v})" for m, v in verdicts.items() if v[:4] in ("wron", "base", "not ")
        )
        lines.append(f"| {name} | {right} | {out or '-'} | {bad or '-'} |")
    return "\n".join(lines)


async def main(names: list[str]) -> int:
    warnings.filterwarnings("ignore")
    found: dict[str, dict[str, str]] = {}
    for name in names or BASES:
        with tempfile.TemporaryDirectory(prefix="loraplex-oracle-") as folder:
            try:
                found[name] = await judge(name, Path(folder))
            except (AssertionError, TimeoutError, ValueError, OSError) as exc:
                found[name] = {ALL: f"not served: {repr(exc)[-200:]}"}
        print(name, found[name], file=sys.stderr, flush=True)
    print(table(found))
    bad = [v for verdicts in found.values() for v in verdicts.values() if v[:4] in ("wron", "base")]
    return bool(bad)


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1:])))
