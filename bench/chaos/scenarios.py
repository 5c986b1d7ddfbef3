"""Shell. What is done to a cluster: each strike is one fault, from its begin to its end. The runner
repeats it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TypeAlias

import aiohttp

from bench.chaos.fleets import LOOK_S, DisturbedFleet
from bench.chaos.link_proxy import CONTROL, DATA, DOWN, UP
from bench.process import NotStarted
from shared.runtime.descendants import on_exit
from worker.engine.sim.engine import FREEZE

STOPPED_S = 2.0
"""More than twice the lease: the streams of a process that stands still so long have moved."""
STALLED_S = 2.0
BOOTING_S = 0.6
"""A simulated worker boots for about as long."""
MOST_BITS_OF_CUT = 14
"""A connection is cut after up to 16 KiB more: within a length, a head, a frame or between two."""
GONE_S = 90.0
"""For what was struck to be noticed, ended and replaced."""
ROLLOUT_S = 300.0
DRAINING_S = 0.5
RELOADS = "loraplex_config_reloads_total"

Strike: TypeAlias = Callable[[DisturbedFleet, Random], Awaitable[None]]


class NotAsPromised(Exception):
    """The cluster did not recover as it should. The message says what is wrong."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """`every_s`: from the begin of one strike to that of the next, if `spare` workers besides the
    struck one serve by then. `repeats`: clients whose answer is cut off ask again for it.
    """

    name: str
    says: str
    strike: Strike
    every_s: float = 3.0
    spare: int = 1
    linked: bool = False
    gateways: int = 1
    repeats: bool = False
    engines: tuple[str, ...] = ("sim", "vllm")


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


async def gone(pid: int) -> None:
    """Raises NotAsPromised if the process lives on."""
    ended = asyncio.Event()
    forget = on_exit(pid, ended.set)
    try:
        async with asyncio.timeout(GONE_S):
            await ended.wait()
    except TimeoutError as exc:
        raise NotAsPromised(f"process {pid} still lives after {GONE_S:g} s") from exc
    finally:
        forget()


async def until(condition: Callable[[], object], what: str) -> None:
    """Raises NotAsPromised if it takes too long."""
    for _ in range(int(GONE_S / LOOK_S)):
        if condition():
            return
        await asyncio.sleep(LOOK_S)
    raise NotAsPromised(f"{what}: not within {GONE_S:g} s")


# ---- workers -------------------------------------------------------------------------------------


async def kill_worker(fleet: DisturbedFleet, rng: Random) -> None:
    pid = rng.choice(fleet.workers())
    send(pid, signal.SIGKILL)
    await gone(pid)


async def kill_two(fleet: DisturbedFleet, rng: Random) -> None:
    """One right after the other: what moved away from the first is struck again."""
    first, second = rng.sample(fleet.workers(), 2)
    send(first, signal.SIGKILL)
    await gone(first)
    send(second, signal.SIGKILL)
    await gone(second)


async def kill_all(fleet: DisturbedFleet, rng: Random) -> None:
    pids = fleet.workers()
    for pid in pids:
        send(pid, signal.SIGKILL)
    for pid in pids:
        await gone(pid)


async def kill_booting(fleet: DisturbedFleet, rng: Random) -> None:
    """A worker, and the one that comes in its place before that serves."""
    name = rng.choice(fleet.names())
    pid = fleet.worker(name)
    send(pid, signal.SIGKILL)
    await gone(pid)
    await until(lambda: fleet.has_worker(name), f"another {name} is started")
    await asyncio.sleep(rng.uniform(0.0, BOOTING_S))
    pid = fleet.worker(name)
    send(pid, signal.SIGKILL)
    await gone(pid)


async def stop_worker(fleet: DisturbedFleet, rng: Random) -> None:
    """Two of three workers go on after a while. The third one stands still until it is replaced."""
    pid = rng.choice(fleet.workers())
    send(pid, signal.SIGSTOP)
    if rng.random() < 1 / 3:
        await gone(pid)
    else:
        await asyncio.sleep(STOPPED_S)
        send(pid, signal.SIGCONT)


# ---- engines -------------------------------------------------------------------------------------


async def freeze_engine(fleet: DisturbedFleet, rng: Random) -> None:
    """The simulated engine hangs, and its worker does not, until it is replaced."""
    pid = rng.choice(fleet.workers())
    send(pid, FREEZE)
    await gone(pid)


async def kill_engine(fleet: DisturbedFleet, rng: Random) -> None:
    worker, core = _some_engine(fleet, rng)
    send(core, signal.SIGKILL)
    await gone(worker)


async def stop_engine(fleet: DisturbedFleet, rng: Random) -> None:
    worker, core = _some_engine(fleet, rng)
    send(core, signal.SIGSTOP)
    await gone(worker)
    await gone(core)


def _some_engine(fleet: DisturbedFleet, rng: Random) -> tuple[int, int]:
    """A worker and its EngineCore."""
    found = [(w, core) for w in fleet.workers() if (core := fleet.engine_core(w)) is not None]
    if not found:
        raise NotAsPromised("no worker has an EngineCore")
    return rng.choice(found)


# ---- connections ---------------------------------------------------------------------------------


def reset(*kinds: str) -> Strike:
    async def strike(fleet: DisturbedFleet, rng: Random) -> None:
        for proxy in fleet.proxies.values():
            proxy.reset(*kinds)

    return strike


async def cut(fleet: DisturbedFleet, rng: Random) -> None:
    """Every connection, at a byte of its own."""
    for proxy in fleet.proxies.values():
        for kind in (DATA, CONTROL):
            left = int(2.0 ** rng.uniform(0, MOST_BITS_OF_CUT))
            proxy.cut_after_bytes[kind, rng.choice((UP, DOWN))] = left


WAYS = [
    (kinds, ways)
    for kinds, ways in itertools.product(
        ((DATA,), (CONTROL,), (DATA, CONTROL)), ((UP,), (DOWN,), (UP, DOWN))
    )
]


async def stall(fleet: DisturbedFleet, rng: Random) -> None:
    kinds, ways = rng.choice(WAYS)
    proxy = fleet.proxies[rng.choice(fleet.names())]
    proxy.stall(kinds, ways)
    await asyncio.sleep(STALLED_S)
    proxy.flow()


# ---- operators -----------------------------------------------------------------------------------


async def drain_worker(fleet: DisturbedFleet, rng: Random) -> None:
    before = set(fleet.workers())
    path = f"/admin/workers/{rng.choice(fleet.names())}/drain"
    timeout = aiohttp.ClientTimeout(total=GONE_S)
    async with fleet.http.post(fleet.url + path, json={}, timeout=timeout) as answer:
        if answer.status != 200:
            raise NotAsPromised(f"{path}: {answer.status} {await answer.text()}")
    await until(lambda: before - set(fleet.workers()), f"{path}: a worker ends")


async def roll_out(fleet: DisturbedFleet, rng: Random) -> None:
    """`loraplex rollout`, as an operator types it."""
    before = set(fleet.workers())
    command = Path(sys.executable).parent / "loraplex"
    process = await asyncio.create_subprocess_exec(
        *(str(command), "rollout", "--url", fleet.url),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(ROLLOUT_S):
            said, _ = await process.communicate()
    except TimeoutError as exc:
        process.kill()
        raise NotAsPromised(f"`loraplex rollout` took more than {ROLLOUT_S:g} s") from exc
    if process.returncode:
        raise NotAsPromised(f"`loraplex rollout` failed: {said.decode(errors='replace')[-600:]}")
    if left := before & set(fleet.workers()):
        raise NotAsPromised(f"`loraplex rollout` left workers as they were: {left}")


async def kill_while_draining(fleet: DisturbedFleet, rng: Random) -> None:
    """A worker is told to drain. Then it is killed, and one that takes what it has, too."""
    draining = asyncio.create_task(
        _asked(fleet, f"/admin/workers/{rng.choice(fleet.names())}/drain")
    )
    await asyncio.sleep(rng.uniform(0.0, DRAINING_S))
    for pid in rng.sample(fleet.workers(), 2):
        send(pid, signal.SIGKILL)
        await gone(pid)
    await draining  # its answer does not matter: the worker may have been gone


async def kill_while_rolling_out(fleet: DisturbedFleet, rng: Random) -> None:
    """One worker after the other, as `loraplex rollout` has them drained, with kill -9 of any of
    them in between: one that drains, boots or takes over.
    """
    rolling = asyncio.create_task(_asked(fleet, "/admin/rollout"))
    while not rolling.done():
        await asyncio.wait([rolling], timeout=rng.uniform(0.2, 2.0))
        if not rolling.done() and await fleet.serving() > 1:
            send(rng.choice(fleet.workers()), signal.SIGKILL)
    await rolling


async def reload_config(fleet: DisturbedFleet, rng: Random) -> None:
    """SIGHUP of `serve`, after other limits were written."""
    before = await fleet.metric(RELOADS)
    fleet.configure(resume_max_tokens=rng.randint(100_000, 200_000))
    send(fleet.processes[0].pid, signal.SIGHUP)
    for _ in range(int(GONE_S / LOOK_S)):
        if await fleet.metric(RELOADS) > before:
            return
        await asyncio.sleep(LOOK_S)
    raise NotAsPromised(f"the config is not read again within {GONE_S:g} s")


async def _asked(fleet: DisturbedFleet, path: str) -> int:
    timeout = aiohttp.ClientTimeout(total=ROLLOUT_S)
    async with fleet.http.post(fleet.url + path, json={}, timeout=timeout) as answer:
        await answer.read()
        return answer.status


async def end_gateway(fleet: DisturbedFleet, rng: Random) -> None:
    """SIGTERM: it drains, ends, and `serve` starts another one."""
    pid = rng.choice(fleet.gateways())
    send(pid, signal.SIGTERM)
    await _replaced(fleet, pid)


async def kill_gateway(fleet: DisturbedFleet, rng: Random) -> None:
    pid = rng.choice(fleet.gateways())
    send(pid, signal.SIGKILL)
    await _replaced(fleet, pid)


async def stop_gateway(fleet: DisturbedFleet, rng: Random) -> None:
    """The only one stands still, for longer than workers wait for it or not."""
    pid = rng.choice(fleet.gateways())
    send(pid, signal.SIGSTOP)
    await asyncio.sleep(rng.uniform(0.5, 2 * STOPPED_S))
    send(pid, signal.SIGCONT)


async def _replaced(fleet: DisturbedFleet, pid: int) -> None:
    """Raises NotAsPromised if the gateway process does not end, or no other one comes."""
    await gone(pid)
    for _ in range(int(GONE_S / LOOK_S)):
        if await fleet.gateways_up() == fleet.shape.gateways:
            return
        await asyncio.sleep(LOOK_S)
    raise NotAsPromised(f"the gateway process is not replaced within {GONE_S:g} s")


# ---- all together --------------------------------------------------------------------------------


async def anything(fleet: DisturbedFleet, rng: Random) -> None:
    strikes: list[Strike] = [kill_worker, stop_worker, drain_worker, end_gateway]
    strikes += [freeze_engine] if fleet.shape.engine == "sim" else [kill_engine, stop_engine]
    await rng.choice(strikes)(fleet, rng)


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("kill", "kill -9 of a random worker", kill_worker),
        Scenario("kill-two", "kill -9 of two workers at once", kill_two, 5.0, spare=2),
        Scenario("kill-all", "kill -9 of all workers at once", kill_all, 6.0, spare=2),
        Scenario(
            "kill-booting",
            "kill -9 of a worker, and again while it boots",
            kill_booting,
            spare=2,
            engines=("sim",),
        ),
        Scenario("stop", "SIGSTOP of a random worker", stop_worker, spare=2),
        Scenario("engine-hangs", "an engine hangs", freeze_engine, spare=2, engines=("sim",)),
        Scenario(
            "engine-kill", "kill -9 of EngineCore alone", kill_engine, spare=2, engines=("vllm",)
        ),
        Scenario(
            "engine-stop", "SIGSTOP of EngineCore alone", stop_engine, spare=2, engines=("vllm",)
        ),
        Scenario("reset-data", "all data connections reset", reset(DATA), 1.0, linked=True),
        Scenario(
            "reset-control", "all control connections reset", reset(CONTROL), 1.0, linked=True
        ),
        Scenario("reset-both", "all connections reset", reset(DATA, CONTROL), 1.0, linked=True),
        Scenario("cut", "all connections cut at any byte", cut, 0.2, linked=True),
        Scenario("stall", "data, control or both stall, one way or both", stall, linked=True),
        Scenario("drain", "drain of a random worker", drain_worker, spare=2),
        Scenario("rollout", "`loraplex rollout`, again and again", roll_out, spare=2),
        Scenario(
            "kill-draining",
            "kill -9 of a worker that drains, and of another one",
            kill_while_draining,
            5.0,
            spare=2,
        ),
        Scenario(
            "kill-rollout",
            "kill -9 of any worker, during rollouts",
            kill_while_rolling_out,
            spare=2,
        ),
        Scenario("reload", "other limits, and SIGHUP of `serve`", reload_config, 1.0),
        Scenario("gateway", "SIGTERM of one gateway of two", end_gateway, spare=2, gateways=2),
        Scenario("gateway-stop", "SIGSTOP of the only gateway", stop_gateway, 5.0),
        Scenario(
            "gateway-kill",
            "kill -9 of one gateway of two; clients ask again with their key",
            kill_gateway,
            gateways=2,
            repeats=True,
        ),
        Scenario("mixed", "any of these, by chance", anything, spare=2, gateways=2),
    )
}


async def until_ready(fleet: DisturbedFleet, scenario: Scenario) -> None:
    """Until enough workers serve for the next strike. Raises NotAsPromised."""
    wanted = min(fleet.shape.workers, scenario.spare + 1)
    try:
        await fleet.until_serving(wanted)
    except NotStarted as exc:
        raise NotAsPromised(str(exc)) from exc
