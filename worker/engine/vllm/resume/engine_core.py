"""Shell. Runs in the process of EngineCore. A grammar goes on from the tokens that another worker
has made; in this engine they are a part of the prompt.
"""

from __future__ import annotations

from typing import Any

SEEN_TOKENS = "loraplex_seen_tokens"
"""Key of the number of those tokens, among the extra arguments of the sampling parameters."""


def install() -> None:
    """Runs in every process that vLLM starts (see patches.py). Without it, an answer that must
    follow a JSON schema would begin a second object where it is continued.
    """
    from vllm.v1.structured_output import StructuredOutputManager

    create = StructuredOutputManager._create_grammar
    if getattr(create, "loraplex", False):
        return

    def _create_grammar(self: Any, request: Any) -> Any:
        grammar = create(self, request)
        params = request.sampling_params
        seen = ((params.extra_args if params is not None else None) or {}).get(SEEN_TOKENS)
        if seen and not grammar.accept_tokens(request.request_id, list(seen)):
            raise ValueError("the tokens so far do not follow the grammar")
        return grammar

    _create_grammar.loraplex = True  # type: ignore[attr-defined]
    StructuredOutputManager._create_grammar = _create_grammar
