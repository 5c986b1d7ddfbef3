"""Clients give arguments to a chat template, and none to the tokenizer."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace

from gateway.api.body.bounds import OF_TOKENIZERS

MODEL = Path(__file__).parents[3] / "examples" / "demo" / "model"
OF_THE_REQUEST = {"self", "conversation", "kwargs", "tools", "documents", "chat_template"}
OF_TEMPLATES = {"add_generation_prompt", "continue_final_message"}


def test_all_arguments_of_the_tokenizer_are_known() -> None:
    from transformers import PythonBackend

    taken = set(inspect.signature(PythonBackend.apply_chat_template).parameters)
    assert taken - OF_THE_REQUEST - OF_TEMPLATES <= OF_TOKENIZERS


def test_vllm_would_take_them_from_clients() -> None:
    """If it takes them no more, the gateway need not look."""
    from transformers import AutoTokenizer
    from vllm.renderers.hf import safe_apply_chat_template
    from vllm.renderers.params import ChatParams

    asked = {"tokenize": True, "padding": "max_length", "max_length": 10_000}
    assert asked.keys() <= OF_TOKENIZERS
    params = ChatParams(chat_template_kwargs=asked).with_defaults({"tokenize": False})
    model = SimpleNamespace(
        tokenizer="", model="", tokenizer_revision=None, code_revision=None, trust_remote_code=False
    )
    tokens = safe_apply_chat_template(
        model,
        AutoTokenizer.from_pretrained(MODEL),
        [{"role": "user", "content": "hi"}],
        **params.get_apply_chat_template_kwargs(),
    )
    assert len(tokens) == 10_000
