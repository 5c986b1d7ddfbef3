"""What vLLM refused, as lines for whoever wrote the config."""

from __future__ import annotations

from typing import Any

from shared.config.llm import Settings
from shared.config.settings_file import parse_settings
from shared.config.vllm.refusals import (
    WORDS_CHARS,
    Devices,
    Refusal,
    RefusalScope,
    VllmVerdict,
    refusal_lines,
)

TEXT = """\
llm_configs:
- model_loading_config: {model_id: a}
  llm_engine: sim
- model_loading_config:
    model_id: m
  engine_kwargs:
    max_model_len: 0
    max_num_seqs: 16
    max_num_batched_tokens: 8
"""


def settings() -> Settings:
    return parse_settings(TEXT, "c.yaml", lambda path: "")


def lines(*refusals: Refusal, **more: Any) -> tuple[list[str], list[str], list[str]]:
    return refusal_lines(settings(), [None, VllmVerdict(refusals, **more)])


def test_what_every_vllm_refuses_is_an_error_with_place_reason_and_advice() -> None:
    together = ("max_num_batched_tokens", "max_num_seqs")
    errors, warnings, _ = lines(
        Refusal(("max_model_len",), "it must be positive.", RefusalScope.EVERYWHERE),
        Refusal(together, "8 is less than 16", RefusalScope.EVERYWHERE),
        Refusal((), "no such architecture", RefusalScope.EVERYWHERE),
    )
    assert warnings == []
    assert errors == [
        "c.yaml:7: llm_configs[1].engine_kwargs.max_model_len: vLLM refuses 0: it must be "
        "positive; change it or leave it out",
        "c.yaml:9: llm_configs[1].engine_kwargs.max_num_batched_tokens: vLLM refuses 8 with "
        "max_num_seqs: 16: 8 is less than 16; change one of them",
        "c.yaml:4: llm_configs[1].model_loading_config: vLLM refuses this model: no such "
        "architecture; choose another model or another vLLM",
    ]


def test_what_may_start_elsewhere_is_a_warning_that_says_so() -> None:
    errors, (here, absent), _ = lines(
        Refusal(("max_num_seqs",), "no GPU", RefusalScope.HOST),
        Refusal(("max_model_len",), "no file 'x'. Pass more", RefusalScope.ABSENT),
    )
    assert errors == []
    assert "c.yaml:8: " in here and "on this host vLLM refuses 16: no GPU" in here
    assert (
        "c.yaml:7: " in absent
        and "not checked" in absent
        and absent.endswith("no file 'x'; check it where workers run")
    )


def test_what_was_not_checked_is_said_of_its_model() -> None:
    assert lines() == ([], [], [])
    for more in ({"model_is_here": False}, {"devices": Devices.OTHER}):
        errors, (said,), _ = lines(**more)
        assert errors == [] and said.startswith("m: ") and said.endswith("not checked"), said


def test_a_cpu_that_serve_would_use_is_no_cause_for_a_warning() -> None:
    errors, warnings, (note,) = lines(devices=Devices.CPU)
    assert errors == warnings == [] and note.startswith("m: ") and "`serve` here" in note


def test_vllms_words_are_one_short_line() -> None:
    models = "\n\n".join(f"Model{n}ForCausalLM" for n in range(1000))
    (line,), _, _ = lines(Refusal((), f"none of {models}", RefusalScope.EVERYWHERE))
    assert "\n" not in line and "none of Model0ForCausalLM Model1ForCausalLM" in line
    assert len(line) < WORDS_CHARS + 200 and " ...; choose another" in line
