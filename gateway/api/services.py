"""Shell. The parts of a gateway process that requests for tokens need, and their limits."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from gateway.accounts.keys import Keys
from gateway.adapters.resolver import Resolver
from gateway.adapters.usage import AdapterUsage
from gateway.api.accounting import Accounting
from gateway.api.body.bounds import DEFAULT_BOUNDS, Bounds
from gateway.api.deadlines import Deadlines
from gateway.dispatch.dispatcher import Dispatcher
from gateway.telemetry.access_log import AccessLog
from gateway.telemetry.prometheus import Metrics
from gateway.telemetry.traces import Traces


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The limits that hold for every request, whatever its account."""

    max_body_bytes: int
    slow_reader_bytes: int
    request_timeout_s: float
    resume: bool = False
    bounds: Bounds = DEFAULT_BOUNDS
    max_unfinished_body_bytes: int = 256 << 20
    keep_answers_s: float = 0.0
    private_prefix_cache: bool = False


@dataclass(slots=True)
class GenerationServices:
    """The parts of this gateway process that requests for tokens need. `limits` is replaced when
    the config changes.
    """

    dispatcher: Dispatcher
    resolver: Resolver
    metrics: Metrics
    keys: Keys
    accounting: Accounting
    limits: RequestLimits
    access: AccessLog
    usage: AdapterUsage
    loop: asyncio.AbstractEventLoop
    deadlines: Deadlines
    traces: Traces | None = None
