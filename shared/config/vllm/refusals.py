"""Pure. What vLLM itself said of the models of a config, as lines for whoever wrote the config.
worker/engine/vllm/boot/refusals.py asks it.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from typing import assert_never

import msgspec

from shared.config.llm import LLMConfig, Settings
from shared.config.section import shown


class RefusalScope(enum.Enum):
    """Where vLLM refuses something."""

    EVERYWHERE = "everywhere"
    HOST = "host"
    """Only on a host like this one, as far as can be told."""
    ABSENT = "absent"
    """It could not tell: a file is not on this host."""


class Devices(enum.Enum):
    """What vLLM was asked on, beside the GPUs of a worker."""

    WORKERS = "workers"
    """On the same."""
    CPU = "cpu"
    """On a CPU, because there is no GPU here. `serve` here would run the workers on it."""
    OTHER = "other"
    """On what would not do for a worker."""


class Refusal(msgspec.Struct, frozen=True):
    """vLLM refuses these `keys` of engine_kwargs together, and leaving one out would help. Empty:
    it refuses the model with any.
    """

    keys: tuple[str, ...]
    words: str
    scope: RefusalScope


class VllmVerdict(msgspec.Struct, frozen=True):
    """All that vLLM refuses of one model. Without the model's own config.json on this host another
    took its place.
    """

    refusals: tuple[Refusal, ...] = ()
    model_is_here: bool = True
    devices: Devices = Devices.WORKERS


ON_CPU = "this host has no GPU: `serve` here runs the workers on its CPU, and vLLM was asked on it"
WORDS_CHARS = 400
"""Five lines of a terminal. Some of vLLM's own messages name every model that it knows."""

read_verdicts = msgspec.json.Decoder(list[VllmVerdict]).decode


def refusal_lines(
    settings: Settings, verdicts: Sequence[VllmVerdict | None]
) -> tuple[list[str], list[str], list[str]]:
    """(errors, warnings, notes), those of values with their place in the file. `verdicts` are one
    for each model. None: vLLM was not asked.
    """
    errors: list[str] = []
    warnings: list[str] = []
    notes: list[str] = []
    for model, path, verdict in zip(settings.models, settings.model_paths, verdicts, strict=True):
        if verdict is None:
            continue
        for refusal in verdict.refusals:
            key = f"{path}.{_key(refusal)}"
            line = f"{settings.places.get(key, settings.source)}: {key}: {_said(model, refusal)}"
            (errors if refusal.scope is RefusalScope.EVERYWHERE else warnings).append(line)
        warnings += (f"{model.model_id}: {text}" for text in _unjudged(verdict))
        if verdict.devices is Devices.CPU:
            notes.append(f"{model.model_id}: {ON_CPU}")
    return errors, warnings, notes


def _key(refusal: Refusal) -> str:
    return f"engine_kwargs.{refusal.keys[0]}" if refusal.keys else "model_loading_config"


def _said(model: LLMConfig, refusal: Refusal) -> str:
    what = shown(model.engine_kwargs[refusal.keys[0]]) if refusal.keys else "this model"
    others = "".join(f" with {key}: {shown(model.engine_kwargs[key])}" for key in refusal.keys[1:])
    words = _shortened(refusal.words.rstrip(". "))
    match refusal.scope:
        case RefusalScope.EVERYWHERE:
            advice = "change one of them" if refusal.keys[1:] else "change it or leave it out"
            if not refusal.keys:
                advice = "choose another model or another vLLM"
            return f"vLLM refuses {what}{others}: {words}; {advice}"
        case RefusalScope.HOST:
            return f"on this host vLLM refuses {what}{others}: {words}; try it where workers run"
        case RefusalScope.ABSENT:
            return (
                f"{what}{others} was not checked, because something it needs is not on this host "
                f"and nothing is downloaded: {words.partition('. ')[0]}; check it where workers run"
            )
        case _:
            assert_never(refusal.scope)


def _shortened(words: str) -> str:
    line = " ".join(words.split())
    return line if len(line) <= WORDS_CHARS else f"{line[:WORDS_CHARS]} ..."


def _unjudged(verdict: VllmVerdict) -> Iterator[str]:
    if not verdict.model_is_here:
        yield (
            "the model's config.json is not on this host, so what depends on the model, such as "
            "its longest context, was not checked"
        )
    if verdict.devices is Devices.OTHER:
        yield (
            "vLLM was asked on a host without the GPUs of a worker, so what depends on them was "
            "not checked"
        )
