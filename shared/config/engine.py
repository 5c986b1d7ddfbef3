"""Pure. `engine_kwargs`: the keys that Loraplex itself must understand. All others are checked
against vLLM's own list of arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import msgspec

from shared.config import vllm_server_arguments
from shared.config.deployment import Factor
from shared.config.llm_sections import DEFAULT_MAX_LORAS, LoraConfig, Positive, SecondsOrNone
from shared.config.section import Finding, Section, has_errors, read_fields, under
from shared.config.vllm_engine_arguments import NO_LONGER

# the values that vLLM accepts for max_lora_rank (vllm/config/lora.py)
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_KWARGS = ("engine_kwargs",)
_ENABLE = (*_KWARGS, "enable_lora")
_SLOTS = (*_KWARGS, "max_loras")
_PATH = ("lora_config", "dynamic_lora_loading_path")
_PIN, _PRELOAD = ("lora_config", "pin"), ("lora_config", "preload")
_ADAPTERS = ("lora_config", "max_num_adapters_per_replica")


class _LoraKwargs(Section, frozen=True, kw_only=True):
    """The keys that both engines understand."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        "model": "is set from model_loading_config.model_source; remove it",
        "served_model_name": "is set from model_loading_config.model_id; remove it",
        "worker_extension_cls": "is Loraplex's own, which puts adapters into slots; remove it",
        **vllm_server_arguments.REFUSED,
    }

    enable_lora: bool | None = None
    max_loras: Positive | None = None
    max_lora_rank: int | None = None
    max_cpu_loras: Positive | None = None

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> Iterator[Finding]:
        rank, slots, registered = (
            values.get(name) for name in ("max_lora_rank", "max_loras", "max_cpu_loras")
        )
        if rank is not None and rank not in LORA_RANKS:
            ranks = ", ".join(map(str, LORA_RANKS))
            yield Finding(
                ("max_lora_rank",),
                f"{rank} is not a rank that vLLM reserves slots for; use the next of {ranks}",
            )
        if slots is not None and registered is not None and registered < slots:
            yield Finding(
                ("max_cpu_loras",),
                f"{registered} is less than max_loras ({slots}); raise it",
                other=("max_loras",),
            )


class VllmKwargs(_LoraKwargs, frozen=True, kw_only=True):
    """vLLM's keys that also decide something outside of vLLM."""

    tensor_parallel_size: Positive = 1
    pipeline_parallel_size: Positive = 1
    data_parallel_size: Positive = 1
    nnodes: Positive = 1
    distributed_executor_backend: Any = None

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> Iterator[Finding]:
        yield from super().check(values)
        if values.get("data_parallel_size", 1) != 1:
            yield Finding(
                ("data_parallel_size",),
                "the gateway balances between workers itself; set "
                "deployment_config.num_replicas instead",
            )
        if values.get("nnodes", 1) != 1:
            yield Finding(
                ("nnodes",),
                "a worker runs on one machine, and would wait for the others; choose one with "
                "enough GPUs and remove it",
            )
        if values.get("distributed_executor_backend") == "ray":
            yield Finding(
                ("distributed_executor_backend",),
                "there is no Ray here: vLLM's multiprocess executor is used",
                "warning",
            )


class SimTiming(Section, frozen=True, kw_only=True):
    """The timing of the simulated engine, in milliseconds. A load costs load_ms + load_ms_per_mb x
    megabytes. A prompt with the word `deadly_word` ends the engine before its first token, and with
    a number behind the word (`word7`) after so many tokens. Empty: no prompt does.
    """

    ttft_ms: SecondsOrNone = 5.0
    itl_ms: SecondsOrNone = 20.0
    prefill_tokens_per_s: Factor = 8000.0
    load_ms: SecondsOrNone = 60.0
    load_ms_per_mb: SecondsOrNone = 1.2
    max_num_seqs: Positive = 256
    deadly_word: str = ""


class SimKwargs(_LoraKwargs, frozen=True, kw_only=True):
    """All keys of the simulated engine. `max_num_seqs` may be given here, as for vLLM, or
    in `sim`.
    """

    max_model_len: Positive | None = None
    max_num_seqs: Positive | None = None
    sim: SimTiming = msgspec.field(default_factory=SimTiming)

    @classmethod
    def prepare(cls, given: dict[str, Any]) -> dict[str, Any]:
        seqs, sim = given.get("max_num_seqs"), given.get("sim")
        if _is_count(seqs) and (
            sim is None or (isinstance(sim, Mapping) and sim.get("max_num_seqs") is None)
        ):
            given["sim"] = {**(sim or {}), "max_num_seqs": seqs}
        return given

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> Iterator[Finding]:
        yield from super().check(values)
        sim, seqs = values.get("sim"), values.get("max_num_seqs")
        if sim is not None and seqs is not None and sim.max_num_seqs != seqs:
            yield Finding(
                ("max_num_seqs",),
                f"{seqs} here, {sim.max_num_seqs} in sim; keep one of the two",
                other=("sim", "max_num_seqs"),
            )


def engine_findings(values: Mapping[str, Any]) -> Iterator[Finding]:
    """Checks the rules between engine and adapters, on the good fields of an LLMConfig."""
    engine, kwargs = values.get("llm_engine"), values.get("engine_kwargs")
    if engine is None or kwargs is None:
        return
    yield from (Finding((*_KWARGS, key), text) for key, text in _not_plain(kwargs))
    typed, findings = _typed(engine, kwargs)
    for found in under(_KWARGS, findings):
        # the key stays in `engine_kwargs`, so the model's values cannot be used without it
        yield replace(found, severity="error") if found.severity == "stray" else found
    if "lora_config" in values:
        yield from _lora_rules(engine, typed, values["lora_config"])
    for key in (*vllm_server_arguments.IGNORED, *NO_LONGER):
        if kwargs.get(key) is not None:
            why = vllm_server_arguments.IGNORED.get(key) or NO_LONGER[key]
            yield Finding((*_KWARGS, key), f"has no effect here: {why}", "warning")
    if kwargs.get("disable_log_stats") is True:
        text = "true switches off the statistics that routing needs; remove it"
        yield Finding((*_KWARGS, "disable_log_stats"), text)


def _typed(engine: str, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], list[Finding]]:
    if engine == "sim":
        return read_fields(SimKwargs, kwargs, ())
    ours = {
        key: value
        for key, value in kwargs.items()
        if key in VllmKwargs.__struct_fields__ or key in VllmKwargs.REFUSED
    }
    return read_fields(VllmKwargs, ours, ())


def _lora_rules(
    engine: str, kwargs: Mapping[str, Any], lora: LoraConfig | None
) -> Iterator[Finding]:
    """The rules that need `kwargs` and `lora` together. A key that is already reported is absent
    from `kwargs`, so no rule uses it.
    """
    if lora is None:
        return
    if lora.dynamic_lora_loading_path is not None and "enable_lora" in kwargs:
        enabled = kwargs["enable_lora"]
        # the simulated engine always has slots
        if enabled is False or (enabled is None and engine != "sim"):
            text = (
                "adapters are configured, but engine_kwargs.enable_lora is not true; set "
                "it (Ray would fail at the first request)"
            )
            yield Finding(_PATH, text, other=_ENABLE)
    slots, adapters = kwargs.get("max_loras"), lora.max_num_adapters_per_replica
    if slots is not None and adapters is not None and slots != adapters:
        text = (
            f"{slots} differs from lora_config.max_num_adapters_per_replica ({adapters}); "
            "make them equal, or leave one out"
        )
        yield Finding(_SLOTS, text, other=_ADAPTERS)
        return
    size, key = slots or adapters or DEFAULT_MAX_LORAS, _SLOTS if slots else _ADAPTERS
    if len(lora.pin) >= size:
        text = (
            f"{len(lora.pin)} adapters for {size} slots a worker, of which one must stay "
            f"for the others; pin at most {size - 1}"
        )
        yield Finding(_PIN, text, other=key)
    elif len({*lora.pin, *lora.preload}) > size:
        text = (
            f"with the pinned ones {len({*lora.pin, *lora.preload})} adapters for {size} "
            "slots a worker: they push one another out"
        )
        yield Finding(_PRELOAD, text, "warning", other=key)


def _not_plain(kwargs: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The values that cannot be sent as JSON. Workers are separate processes and get their
    arguments as JSON.
    """
    for key, value in kwargs.items():
        if not is_plain(value):
            yield (
                key,
                "expected text, numbers, lists and mappings, got a Python "
                f"{type(value).__name__}; write its name as text",
            )


def is_plain(value: object) -> bool:
    """Whether JSON can carry the value."""
    match value:
        case None | bool() | int() | float() | str():
            return True
        case list() | tuple():
            return all(is_plain(item) for item in value)
        case Mapping():
            return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
        case _:
            return False


def sim_timing(kwargs: Mapping[str, Any]) -> SimTiming:
    """The timing in a simulated engine's valid `engine_kwargs`."""
    values, findings = read_fields(SimKwargs, kwargs, ())
    assert not has_errors(findings), findings
    timing: SimTiming = values["sim"]
    return timing


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
