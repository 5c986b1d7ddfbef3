"""Limits of requests and tokens: what fits, and when the rest may be tried again."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from gateway.accounts.account import Account, AccountLimits
from gateway.accounts.key_file import MAX_KEYS
from gateway.accounts.limiter import Limiter
from gateway.accounts.shared_limits import MAX_ROWS, ROW, SharedLimits
from gateway.accounts.token_buckets import duration
from shared.adapters.identity import AdapterRef
from shared.errors import ConfigError, RateLimited


class Time:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture(params=["keeps the lock", "takes it each time"])
def limiter(tmp_path: Path, time: Time, request: pytest.FixtureRequest) -> Iterator[Limiter]:
    with closing(SharedLimits(tmp_path / "limits", 0, time)) as table:
        limiter = Limiter(table, time)
        if request.param == "keeps the lock":
            limiter.settle_with_others()
            assert table.alone.kept
        yield limiter


def account(**limits: int) -> Account:
    return Account("a", limits=AccountLimits(**limits))


def ref(name: str) -> AdapterRef:
    return AdapterRef("base", name, "0" * 16)


def told(lines: bytes | None) -> dict[str, str]:
    assert lines is not None
    each = (line.partition(": ") for line in lines.decode().splitlines())
    return {name: value for name, _, value in each}


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


@pytest.mark.parametrize("uptime_s", [0.1, 3e7 + 0.7])
@pytest.mark.parametrize("allowed", [1, 7, 60, 999])
def test_a_full_bucket_lets_in_exactly_its_number_and_counts_down_by_one(
    limiter: Limiter, time: Time, allowed: int, uptime_s: float
) -> None:
    a, time.now = account(requests_per_minute=allowed), uptime_s
    for n in range(allowed):
        left = told(limiter.admit(a, 1))["x-ratelimit-remaining-requests"]
        assert int(left) == allowed - n - 1
    with pytest.raises(RateLimited):
        limiter.admit(a, 1)
    time.now += 30.0
    assert limiter.levels(a)["requests_per_minute"] == pytest.approx(allowed / 2, abs=0.1)
    time.now += 30.0
    assert limiter.levels(a)["requests_per_minute"] == allowed


def test_tokens_are_reserved_and_what_was_not_used_comes_back(limiter: Limiter) -> None:
    a = account(tokens_per_minute=1000)
    assert told(limiter.admit(a, 800)) == {
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "200",
        "x-ratelimit-reset-tokens": "48s",
    }
    with pytest.raises(RateLimited, match="200 are left"):
        limiter.admit(a, 300)
    limiter.settle(a, 800, 100)
    assert told(limiter.admit(a, 300))["x-ratelimit-remaining-tokens"] == "600"


def test_what_was_used_beyond_the_estimate_is_paid_back_before_anything_else(
    limiter: Limiter, time: Time
) -> None:
    a = account(tokens_per_minute=600)
    limiter.admit(a, 100)
    limiter.settle(a, 100, 1200)
    limiter.flush()
    time.now += 59.0
    with pytest.raises(RateLimited):
        limiter.admit(a, 1)
    time.now += 2.0
    limiter.admit(a, 1)


def test_what_one_request_used_too_much_another_one_gives_back(
    limiter: Limiter, time: Time
) -> None:
    a = account(tokens_per_minute=600)
    limiter.admit(a, 10)
    limiter.admit(a, 30)
    time.now += 4.0  # both have flowed in again
    limiter.settle(a, 10, 60)
    limiter.settle(a, 30, 0)
    assert limiter.levels(a)["tokens_per_minute"] == 600 - 50 + 30


def test_a_refusal_costs_nothing(limiter: Limiter) -> None:
    a = account(
        requests_per_minute=2, tokens_per_minute=100, concurrent_requests=1, adapters_per_minute=1
    )
    for _ in range(5):
        limiter.admit(a, 50, ref("x"))
        limiter.settle(a, 50, 0, refused=True)
    for _ in range(5):
        with pytest.raises(RateLimited):
            limiter.admit(a, 101)
        with pytest.raises(RateLimited):
            limiter.admit(a, 1, ref("another"))
    limiter.admit(a, 100, ref("x"))


def test_so_many_requests_at_once(limiter: Limiter) -> None:
    a = account(concurrent_requests=2)
    for _ in range(2):
        limiter.admit(a, 1)
    with pytest.raises(RateLimited, match="open at once"):
        limiter.admit(a, 1)
    limiter.settle(a, 1, 1)
    limiter.admit(a, 1)


def test_so_many_new_adapters_a_minute_and_those_in_use_cost_nothing(
    limiter: Limiter, time: Time
) -> None:
    a = account(adapters_per_minute=2)
    for name in ("x", "y", "x", "y"):
        limiter.admit(a, 1, ref(name))
    limiter.admit(a, 1)
    with pytest.raises(RateLimited, match="2 adapters a minute"):
        limiter.admit(a, 1, ref("z"))
    for _ in range(4):
        time.now += 29.0
        limiter.admit(a, 1, ref("x"))
    limiter.admit(a, 1, ref("z"))


def test_the_table_takes_all_its_disk_space_at_once_or_says_that_it_cannot(tmp_path: Path) -> None:
    """A process that writes to a part of a mapped file that has no place is killed."""
    with closing(SharedLimits(tmp_path / "limits", 0)) as table:
        assert (tmp_path / "limits").stat().st_blocks * 512 >= len(table.map)
    with pytest.raises(ConfigError, match="cannot be made: No such"):
        SharedLimits(tmp_path / "no-folder" / "limits", 0)


def test_limits_hold_over_all_processes_and_open_requests_of_a_killed_one_are_forgotten(
    tmp_path: Path, time: Time
) -> None:
    a = account(requests_per_minute=10, concurrent_requests=6)
    with (
        closing(SharedLimits(tmp_path / "limits", 0, time)) as mine,
        closing(SharedLimits(tmp_path / "limits", 1, time)) as other,
    ):
        for n in range(6):
            Limiter((mine, other)[n % 2], time).admit(a, 1)
        for table in (mine, other):
            with pytest.raises(RateLimited, match="open at once"):
                Limiter(table, time).admit(a, 1)
        with closing(SharedLimits(tmp_path / "limits", 1, time)) as again:
            for _ in range(3):
                Limiter(again, time).admit(a, 1)
            tenth = Limiter(mine, time).admit(account(requests_per_minute=10), 1)
            assert told(tenth)["x-ratelimit-remaining-requests"] == "0"
            with pytest.raises(RateLimited, match="10 requests a minute"):
                Limiter(again, time).admit(account(requests_per_minute=10), 1)


def test_what_a_request_gave_back_is_seen_by_the_next_one_here_and_elsewhere_once_it_is_written(
    tmp_path: Path, time: Time
) -> None:
    a = account(tokens_per_minute=100, concurrent_requests=1)
    with (
        closing(SharedLimits(tmp_path / "limits", 0, time)) as mine,
        closing(SharedLimits(tmp_path / "limits", 1, time)) as other,
    ):
        here, there = Limiter(mine, time), Limiter(other, time)
        for used in (0, 40):
            here.admit(a, 100)
            here.settle(a, 100, used)
        with pytest.raises(RateLimited, match="open at once"):
            there.admit(a, 10)
        here.flush()
        assert told(there.admit(a, 10))["x-ratelimit-remaining-tokens"] == "50"


def test_a_limit_that_is_raised_holds_for_what_was_reserved_under_the_old_one(
    limiter: Limiter,
) -> None:
    lower = account(tokens_per_minute=100)
    limiter.admit(lower, 100)
    raised = account(tokens_per_minute=1000)
    limiter.admit(raised, 0)
    limiter.settle(lower, 100, 0)
    assert told(limiter.admit(raised, 0))["x-ratelimit-remaining-tokens"] == "100"


@pytest.mark.parametrize("later", [{"requests_per_minute": 9}, {"tokens_per_minute": 1000}])
def test_a_limit_that_was_exceeded_and_then_lifted_or_raised_holds_nobody_up(
    limiter: Limiter, time: Time, later: dict[str, int]
) -> None:
    tight = account(tokens_per_minute=10)
    limiter.admit(tight, 10)
    limiter.settle(tight, 10, 10_000)
    limiter.flush()
    with pytest.raises(RateLimited):
        limiter.admit(tight, 1)
    lifted = account(**later)
    limiter.levels(lifted)
    time.now += 1.0
    limiter.admit(lifted, 1)


def test_no_two_accounts_share_their_numbers_though_there_are_as_many_as_may_be(
    tmp_path: Path, time: Time
) -> None:
    with closing(SharedLimits(tmp_path / "limits", 0, time)) as table:
        rows = {table.row(f"key-{n}") for n in range(MAX_KEYS)}
        assert len(rows) == MAX_KEYS
        for n in range(MAX_ROWS - MAX_KEYS + 10):  # keys that came and went
            assert 0 <= table.row(f"old-{n}") < MAX_ROWS * ROW


def test_a_limit_that_was_used_up_before_the_machine_started_again_is_whole(
    tmp_path: Path, time: Time
) -> None:
    a = account(requests_per_minute=1, concurrent_requests=1)
    with closing(SharedLimits(tmp_path / "limits", 3, time)) as table:
        Limiter(table, time).admit(a, 1)
    time.now = 5.0
    with closing(SharedLimits(tmp_path / "limits", 0, time)) as table:
        Limiter(table, time).admit(a, 1)


ASKING = """
import sys
from pathlib import Path
from gateway.accounts.account import Account, AccountLimits
from gateway.accounts.limiter import Limiter
from gateway.accounts import shared_limits
from gateway.accounts.shared_limits import SharedLimits
from shared.errors import RateLimited
shared_limits.LOCK_S = 60.0  # on a machine without a free core a holder may stand still for long
table = SharedLimits(Path(sys.argv[1]), int(sys.argv[2]), lambda: 1000.0)
limiter = Limiter(table, lambda: 1000.0)
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


async def test_a_process_that_keeps_the_lock_shares_the_limits_with_one_that_comes(
    tmp_path: Path,
) -> None:
    a, now = account(requests_per_minute=3000), Time()
    with closing(SharedLimits(tmp_path / "limits", 0, now)) as table:
        limiter, let_in = Limiter(table, now), 0
        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            settling = tasks.create_task(limiter.run())
            await until(lambda: table.alone.kept)
            argv = [sys.executable, "-c", ASKING, str(tmp_path / "limits"), "1"]
            other = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.PIPE)
            theirs = tasks.create_task(other.communicate())
            while not theirs.done() and let_in < 2000:
                limiter.admit(a, 1)
                let_in += 1
                await asyncio.sleep(0)
            let_in += int((await theirs)[0])
            await until(lambda: table.alone.kept)  # it is alone again
            for _ in range(3000 - let_in):
                limiter.admit(a, 1)
            with pytest.raises(RateLimited):
                limiter.admit(a, 1)
            settling.cancel()


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.01)


def test_what_was_let_in_is_not_forgotten_by_a_process_that_is_killed(
    limiter: Limiter, tmp_path: Path, time: Time
) -> None:
    a = account(requests_per_minute=3, concurrent_requests=2)
    limiter.admit(a, 1)
    shutil.copy(tmp_path / "limits", tmp_path / "left")  # nothing is written at its end
    with closing(SharedLimits(tmp_path / "left", 0, time)) as table:
        again = Limiter(table, time)
        told_now = [told(again.admit(a, 1))["x-ratelimit-remaining-requests"] for _ in range(2)]
        assert told_now == ["1", "0"]


def test_times_are_written_as_openai_does() -> None:
    assert [duration(s) for s in (0.0, 0.0121, 1.0, 5.2, 60.0, 90.4)] == [
        b"0ms",
        b"13ms",
        b"1s",
        b"6s",
        b"1m0s",
        b"1m31s",
    ]


def test_what_is_left_of_each_limit_is_told_without_being_used(
    limiter: Limiter, time: Time
) -> None:
    a = account(requests_per_minute=60, concurrent_requests=3)
    assert limiter.levels(account()) == {}
    limiter.admit(a, 10)
    for _ in range(2):
        assert limiter.levels(a) == {"requests_per_minute": 59.0, "concurrent_requests": 2.0}
    limiter.settle(a, 10, 10)
    time.now += 60.0
    assert limiter.levels(a) == {"requests_per_minute": 60.0, "concurrent_requests": 3.0}
    assert told(limiter.admit(a, 10))


def test_a_refusal_names_the_limit_that_was_hit(limiter: Limiter) -> None:
    tight = {
        "requests_per_minute": account(requests_per_minute=1),
        "tokens_per_minute": Account("b", limits=AccountLimits(tokens_per_minute=5)),
        "concurrent_requests": Account("c", limits=AccountLimits(concurrent_requests=1)),
        "adapters_per_minute": Account("d", limits=AccountLimits(adapters_per_minute=0)),
    }
    for name, owner in tight.items():
        with pytest.raises(RateLimited) as refused:
            for _ in range(2):
                limiter.admit(owner, 10, ref("a"))
        assert refused.value.limit == name
