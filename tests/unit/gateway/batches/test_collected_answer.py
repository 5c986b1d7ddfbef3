"""A line of a file waits behind everything else, whatever priorities its key may use."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import pytest

from gateway.accounts.account import LOWEST_PRIORITY, Account
from gateway.accounts.keys import Keys
from gateway.accounts.ledger import Ledger
from gateway.accounts.limiter import Limiter
from gateway.accounts.shared_limits import SharedLimits
from gateway.adapters.resolver import Resolver
from gateway.adapters.usage import AdapterUsage
from gateway.api.accounting import Accounting
from gateway.api.deadlines import Deadlines
from gateway.api.exchange import GenerationServices, RequestLimits
from gateway.batches.collected_answer import LineRequest, answer_line
from gateway.dispatch.dispatcher import Dispatcher
from gateway.dispatch.queue.admission import Admission
from gateway.dispatch.settings import DispatchSettings, TimeAndChance
from gateway.fleet.fleet import Fleet
from gateway.routing.registry import make_policy
from gateway.telemetry.access_log import AccessLog
from gateway.telemetry.prometheus import Metrics
from tests.unit.gateway.api.test_no_reference_cycles import NoAliases, Wires


def services_in(folder: Path) -> GenerationServices:
    loop, metrics, fleet = asyncio.get_running_loop(), Metrics(), Fleet(3.0, {})
    dispatcher = Dispatcher(
        fleet,
        make_policy("expected-ttft"),
        Admission(100, 60.0),
        Wires(),
        metrics,
        DispatchSettings(100),
        TimeAndChance(time.monotonic, random.Random(1)),
    )
    return GenerationServices(
        dispatcher,
        Resolver({"base": None}, NoAliases(), fleet),  # type: ignore[dict-item, arg-type]
        metrics,
        Keys(),
        Accounting(Limiter(SharedLimits(folder / "limits", 0)), Ledger(), metrics),
        RequestLimits(1 << 20, 1 << 20, 600.0),
        AccessLog("g0", "error"),
        AdapterUsage(),
        loop,
        Deadlines(loop),
    )


@pytest.mark.parametrize("priorities", [(0, 0), (-5, 10), (0, LOWEST_PRIORITY)])
async def test_a_line_has_the_lowest_priority(priorities: tuple[int, int], tmp_path: Path) -> None:
    services = services_in(tmp_path)
    incoming = LineRequest("/v1/completions", {"content-type": "application/json"})
    body = b'{"model":"base","prompt":"hello","priority":-5}'
    account = Account("a", priority=priorities)
    line = asyncio.create_task(answer_line(services, account, incoming, body))
    async with asyncio.timeout(10):
        while not services.dispatcher.open_requests:
            await asyncio.sleep(0)
    (open_request,) = services.dispatcher.each_open()
    assert open_request.requester.priority == LOWEST_PRIORITY
    line.cancel()
    with pytest.raises(asyncio.CancelledError):
        await line
