"""The ledger: what each account has used, by time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gateway.accounts.ledger import Ledger


def around() -> tuple[float, float]:
    """From well before this test to well after it, in seconds since 1970."""
    return time.time() - 300, time.time() + 300


async def test_what_was_used_is_summed_by_key_base_and_adapter(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.note(("a", "llama", "x"), 10, 100)
    ledger.note(("a", "llama", ""), 1, 2)
    await ledger.flush()
    ledger.note(("a", "llama", "x"), 10, 100)
    ledger.note(("b", "llama", "x"), 5, 7)
    found = await ledger.query(*around(), ["key"])
    assert found == [
        {"key": "a", "requests": 3, "prompt_tokens": 21, "output_tokens": 202},
        {"key": "b", "requests": 1, "prompt_tokens": 5, "output_tokens": 7},
    ]
    by_day = await ledger.query(*around(), ["base", "adapter", "day"])
    assert [(row["adapter"], row["output_tokens"]) for row in by_day] == [("x", 207), ("", 2)]
    assert int(by_day[0]["day"]) % 86_400 == 0 and time.time() - int(by_day[0]["day"]) < 86_400 + 60
    assert (await ledger.query(*around(), []))[0]["requests"] == 4
    assert await ledger.query(time.time() + 60, time.time() + 120, ["key"]) == []
    assert await ledger.query(time.time() + 60, time.time() + 120, []) == []
    await ledger.close()


async def test_two_processes_write_to_the_same_files_and_either_tells_of_both(
    tmp_path: Path,
) -> None:
    one, two = Ledger(tmp_path), Ledger(tmp_path)
    one.note(("a", "llama", ""), 1, 1)
    two.note(("a", "llama", ""), 1, 1)
    await asyncio.gather(one.flush(), two.flush())
    assert (await two.query(*around(), ["key"]))[0]["requests"] == 2
    await one.close()
    await two.close()


async def test_whoever_comes_first_in_a_month_none_of_many_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The file is made by all of them at once, while others ask for what it has."""
    for round_ in range(20):
        folder = tmp_path / str(round_)
        folder.mkdir()
        ledgers = [Ledger(folder) for _ in range(6)]
        for ledger in ledgers[:4]:
            ledger.note(("a", "llama", ""), 1, 1)
        await asyncio.gather(*(ledger.query(*around(), ["key"]) for ledger in ledgers))
        assert (await ledgers[0].query(*around(), ["key"]))[0]["requests"] == 4
        assert {path.name[:6] for path in folder.iterdir()} == {"usage-"}
        for ledger in ledgers:
            await ledger.close()
    # another test's thread may still say that its collector of traces is gone
    assert not [r for r in caplog.records if r.name == "loraplex.usage"]


KILLED = """
import asyncio, sys
from pathlib import Path
from gateway.accounts.ledger import Ledger

async def main():
    ledger = Ledger(Path(sys.argv[1]))
    ledger.note(("a", "llama", ""), 1, 1)
    await ledger.flush()
    print("written", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_what_was_flushed_outlives_kill_9(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", KILLED, str(tmp_path), stdout=subprocess.PIPE
    )
    async with asyncio.timeout(30):
        assert process.stdout is not None and await process.stdout.readline() == b"written\n"
        process.kill()
        await process.wait()
    ledger = Ledger(tmp_path)
    assert (await ledger.query(*around(), ["key"]))[0]["requests"] == 1
    await ledger.close()


async def test_what_cannot_be_written_is_kept_until_it_can(tmp_path: Path) -> None:
    folder = tmp_path / "usage"
    folder.write_text("in the way")
    ledger = Ledger(folder)
    ledger.note(("a", "llama", ""), 1, 1)
    await ledger.flush()
    ledger.note(("a", "llama", ""), 1, 1)
    await ledger.flush()
    folder.unlink()
    assert (await ledger.query(*around(), ["key"]))[0]["requests"] == 2
    await ledger.close()


async def test_a_query_of_a_busy_day_does_not_keep_what_is_used_meanwhile_from_the_disk(
    tmp_path: Path,
) -> None:
    ledger = Ledger(tmp_path)
    ledger.note(("a", "llama", "x"), 10, 100)
    await ledger.flush()
    file = tmp_path / f"usage-{time.strftime('%Y-%m', time.gmtime())}.sqlite"
    with contextlib.closing(sqlite3.connect(file)) as connection, connection:
        connection.execute(
            "INSERT INTO usage WITH RECURSIVE n(i) AS "
            "(SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 300000) "
            "SELECT ?, 'k' || i % 20, 'llama', 'a' || i % 499, 1, 1, 1 FROM n",
            (time.time(),),
        )
    query = asyncio.create_task(ledger.query(*around(), ["key", "adapter"]))
    await asyncio.sleep(0)  # it is on its way
    ledger.note(("b", "llama", "x"), 1, 1)
    await ledger.flush()
    assert not query.done(), "the query, of a quarter of a second, was over before the flush"
    assert sum(int(row["requests"]) for row in await query) >= 300_001
    await ledger.close()


async def test_months_beyond_those_that_are_kept_are_removed(tmp_path: Path) -> None:
    for month in ("2020-01", "2020-02", "2020-03"):
        sqlite3.connect(tmp_path / f"usage-{month}.sqlite").close()
    ledger = Ledger(tmp_path, months=2)
    ledger.note(("a", "llama", ""), 1, 1)
    await ledger.flush()
    names = sorted(name for name in os.listdir(tmp_path) if name.endswith(".sqlite"))
    assert len(names) == 2 and names[0] == "usage-2020-03.sqlite"
    await ledger.close()


async def test_usage_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "usage")
    ledger.note(("a", "llama", ""), 1, 1)
    await ledger.flush()
    assert (tmp_path / "usage").stat().st_mode & 0o077 == 0
    assert all(p.stat().st_mode & 0o077 == 0 for p in (tmp_path / "usage").iterdir())
    await ledger.close()
