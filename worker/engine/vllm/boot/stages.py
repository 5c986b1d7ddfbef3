"""Shell. What vLLM is at while it starts. The calls that its executor gets tell it, in whatever
process they are made. vLLM's own log lines would be other words in every version.

Each call adds a line to a file that the worker has named in STAGES_ENV.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

STAGES_ENV = "LORAPLEX_ENGINE_STAGES"
WORDS = {
    "__init__": "loading the weights",
    "determine_available_memory": "measuring the memory for the KV cache",
    "initialize_from_config": "making the KV cache",
    "compile_or_warm_up_model": "compiling kernels",
}
"""Methods of vLLM's Executor, in the order of a start -> what a person reads."""
MAX_FAILURE = 500  # characters
CAPTURES = "compiling kernels and capturing graphs"


class BootStage(msgspec.Struct, frozen=True):
    """A call that has begun. `at_s` is on the host's monotonic clock. `kv_tokens`: what the KV
    cache holds, once that is known. `failed`: what the call has raised.
    """

    method: str
    at_s: float
    captures: bool = False
    kv_tokens: int = 0
    failed: str = ""

    @property
    def words(self) -> str:
        if self.method != "compile_or_warm_up_model":
            return WORDS[self.method]
        text = CAPTURES if self.captures else WORDS[self.method]
        return f"{text} (KV cache of {self.kv_tokens:,} tokens)" if self.kv_tokens else text


_decode = msgspec.json.Decoder(BootStage).decode
_encode = msgspec.json.Encoder().encode


class BootStages:
    """The stages of one start, read by the worker."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> list[BootStage]:
        """Those that have begun. The last is what vLLM is at."""
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            return [_decode(line) for line in self._path.read_bytes().splitlines()]
        return []


@contextlib.contextmanager
def boot_stages() -> Iterator[BootStages]:
    """Inside, the stages of this process and of those that it starts are noted."""
    # beside vLLM's sockets, in the folder that `serve` removes whatever happens
    handle, path = tempfile.mkstemp(".stages", dir=os.environ.get("VLLM_RPC_BASE_PATH") or None)
    os.close(handle)
    os.environ[STAGES_ENV] = path
    try:
        yield BootStages(Path(path))
    finally:
        del os.environ[STAGES_ENV]
        Path(path).unlink(missing_ok=True)


def failure_of(stages: Sequence[BootStage]) -> str:
    """What the engine's process has failed with. vLLM itself says only that it has, in the process
    that waits for it. Empty: nothing is known.
    """
    return next((stage.failed for stage in stages if stage.failed), "")


def took_s(stages: Sequence[BootStage], ended_at_s: float) -> dict[str, float]:
    """How long each stage took, by what a person reads."""
    times = pairwise([*(stage.at_s for stage in stages), ended_at_s])
    return {
        WORDS[stage.method]: round(end - begin, 1)
        for stage, (begin, end) in zip(stages, times, strict=True)
    }


def install() -> None:
    """Notes the stages in this process. A second call does nothing. A method that vLLM does not
    have is a stage that is not seen.
    """
    from vllm.v1.executor import Executor

    for method in WORDS:
        original = getattr(Executor, method, None)
        if original is not None and not getattr(original, "loraplex", False):
            setattr(Executor, method, _noting(method, original))


def _noting(method: str, original: Any) -> Any:
    @functools.wraps(original)
    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = getattr(self, "vllm_config", None)  # not before __init__ has run
        _note(method, config)
        try:
            return original(self, *args, **kwargs)
        except Exception as exc:
            _note(method, config, f"{type(exc).__name__}: {exc}")
            raise

    noting.loraplex = True  # type: ignore[attr-defined]
    return noting


def _note(method: str, config: Any, failed: str = "") -> None:
    path = os.environ.get(STAGES_ENV)
    if path is None:
        return
    kv_tokens = getattr(config and config.cache_config, "kv_cache_size_tokens", None) or 0
    captures = config is not None and not config.model_config.enforce_eager
    stage = BootStage(method, time.monotonic(), captures, kv_tokens, failed[:MAX_FAILURE])
    with contextlib.suppress(OSError):  # the worker has ended; this process will, too
        out = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.write(out, _encode(stage) + b"\n")
        os.close(out)
