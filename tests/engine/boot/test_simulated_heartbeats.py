"""What the gateway hears of a worker with real vLLM, field by field beside what the routing
simulator tells it. Both do the same: a prompt beside a stream, and three adapters for two slots.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import zmq.asyncio

from bench.load.workload import PlannedRequest
from bench.routing.sim.timing import timing_of
from bench.routing.sim.worker import WorkerFacts
from bench.routing.sim.world import Simulation, World
from shared.link import messages
from shared.link.messages import Heartbeat, LoopHeld
from shared.link.sockets import RouterSocket
from shared.runtime.children import Zygote
from tests.harness import cluster, demo_config

ADAPTERS = ("pirate", "haiku", "shouting")
ANOTHER_GATEWAY = {"yours", "acked"}
"""What a heartbeat says of the gateway that gets it. Here it is one that has sent nothing."""
NOT_SIMULATED = {"peer_endpoint"}
"""Simulated workers get no files from each other."""
ALIKE = ("state", "slots", "running", "waiting", "load_bytes", "suspect", "warming", "failed")
COUNTED = ("adapter_loads", "adapter_evictions", "engine_requests")
LATE_S = 60.0


class Ear:
    """A gateway's control socket that only listens."""

    def __init__(self, folder: Path) -> None:
        self.endpoint = f"ipc://{folder}/ear"
        self._heard = asyncio.Event()
        self.last: Heartbeat | None = None
        self._socket = RouterSocket(zmq.Context.instance(), self.endpoint, self._hear)

    def _hear(self, peer: bytes, data: bytes) -> None:
        message = messages.decode_worker_control(data)
        if not isinstance(message, LoopHeld):
            self.last = message
            self._heard.set()

    async def until(self, what: Callable[[Heartbeat], object]) -> Heartbeat:
        async with asyncio.timeout(LATE_S):
            while self.last is None or not what(self.last):
                self._heard.clear()
                await self._heard.wait()
        return self.last

    def close(self) -> None:
        self._socket.close()


def told(heartbeat: Heartbeat) -> set[str]:
    """The fields with another value than at a worker that has measured nothing and holds
    nothing.
    """
    empty = Heartbeat("", 0, 0, "", messages.WorkerState.JOINING)
    fields = Heartbeat.__struct_fields__
    return {name for name in fields if getattr(heartbeat, name) != getattr(empty, name)}


def held(heartbeat: Heartbeat) -> dict[str, tuple[object, ...]]:
    return {
        state.name: (state.tier, state.loading, state.in_flight, state.pinned)
        for state in heartbeat.adapters
    }


def earlier(simulation: Simulation, than_s: float) -> bool:
    return simulation.agenda.now < than_s


def simulated(prompts: int, size_bytes: int) -> tuple[Heartbeat, Heartbeat]:
    """While the stream runs, and at the end."""
    planned = [PlannedRequest(0, 1.0, None, None, 10, 2000)]
    planned += [PlannedRequest(1 + n, 1.5 + n / 10, None, None, 60, 8) for n in range(prompts)]
    at_s = 20.0
    for adapter in range(len(ADAPTERS)):
        planned.append(PlannedRequest(len(planned), at_s + 5 * adapter, adapter, None, 10, 8))
    facts = WorkerFacts("demo", 2, cpu_adapters=2, adapter_bytes=size_bytes, disk_warm=False)
    world = World("expected-ttft", 1, len(ADAPTERS), 1, timing_of("own"), facts)
    simulation = Simulation(replace(world), planned)
    simulation.begin()
    found = []
    for until_s in (3.0, 60.0):
        simulation.agenda.run(partial(earlier, simulation, until_s))
        worker = simulation.dispatcher.fleet.get("w0000")
        assert worker is not None
        found.append(worker.heartbeat)
    return found[0], found[1]


async def test_the_simulator_s_heartbeats_say_what_a_vllm_worker_s_say(
    tmp_path: Path, zygote: Zygote
) -> None:
    config = demo_config(max_loras=2)
    config["llm_configs"][0]["engine_kwargs"] |= {"max_cpu_loras": 4}
    async with cluster(config, tmp_path, zygote) as c:
        ear = Ear(tmp_path)
        try:
            await c.start_worker("w0", gateways=[ear.endpoint])
            long = asyncio.create_task(c.text("demo", max_tokens=900, ignore_eos=True))
            await ear.until(lambda h: h.running == 1 and h.step_s)
            prompts = 0
            while not (ear.last and ear.last.prefill_tokens_per_s):  # its first token, measured
                await c.text("demo", " ".join(["word"] * 30), max_tokens=8)
                prompts += 1
                if long.done():
                    long = asyncio.create_task(c.text("demo", max_tokens=900, ignore_eos=True))
            busy = await ear.until(lambda h: h.running == 1 and h.prefill_tokens_per_s)
            await long
            before = busy.engine_requests
            for name in ADAPTERS:
                await c.text(f"demo:{name}", max_tokens=8)
            last = await ear.until(
                lambda h: not h.running and len(h.adapters) == 3 and h.adapter_evictions
            )
        finally:
            ear.close()
    size = last.load_bytes
    ours_busy, ours = simulated(prompts, size)

    # the same fields say something, before and after
    assert told(busy) - ANOTHER_GATEWAY - NOT_SIMULATED == told(ours_busy) - ANOTHER_GATEWAY
    assert told(last) - ANOTHER_GATEWAY - NOT_SIMULATED == told(ours) - ANOTHER_GATEWAY
    for real, ours_ in ((busy, ours_busy), (last, ours)):
        differ = [name for name in ALIKE if getattr(real, name) != getattr(ours_, name)]
        assert not differ, (differ, real, ours_)
    assert [getattr(last, name) for name in COUNTED[:2]] == [
        getattr(ours, name) for name in COUNTED[:2]
    ]
    assert last.engine_requests - before == len(ADAPTERS)
    assert ours.engine_requests - ours_busy.engine_requests == len(ADAPTERS)
    renamed = dict(zip(sorted(held(ours)), ADAPTERS, strict=True))
    assert held(last) == {renamed[name]: state for name, state in held(ours).items()}

    # and mean the same by it
    for heartbeat in (last, ours):
        assert 0 < heartbeat.stall_s <= heartbeat.load_s
        assert heartbeat.stall_s <= heartbeat.stalled_s  # a mean of three, and their sum
    for heartbeat in (busy, ours_busy):
        # a prompt adds less to a step than it would take alone
        assert heartbeat.prefill_tokens_per_s > 0 < heartbeat.step_s
        assert heartbeat.kv_usage > 0
