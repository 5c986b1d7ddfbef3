"""Shell. `python -m bench.chaos.soak` (`make soak`): half an hour in which clients, adapters and
workers come and go, and a look at what grows.

    python -m bench.chaos.soak
    python -m bench.chaos.soak --minutes 2
    python -m bench.chaos.soak --names 0    # each adapter is a new one

`serve`, its gateway and the worker w0 live through it all and are measured; w1 and w2 are killed,
stopped and drained in turn. Clients leave in the middle of answers. Adapters are added, replaced
and removed. Exit status 1 if something grows, an answer failed or was wrong, or something is left.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from bench.chaos.clients import AskedQuestion, Clients, questions
from bench.chaos.fleets import ClusterShape, DisturbedFleet, served
from bench.chaos.judge import Due, Verdict
from bench.chaos.scenarios import STOPPED_S, NotAsPromised, gone, send
from bench.chaos.slopes import MB, RSS, SoakReport, SoakSample, slopes
from bench.gateways.growth import write_adapter
from bench.load.__main__ import raise_open_files_limit
from bench.process import NotStarted
from examples.demo.styles import HELD_OUT

STREAMS, TOKENS = 16, 100
TENANTS = 64
"""Adapters that come and go."""
NAMES = 500
"""So many adapters come and go in turn: each comes back after eight minutes, with the bytes that it
had. So tables by adapter are as full as they get before the warm-up is over.
"""
TENANT_LANES = 6
TENANT_TOKENS = 8
SAMPLE_S = 5.0
SAY_EVERY = 6  # samples
CHANGES_PER_MINUTE = 60.0
"""In the store: each adds an adapter, replaces one and removes one."""
FAULT_S = 10.0
"""Between two workers that are struck."""
LEAVE_S = 0.1
"""Between two clients that leave in the middle."""
QUIET_S = 30.0
WARM_SHARE = 1 / 3
"""Of the time: until then pools, caches and histograms fill up."""
DISK_CACHE_BYTES = 128 << 10
"""More than the adapters that are there at one time, and full after a few minutes."""
SETTINGS = {
    "adapter_settle_s": 1.0,
    "catalog_refresh_s": 5.0,
    "disk_cache_bytes": DISK_CACHE_BYTES,
}


LABEL = re.compile(rb"digest=[0-9a-f-]+")


class TenantClients(Clients):
    """Clients of adapters whose weights change: an answer of any version of them will do."""

    def clean(self, raw: bytes) -> bytes:
        return LABEL.sub(b"digest=any", raw)

    def due(self, question: AskedQuestion) -> Due:
        base, _, adapter = question.model.partition(":")
        words = "".join(f" w{number}" for number in range(TENANT_TOKENS - 1))
        text = f"[base={base} adapter={adapter} digest=any]{words}"
        return Due(text, TENANT_TOKENS)


class TenantStore:
    """The adapters that come and go, oldest first. Those in the middle are asked for: they are
    known everywhere by now, and stay long enough for an answer. `names` 0: none comes back.
    """

    def __init__(self, folder: Path, rng: Random, names: int) -> None:
        self._folder, self._rng = folder, rng
        self._numbers: Iterator[int] = itertools.count()
        if names:
            self._numbers = itertools.cycle(range(max(names, 2 * TENANTS)))
        self._names: deque[str] = deque()
        for _ in range(TENANTS):
            self._add()

    def change(self) -> None:
        """One goes, one comes, and one of the young ones gets other weights."""
        shutil.rmtree(self._folder / self._names.popleft())
        self._add()
        self._write(self._names[-self._rng.randrange(1, TENANTS // 4)], version=2)

    def some(self) -> str:
        return self._names[self._rng.randrange(TENANTS // 4, TENANTS // 2)]

    def _add(self) -> None:
        name = f"tenant-{next(self._numbers):06d}"
        self._write(name, version=1)
        self._names.append(name)

    def _write(self, name: str, version: int) -> None:
        """As an uploader does it: aside, then renamed. The same name and version are the same bytes
        and times.
        """
        aside, place = self._folder / f".{name}", self._folder / name
        which = 2 * int(name.rpartition("-")[2]) + version
        write_adapter(aside, float(which))
        for path in aside.iterdir():
            os.utime(path, (which, which))
        if place.exists():
            shutil.rmtree(place)
        aside.rename(place)


@dataclass
class Soak:
    """One run on a cluster that serves. `left`: clients that left in the middle."""

    fleet: DisturbedFleet
    clients: Clients
    tenants: Clients
    store: TenantStore
    rng: Random
    seconds: float
    changes_per_minute: float
    left: int = 0
    faults: int = 0
    changes: int = 0

    async def run(self) -> list[SoakSample]:
        """Raises NotAsPromised if the cluster does not recover."""
        self.clients.start(STREAMS)
        churn = [self._change_for_ever(), self._strike_for_ever(), self._leave_for_ever()]
        churn += [self._tenant_for_ever() for _ in range(TENANT_LANES)]
        tasks = [asyncio.create_task(work) for work in churn]
        try:
            samples = await self._sample(tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await self.clients.finish()
        return samples

    async def _sample(self, tasks: Sequence[asyncio.Task[None]]) -> list[SoakSample]:
        watched = {
            "serve": self.fleet.processes[0].pid,
            "gateway g0": self.fleet.gateways()[0],
            "worker w0": self.fleet.worker("w0"),
        }
        began, samples = time.monotonic(), list[SoakSample]()
        while (at_s := time.monotonic() - began) < self.seconds:
            for task in tasks:
                if task.done():
                    task.result()
            values = {
                (name, what): value
                for name, pid in watched.items()
                for what, value in look_at(pid).items()
            }
            with contextlib.suppress(OSError, TimeoutError, ValueError):
                tasks_now = await self.fleet.metric("loraplex_gateway_tasks")
                values["gateway g0", "tasks"] = tasks_now
            values["disk cache", "files"] = self._cached_files()
            samples.append(SoakSample(at_s, values))
            if len(samples) % SAY_EVERY == 1:
                self._say(samples[-1])
            await asyncio.sleep(SAMPLE_S)
        return samples

    def _cached_files(self) -> float:
        return float(sum(len(files) for _, _, files in os.walk(self.fleet.folder / "state")))

    def _say(self, sample: SoakSample) -> None:
        rss = ", ".join(
            f"{name} {value:.1f} MB"
            for (name, what), value in sample.values.items()
            if "MB" in what
        )
        tally = self.clients.tally
        print(
            f"{sample.at_s:5.0f} s: {rss}; {tally.answers + self.tenants.tally.answers} answers, "
            f"{tally.verdicts[Verdict.FAILED]} failed, {tally.verdicts[Verdict.WRONG]} wrong, "
            f"{tally.moved} moved; {self.left} clients left, {self.changes} adapters came, "
            f"{self.faults} faults, load {os.getloadavg()[0]:.0f}",
            flush=True,
        )

    # ---- what comes and goes ---------------------------------------------------------------------

    async def _change_for_ever(self) -> None:
        while self.changes_per_minute:
            await asyncio.sleep(60 / self.changes_per_minute)
            self.store.change()
            self.changes += 1

    async def _strike_for_ever(self) -> None:
        for turn in itertools.count():
            await asyncio.sleep(FAULT_S)
            await self.fleet.until_serving(self.fleet.shape.workers)
            await self._strike(f"w{1 + turn % 2}", turn // 2 % 3)
            self.faults += 1

    async def _strike(self, name: str, kind: int) -> None:
        pid = self.fleet.worker(name)
        if kind == 0:
            send(pid, signal.SIGKILL)
        elif kind == 1:
            send(pid, signal.SIGSTOP)
            await asyncio.sleep(STOPPED_S)
            send(pid, signal.SIGCONT)
            return
        else:
            path = f"{self.fleet.url}/admin/workers/{name}/drain"
            async with self.fleet.http.post(path, json={}) as answer:
                await answer.read()
        await gone(pid)

    async def _tenant_for_ever(self) -> None:
        while True:
            model = f"{self.fleet.shape.base}:{self.store.some()}"
            await self.tenants.ask_once(AskedQuestion(model, HELD_OUT[0]))

    async def _leave_for_ever(self) -> None:
        """Half of them close in good order, the others just go."""
        while True:
            await asyncio.sleep(LEAVE_S)
            question = self.rng.choice(self.clients.questions)
            await self.clients.leave(question, self.rng.random(), abort=self.rng.random() < 0.5)
            self.left += 1


def look_at(pid: int) -> dict[str, float]:
    """Numbers of a process, from /proc. Raises NotAsPromised if it has ended."""
    place = Path(f"/proc/{pid}")
    try:
        fields = place.joinpath("stat").read_text().rpartition(")")[2].split()
        targets = []
        for fd in os.listdir(place / "fd"):
            with contextlib.suppress(FileNotFoundError):
                targets.append(os.readlink(place / "fd" / fd))
    except FileNotFoundError as exc:
        raise NotAsPromised(f"process {pid} has ended, which nobody told it to") from exc
    sockets = sum(target.startswith("socket:") for target in targets)
    return {
        RSS: int(fields[21]) * os.sysconf("SC_PAGE_SIZE") / MB,
        "files": float(len(targets) - sockets),
        "sockets": float(sockets),
        "threads": float(fields[17]),
    }


async def soak(
    seconds: float,
    seed: int,
    changes_per_minute: float = CHANGES_PER_MINUTE,
    names: int = NAMES,
) -> SoakReport:
    """Raises NotStarted."""
    rng, shape = Random(seed), ClusterShape("sim", workers=3)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        async with served(shape, Path(folder), SETTINGS) as fleet:
            asked = questions(shape.models, HELD_OUT[:1])
            store = TenantStore(fleet.folder / "adapters", rng, names)
            async with (
                Clients(fleet.url, asked, TOKENS, rng) as clients,
                TenantClients(fleet.url, [], TENANT_TOKENS, rng) as tenants,
            ):
                await clients.learn()
                run = Soak(fleet, clients, tenants, store, rng, seconds, changes_per_minute)
                samples, left = list[SoakSample](), ""
                try:
                    samples = await run.run()
                    left = await fleet.until_quiet(QUIET_S)
                except (NotAsPromised, NotStarted) as exc:
                    left = str(exc)
                failures = [*clients.tally.examples, *tenants.tally.examples]
                return SoakReport(
                    seconds=seconds,
                    answers=clients.tally.answers + tenants.tally.answers,
                    left=run.left,
                    changes=run.changes,
                    faults=run.faults,
                    failures=failures + ([left] if left else []),
                    slopes=slopes(samples, seconds * WARM_SHARE),
                )


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 if something does not hold, 2 if the cluster did not start."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.chaos.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--changes", type=float, default=CHANGES_PER_MINUTE, help="in the store, per minute"
    )
    parser.add_argument("--names", type=int, default=NAMES, help="0: no adapter comes back")
    flags = parser.parse_args(arguments)
    raise_open_files_limit()
    try:
        report = asyncio.run(soak(flags.minutes * 60, flags.seed, flags.changes, flags.names))
    except NotStarted as exc:
        print(f"bench.chaos.soak: {exc}", file=sys.stderr)
        return 2
    print(f"\n{report.text()}")
    return 0 if report.holds else 1


if __name__ == "__main__":
    sys.exit(main())
