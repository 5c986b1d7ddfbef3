"""What one key may use, and what it has used."""

from __future__ import annotations

from gateway.accounts.account import ANONYMOUS, Account


def test_globs_say_which_models_and_adapters_an_account_may_use() -> None:
    account = Account(models=("llama*",), adapters=("team-a-*", "llama-8b:shared"))
    assert account.may_use("llama-8b") and not account.may_use("qwen")
    assert account.may_use("llama-8b", "team-a-sql") and not account.may_use("qwen", "team-a-sql")
    assert account.may_use("llama-8b", "shared") and not account.may_use("llama-70b", "shared")
    assert not account.may_use("llama-8b", "team-b-sql")
    assert account.scoped and not ANONYMOUS.scoped


def test_an_account_without_adapters_may_use_the_base_model_alone() -> None:
    account = Account(adapters=())
    assert account.may_use("llama") and not account.may_use("llama", "anything")


def test_by_default_a_client_may_only_lower_itself() -> None:
    assert ANONYMOUS.clamped(-999_999_999) == 0 and ANONYMOUS.clamped(5) == 5
    assert Account(priority=(-10, 10)).clamped(-999) == -10
