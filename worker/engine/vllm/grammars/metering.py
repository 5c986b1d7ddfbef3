"""Shell. Runs in the process of EngineCore. It measures what the grammar of each request costs, and
ends the request whose grammar costs too much. All other streams of the engine would wait for it.

The CPU time of the thread counts, not the time that passes. So nothing is ended because a machine
is busy, or because a thread waits for another.
"""

from __future__ import annotations

import logging
import os
from time import thread_time
from typing import Any

from worker.engine.vllm.grammars.budget import GrammarBudget

log = logging.getLogger("loraplex.vllm")

TOKEN_CPU_ENV = "LORAPLEX_GRAMMAR_CPU_S"
"""Set by a worker for its EngineCore: seconds of CPU time for each token. 0: nothing is measured.
"""
TOO_COSTLY = "loraplex_grammar_too_costly"
"""The `stop_reason` of a request that was ended. Its front end makes words of it (see errors.py).
"""


class MeteredGrammar:
    """A grammar of any of vLLM's backends, with its budget."""

    __slots__ = ("_grammar", "budget")

    def __init__(self, grammar: Any, budget: GrammarBudget) -> None:
        self._grammar, self.budget = grammar, budget

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grammar, name)

    def is_terminated(self) -> bool:  # asked for each token, and __getattr__ is slow
        terminated: bool = self._grammar.is_terminated()
        return terminated

    def fill_bitmask(self, bitmask: Any, index: int) -> None:
        began = thread_time()
        self._grammar.fill_bitmask(bitmask, index)
        self.budget.spend(thread_time() - began, 1)

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        began = thread_time()
        accepted: bool = self._grammar.accept_tokens(request_id, tokens)
        self.budget.spend(thread_time() - began, len(tokens))
        return accepted

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        began = thread_time()
        valid: list[int] = self._grammar.validate_tokens(tokens)
        self.budget.spend(thread_time() - began, len(tokens))
        return valid


def install() -> None:
    """Runs in every process that vLLM starts, before anything else that replaces how a grammar is
    made. A vLLM that has changed here serves on, without the bound.
    """
    try:
        from vllm.v1.structured_output import StructuredOutputManager as Grammars

        create, accept = Grammars._create_grammar, Grammars.accept_tokens
    except (ImportError, AttributeError) as exc:
        log.warning("this vLLM's grammars have no bound on their cost", extra={"error": str(exc)})
        return
    if getattr(accept, "loraplex", False):
        return
    ended = EndedRequests()

    def _create_grammar(self: Any, request: Any) -> Any:
        grammar, token_cpu_s = create(self, request), float(os.environ.get(TOKEN_CPU_ENV) or 0)
        return MeteredGrammar(grammar, GrammarBudget(token_cpu_s)) if token_cpu_s else grammar

    def accept_tokens(self: Any, request: Any, *more: Any, **named: Any) -> bool:
        accepted: bool = accept(self, request, *more, **named)
        asked = request.structured_output_request
        grammar = None if asked is None else asked.grammar
        if not isinstance(grammar, MeteredGrammar) or not grammar.budget.spent:
            return accepted
        if request.is_finished():  # this was its last token
            return accepted
        log.warning("a grammar costs too much", extra={"request": request.request_id})
        ended.ids.add(request.request_id)
        request.stop_reason = TOO_COSTLY
        return False  # vLLM ends a request whose token does not follow its grammar

    accept_tokens.loraplex = True  # type: ignore[attr-defined]
    Grammars._create_grammar, Grammars.accept_tokens = _create_grammar, accept_tokens
    logging.getLogger("vllm.v1.core.sched.scheduler").addFilter(ended)


class EndedRequests(logging.Filter):
    """Keeps out of the log what vLLM says of a request that was ended here: that it did not expect
    it, and the tokens of the answer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ids = set[str]()

    def filter(self, record: logging.LogRecord) -> bool:
        named = self.ids.intersection(map(str, record.args or ()))
        self.ids -= named
        return not named
