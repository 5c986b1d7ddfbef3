from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from gateway.accounts.account import Account, AccountLimits
from gateway.accounts.buckets import duration
from gateway.accounts.limiter import Limiter
from gateway.accounts.shared_table import SharedTable
from shared.errors import RateLimited


class Time:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def limiter(tmp_path: Path, time: Time) -> Iterator[Limiter]:
    with closing(SharedTable(tmp_path / "limits", 0)) as table:
        yield Limiter(table, time)


def account(**limits: int) -> Account:
    return Account("a", limits=AccountLimits(**limits))


def test_so_many_requests_a_minute_and_then_as_the_bucket_fills(
    limiter: Limiter, time: Time
) -> None:
    a = account(requests_per_minute=60)
    for _ in range(60):
        limiter.admit(a, 10)
    with pytest.raises(RateLimited) as refused:
        limiter.admit(a, 10)
    assert refused.value.retry_after_s == pytest.approx(1.0)
    assert refused.value.headers["x-ratelimit-remaining-requests"] == "0"
    time.now += 1.0
    limiter.admit(a, 10)
    with pytest.raises(RateLimited):
        limiter.admit(a, 10)


def test_tokens_are_reserved_and_what_was_not_used_comes_back(limiter: Limiter) -> None:
    a = account(tokens_per_minute=1000)
    first = limiter.admit(a, 800)
    assert dict(first.headers) == {
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "200",
        "x-ratelimit-reset-tokens": "48s",
    }
    with pytest.raises(RateLimited, match="200 are left"):
        limiter.admit(a, 300)
    limiter.settle(first, 100)
    assert dict(limiter.admit(a, 300).headers)["x-ratelimit-remaining-tokens"] == "600"


def test_what_was_used_beyond_the_estimate_is_paid_back_before_anything_else(
    limiter: Limiter, time: Time
) -> None:
    a = account(tokens_per_minute=600)
    limiter.settle(limiter.admit(a, 100), 1200)
    time.now += 59.0
    with pytest.raises(RateLimited):
        limiter.admit(a, 1)
    time.now += 2.0
    limiter.admit(a, 1)


def test_a_refusal_costs_nothing(limiter: Limiter) -> None:
    a = account(
        requests_per_minute=2, tokens_per_minute=100, concurrent_requests=1, adapters_per_minute=1
    )
    for _ in range(5):
        limiter.settle(limiter.admit(a, 50, "x"), 0, refused=True)
    for _ in range(5):
        with pytest.raises(RateLimited):
            limiter.admit(a, 101)
        with pytest.raises(RateLimited):
            limiter.admit(a, 1, "another")
    limiter.admit(a, 100, "x")


def test_so_many_requests_at_once(limiter: Limiter) -> None:
    a = account(concurrent_requests=2)
    first, _ = limiter.admit(a, 1), limiter.admit(a, 1)
    with pytest.raises(RateLimited, match="open at once"):
        limiter.admit(a, 1)
    limiter.settle(first, 1)
    limiter.admit(a, 1)


def test_so_many_new_adapters_a_minute_and_those_in_use_cost_nothing(
    limiter: Limiter, time: Time
) -> None:
    a = account(adapters_per_minute=2)
    for name in ("x", "y", "x", "y", ""):
        limiter.admit(a, 1, name)
    with pytest.raises(RateLimited, match="2 adapters a minute"):
        limiter.admit(a, 1, "z")
    for _ in range(4):
        time.now += 29.0
        limiter.admit(a, 1, "x")
    limiter.admit(a, 1, "z")


def test_limits_hold_over_all_processes_and_open_requests_of_a_killed_one_are_forgotten(
    tmp_path: Path, time: Time
) -> None:
    a = account(requests_per_minute=10, concurrent_requests=6)
    with (
        closing(SharedTable(tmp_path / "limits", 0)) as mine,
        closing(SharedTable(tmp_path / "limits", 1)) as other,
    ):
        for n in range(6):
            Limiter((mine, other)[n % 2], time).admit(a, 1)
        for table in (mine, other):
            with pytest.raises(RateLimited, match="open at once"):
                Limiter(table, time).admit(a, 1)
        with closing(SharedTable(tmp_path / "limits", 1)) as again:
            for _ in range(3):
                Limiter(again, time).admit(a, 1)
            assert "10" in Limiter(mine, time).admit(account(requests_per_minute=10), 1).headers[0]
            with pytest.raises(RateLimited, match="10 requests a minute"):
                Limiter(again, time).admit(account(requests_per_minute=10), 1)


ASKING = """
import sys
from pathlib import Path
from gateway.accounts.account import Account, AccountLimits
from gateway.accounts.limiter import Limiter
from gateway.accounts.shared_table import SharedTable
from shared.errors import RateLimited
limiter = Limiter(SharedTable(Path(sys.argv[1]), int(sys.argv[2])), lambda: 1000.0)
account, let_in = Account("a", limits=AccountLimits(requests_per_minute=3000)), 0
for _ in range(2000):
    try:
        limiter.admit(account, 1)
        let_in += 1
    except RateLimited:
        pass
print(let_in)
"""


def test_processes_that_ask_at_the_same_time_get_no_more_than_the_limit(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", ASKING, str(tmp_path / "limits")]
    running = [
        subprocess.Popen([*argv, str(n)], stdout=subprocess.PIPE, text=True) for n in range(3)
    ]
    let_in = [int(process.communicate(timeout=60)[0]) for process in running]
    assert sum(let_in) == 3000


def test_times_are_written_as_openai_does() -> None:
    assert [duration(s) for s in (0.0, 0.0121, 1.0, 5.2, 60.0, 90.4)] == [
        "0ms",
        "13ms",
        "1s",
        "6s",
        "1m0s",
        "1m31s",
    ]
