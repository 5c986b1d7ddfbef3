"""The texts of single tokens, which log probabilities repeat."""

from __future__ import annotations

import pytest

from worker.engine.vllm import logprobs


class Tokenizer:
    """One without a hash, as a tokenizer may be."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, sign: str) -> None:
        self.sign = sign
        self.asked: list[int] = []


def decode(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    tokenizer.asked += tokens
    return [f"{tokenizer.sign}{token}" for token in tokens]


def test_each_token_is_decoded_once_and_its_text_is_that_of_its_own_tokenizer() -> None:
    texts = logprobs.token_texts(decode)
    one, other = Tokenizer("a"), Tokenizer("b")
    assert texts(one, [7, 8, 7]) == ["a7", "a8", "a7"]
    assert texts(other, [8]) == ["b8"]
    assert texts(one, [8, 9]) == ["a8", "a9"]
    assert texts(one, []) == []
    assert one.asked == [7, 8, 9] and other.asked == [8]


def test_no_more_texts_are_kept_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "KEPT_TOKENS", 2)
    texts, tokenizer = logprobs.token_texts(decode), Tokenizer("a")
    for token in (1, 2, 3, 1):
        texts(tokenizer, [token])
    assert tokenizer.asked == [1, 2, 3, 1]
