"""What a start of vLLM is at, as its processes note it."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from worker.engine.vllm.boot.stages import STAGES_ENV, _noting, boot_stages, failure_of, took_s


class Engine:
    """Stands where vLLM's executor does: its calls are noted."""

    def __init__(self, eager: bool) -> None:
        cache = SimpleNamespace(kv_cache_size_tokens=None)
        model = SimpleNamespace(enforce_eager=eager)
        self.vllm_config = SimpleNamespace(cache_config=cache, model_config=model)

    def call(self, method: str, kv_tokens: int | None = None) -> str:
        self.vllm_config.cache_config.kv_cache_size_tokens = kv_tokens
        done: str = _noting(method, lambda self: f"{method} done")(self)
        return done


@pytest.mark.parametrize(
    ("eager", "words"),
    [
        (True, "compiling kernels (KV cache of 8,192 tokens)"),
        (False, "compiling kernels and capturing graphs (KV cache of 8,192 tokens)"),
    ],
)
def test_the_last_call_is_what_the_start_is_at(eager: bool, words: str) -> None:
    engine = Engine(eager)
    with boot_stages() as stages:
        assert stages.read() == []
        assert engine.call("determine_available_memory") == "determine_available_memory done"
        assert stages.read()[-1].words == "measuring the memory for the KV cache"
        engine.call("compile_or_warm_up_model", 8192)
        assert [s.method for s in stages.read()] == [
            "determine_available_memory",
            "compile_or_warm_up_model",
        ]
        assert stages.read()[-1].words == words
        found = stages.read()
    assert [*took_s(found, found[1].at_s + 1.5).values()][1] == 1.5
    assert took_s([], 5.0) == {}


def test_what_the_engine_fails_with_is_heard_by_the_worker() -> None:
    def fails(engine: Engine) -> str:
        raise OSError(28, "No space left on device")

    engine = Engine(True)
    with boot_stages() as stages:
        engine.call("determine_available_memory")
        assert failure_of(stages.read()) == ""
        with pytest.raises(OSError, match="No space"):
            _noting("__init__", fails)(engine)
        assert failure_of(stages.read()) == "OSError: [Errno 28] No space left on device"


def test_nothing_is_left_and_nothing_is_noted_once_the_start_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", str(tmp_path))
    with boot_stages() as stages:
        assert len([*tmp_path.iterdir()]) == 1
        path = os.environ[STAGES_ENV]
    assert not [*tmp_path.iterdir()] and STAGES_ENV not in os.environ
    Engine(True).call("determine_available_memory")
    os.environ[STAGES_ENV] = path  # in a process that has not heard of the end
    Engine(True).call("determine_available_memory")
    del os.environ[STAGES_ENV]
    assert stages.read() == [] and not [*tmp_path.iterdir()]
