from __future__ import annotations

import itertools

from worker.engine.vllm.grammars.budget import RESERVE_TOKENS, GrammarBudget

TOKEN_S = 0.01


def tokens_until_spent(costs: list[float], most: int = 10_000) -> int | None:
    """`costs` are those of one token after the other, again and again. Each is that of its bitmask;
    to take the token costs nothing.
    """
    budget = GrammarBudget(TOKEN_S)
    for count, cost in enumerate(itertools.islice(itertools.cycle(costs), most), start=1):
        budget.spend(cost, 1)
        budget.spend(0.0, 1)
        if budget.spent:
            return count
    return None


def test_a_grammar_that_takes_its_time_for_every_token_goes_on_for_ever() -> None:
    assert tokens_until_spent([TOKEN_S * 0.999]) is None


def test_one_that_takes_twice_its_time_is_spent_after_the_reserve() -> None:
    assert tokens_until_spent([2.001 * TOKEN_S]) == RESERVE_TOKENS


def test_a_first_token_that_fills_caches_spends_nothing() -> None:
    assert tokens_until_spent([TOKEN_S * RESERVE_TOKENS, *[TOKEN_S * 0.9] * 9_999]) is None


def test_one_token_in_twenty_may_cost_ten_times_as_much_as_the_mean() -> None:
    assert tokens_until_spent([TOKEN_S * 10, *[TOKEN_S / 10] * 19]) is None


def test_time_that_was_not_used_is_not_saved_up() -> None:
    cheap, dear = [0.0] * 1000, [3.001 * TOKEN_S] * 100
    assert tokens_until_spent(cheap + dear) == 1000 + RESERVE_TOKENS // 2


def test_tokens_that_another_worker_has_made_may_take_as_long_as_one_by_one() -> None:
    budget = GrammarBudget(TOKEN_S)
    budget.spend(0.4 * TOKEN_S * 3000, 3000)
    assert not budget.spent
    budget.spend(0.6 * TOKEN_S * 3000, 3000)
    assert budget.spent
