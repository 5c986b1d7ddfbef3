"""Shell. vLLM engines in the test's own process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from shared.adapters.identity import AdapterRef
from shared.config.settings_file import read_settings
from tests.harness import DEMO, demo_config
from worker.engine.base import Loaded, Swap
from worker.engine.factory import VLLM_CPU_ENV, VLLM_ENV

ADAPTERS = {
    name: Loaded(AdapterRef("demo", name, "1" * 64), i, DEMO / "adapters" / name, 8, 0)
    for i, name in enumerate(("pirate", "haiku"), start=1)
}


@contextlib.contextmanager
def worker_environment() -> Iterator[None]:
    """What a worker process sets before it imports vLLM. It is undone at the end, because other
    tests start processes of their own.
    """
    before = dict(os.environ)
    ours = VLLM_ENV | VLLM_CPU_ENV | {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    for key, value in ours.items():
        os.environ.setdefault(key, value)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


async def start_engine(folder: Path, **more: Any) -> Any:
    """The demo model with two adapters in its slots; `more` are further engine_kwargs."""
    config = demo_config()
    config["llm_configs"][0]["engine_kwargs"] |= {
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        **more,
    }
    engine = await engine_of(config, folder)
    for adapter in ADAPTERS.values():
        await engine.prepare(adapter)
        assert not (await engine.swap(Swap((adapter,)))).refused
    return engine


async def engine_of(config: dict[str, Any], folder: Path) -> Any:
    """An engine of the config's first model."""
    from worker.engine.vllm.engine import VLLMEngine

    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    engine = VLLMEngine(read_settings(str(folder / "config.yaml")).models[0])
    await engine.start()
    return engine
