"""Shell. `python -m tests.clients` (`make clients`): the field's clients on real vLLM, with nothing
but the address set. It prints a table; one call that fails makes the status 1.

    python -m tests.clients
    python -m tests.clients --only anthropic    # calls with this in their name

The clients are installed once, below .cache/clients, in their newest versions. Each call is made
with the base model and with an adapter, and fails unless it answers what curl gets from that
model. What an answer must be is different for each model, so another adapter's would be seen.
Needs Node.js and npm.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from examples.demo.styles import HELD_OUT
from shared.runtime.children import Zygote
from tests.conformance.servers import ENV
from tests.harness import ROOT, cluster, demo_config

HERE, CACHE = Path(__file__).parent, ROOT / ".cache" / "clients"
PYTHON = (
    *("openai", "anthropic", "langchain-openai", "litellm"),
    *("llama-index-llms-openai-like", "instructor"),
)
NODE = ("openai", "@anthropic-ai/sdk", "ai", "@ai-sdk/openai", "@ai-sdk/openai-compatible")
MODELS = ("demo", "demo:pirate", "demo:haiku")
PROMPT, MOST = HELD_OUT[0], 200
ANY = "as any model"
"""What a call says whose right answer is the same for all models."""


async def installed(what: str, *argv: str | Path) -> None:
    """Raises SystemExit with what it said if it fails."""
    process = await asyncio.create_subprocess_exec(
        *map(str, argv), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await process.communicate()
    if process.returncode:
        sys.exit(f"{what} cannot be installed:\n{out.decode(errors='replace')}")


async def prepare() -> tuple[Path, Path]:
    """The Python that has its clients, and the folder of Node's."""
    python, node = CACHE / "python", CACHE / "node"
    if not (python / "ready").exists():
        await installed("a virtual environment", sys.executable, "-m", "venv", python)
        await installed("Python's clients", python / "bin/pip", "install", "-q", *PYTHON)
        (python / "ready").touch()
    if not (node / "ready").exists():
        node.mkdir(parents=True, exist_ok=True)
        await installed("Node's clients", "npm", "install", "--silent", "--prefix", node, *NODE)
        (node / "ready").touch()
    (node / "node_calls.mjs").write_text((HERE / "node_calls.mjs").read_text())
    return python / "bin/python", node


async def said(*argv: str | Path) -> AsyncIterator[dict[str, str]]:
    process = await asyncio.create_subprocess_exec(
        *map(str, argv), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    for line in out.splitlines():
        if line.startswith(b"{"):
            yield json.loads(line)
    if process.returncode:
        yield {"call": str(argv[1]), "error": err.decode(errors="replace")[-500:]}


def curl(url: str, model: str) -> list[str]:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": PROMPT}],
        "temperature": 0,
        "max_tokens": MOST,
    }
    head = ["curl", "-sS", "-H", "Content-Type: application/json"]
    return [*head, "-d", json.dumps(body), f"{url}/v1/chat/completions"]


async def due_from(url: str, model: str) -> str:
    """What curl gets. It is what every client must get."""
    process = await asyncio.create_subprocess_exec(*curl(url, model), stdout=-1)
    out, _ = await process.communicate()
    return str(json.loads(out)["choices"][0]["message"]["content"])


async def ask_all(only: str) -> dict[str, dict[str, str]]:
    """The call -> the model -> "" if it answered as it must, or what it did instead."""
    python, node = await prepare()
    found: dict[str, dict[str, str]] = {}
    # a small model would write blanks for ever
    grammars = {"backend": "xgrammar", "disable_any_whitespace": True}
    config = demo_config(max_loras=len(MODELS), engine={"structured_outputs_config": grammars})
    with tempfile.TemporaryDirectory(prefix="clients-") as folder:
        zygote = await Zygote.open(ENV | {"VLLM_LOGGING_LEVEL": "ERROR"})
        try:
            async with cluster(config, Path(folder), zygote) as c:
                await c.start_worker("w0")
                due = {model: await due_from(c.url, model) for model in MODELS}
                if len(set(due.values())) < len(MODELS):
                    sys.exit(f"the models cannot be told apart: {due}")
                for model in MODELS:
                    for argv in (
                        (python, HERE / "python_calls.py", c.url, model, PROMPT),
                        ("node", node / "node_calls.mjs", c.url, model, PROMPT),
                    ):
                        async for one in said(*argv):
                            text = one.get("text")
                            right = text in (due[model], ANY)
                            wrong = one.get("error") or f"answered {text!r}, not {due[model]!r}"
                            found.setdefault(one["call"], {})[model] = "" if right else wrong
        finally:
            await zygote.close()
    return {call: models for call, models in found.items() if only in call}


def table(found: dict[str, dict[str, str]]) -> str:
    lines = [f"| client and call | {' | '.join(MODELS)} |", f"|---{'|---' * len(MODELS)}|"]
    for call, models in found.items():
        cells = ("passed" if not models.get(model, "not made") else "FAILED" for model in MODELS)
        lines.append(f"| {call} | {' | '.join(cells)} |")
    for call, models in found.items():
        lines += [f"{call}, {model}: {why}" for model, why in models.items() if why]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description=__doc__)
    parser.add_argument("--only", default="", help="calls with this in their name")
    found = asyncio.run(ask_all(parser.parse_args(arguments).only))
    print(table(found))
    all_passed = all(models.get(m) == "" for models in found.values() for m in MODELS)
    return 0 if found and all_passed else 1


if __name__ == "__main__":
    sys.exit(main())
