from __future__ import annotations

import logging
import sys
from time import thread_time
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from worker.engine.vllm.grammars import metering
from worker.engine.vllm.grammars.budget import GrammarBudget
from worker.engine.vllm.grammars.metering import TOO_COSTLY, EndedRequests, MeteredGrammar


class SlowGrammar:
    """Each of its steps takes `cpu_s` of CPU time."""

    def __init__(self, cpu_s: float) -> None:
        self._cpu_s = cpu_s
        self.filled = list[int]()

    def _work(self) -> None:
        until = thread_time() + self._cpu_s
        while thread_time() < until:
            pass

    def fill_bitmask(self, bitmask: object, index: int) -> None:
        self._work()
        self.filled.append(index)

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        self._work()
        return tokens != [0]

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        self._work()
        return tokens[:1]

    def is_terminated(self) -> bool:
        return False


def metered(cpu_s: float, token_cpu_s: float) -> tuple[SlowGrammar, MeteredGrammar]:
    grammar = SlowGrammar(cpu_s)
    return grammar, MeteredGrammar(grammar, GrammarBudget(token_cpu_s))


def test_a_metered_grammar_answers_as_its_grammar_does() -> None:
    grammar, meter = metered(0.0, 1.0)
    meter.fill_bitmask(None, 3)
    assert grammar.filled == [3]
    assert meter.accept_tokens("r", [1]) and not meter.accept_tokens("r", [0])
    assert meter.validate_tokens([1, 2]) == [1]
    assert meter.is_terminated() is False
    assert not meter.budget.spent


def test_each_step_of_a_grammar_counts() -> None:
    cpu_s = 0.02
    for step in ("fill_bitmask", "accept_tokens", "validate_tokens"):
        _, meter = metered(cpu_s, cpu_s / 32)  # the reserve is half of the step
        match step:
            case "fill_bitmask":
                meter.fill_bitmask(None, 0)
            case "accept_tokens":
                meter.accept_tokens("r", [1])
            case _:
                meter.validate_tokens([1])
        assert meter.budget.spent, step


def record(request: str, tokens: list[int]) -> logging.LogRecord:
    words = "Unexpected: grammar rejected tokens %s for request %s. Terminating request."
    return logging.LogRecord("vllm", logging.ERROR, "", 0, words, (tokens, request), None)


def test_the_tokens_of_an_ended_request_stay_out_of_the_log_and_others_are_logged() -> None:
    ended = EndedRequests()
    ended.ids.add("r1")
    assert ended.filter(record("r2", [5]))
    assert not ended.filter(record("r1", [5]))
    assert not ended.ids


class OfVllm:
    """Makes and advances grammars as vLLM's StructuredOutputManager does."""

    def _create_grammar(self, request: Any) -> SlowGrammar:
        return SlowGrammar(request.cpu_s)

    def accept_tokens(self, request: Any, tokens: list[int]) -> bool:
        grammar = request.structured_output_request.grammar
        return bool(grammar.accept_tokens(request.request_id, tokens))


def vllm_with(monkeypatch: pytest.MonkeyPatch, manager: type) -> None:
    names = ("vllm", "vllm.v1", "vllm.v1.structured_output")
    modules = [ModuleType(name) for name in names]
    modules[-1].StructuredOutputManager = manager  # type: ignore[attr-defined]
    for name, module in zip(names, modules, strict=True):
        monkeypatch.setitem(sys.modules, name, module)


def asked(manager: Any, cpu_s: float, finished: bool = False) -> SimpleNamespace:
    request = SimpleNamespace(
        request_id="r1", cpu_s=cpu_s, stop_reason=None, is_finished=lambda: finished
    )
    grammar = manager._create_grammar(request)
    request.structured_output_request = SimpleNamespace(grammar=grammar)
    return request


def test_only_a_running_request_whose_grammar_has_spent_its_budget_is_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Manager(OfVllm):
        pass

    vllm_with(monkeypatch, Manager)
    monkeypatch.setenv(metering.TOKEN_CPU_ENV, "0.001")
    metering.install()
    metering.install()
    manager = Manager()
    dear, cheap, over = asked(manager, 0.03), asked(manager, 0.0), asked(manager, 0.03, True)
    assert [manager.accept_tokens(one, [1]) for one in (dear, cheap, over)] == [False, True, True]
    assert [one.stop_reason for one in (dear, cheap, over)] == [TOO_COSTLY, None, None]
    monkeypatch.setenv(metering.TOKEN_CPU_ENV, "0.0")
    assert manager.accept_tokens(asked(manager, 0.03), [1])


def test_a_vllm_that_has_changed_serves_on_and_the_log_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Changed:
        def _create_grammar(self, request: Any) -> SlowGrammar:
            return SlowGrammar(0.0)

    create = Changed._create_grammar
    vllm_with(monkeypatch, Changed)
    metering.install()
    assert Changed._create_grammar is create
    assert "no bound on their cost" in caplog.text
