"""Shell. Sends a workload to a server, open loop (at scheduled times, whatever comes back) or
closed loop (a fixed number at a time).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice, takewhile
from typing import Any

import msgspec

from bench.load.client import LoadClient
from bench.load.measure import LoadOutcome, Meter
from bench.load.options import LoadPace, LoadTarget
from bench.load.reply import LoadReply
from bench.load.workload import PlannedRequest, Workload, prompt_text

EARLY_S = 0.0005
"""The event loop's timers count whole milliseconds: a request may leave this much early rather than
a millisecond late.
"""
LONGEST_SLEEP_S = 0.5
"""How long a stop may go unnoticed between two arrivals."""
SENDS_PER_TURN = 32
"""When behind schedule, other tasks run at least this often."""
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


@dataclass(slots=True)
class LoadProgress:
    """What can be seen of a run while it goes on; setting `stop` ends the sending, not what is in
    flight.
    """

    outcomes: list[LoadOutcome] = field(default_factory=list)
    failed: int = 0
    in_flight: int = 0
    stop: bool = False

    def add(self, outcome: LoadOutcome) -> None:
        self.outcomes.append(outcome)
        self.failed += outcome.error is not None


def request_body(target: LoadTarget, workload: Workload, request: PlannedRequest) -> bytes:
    """The JSON of one request."""
    text = prompt_text(workload, request)
    body: dict[str, Any] = {
        "model": target.base_model if request.adapter is None else target.models[request.adapter],
        **(
            {"messages": [{"role": "user", "content": text}]}
            if target.endpoint == "chat"
            else {"prompt": text}
        ),
        "max_tokens": request.output_tokens,
        "temperature": 0,
    }
    if target.stream:
        body["stream"] = True
        if target.ask_usage:
            body["stream_options"] = {"include_usage": True}
    if target.ignore_eos:
        body["ignore_eos"] = True
    return msgspec.json.encode(body | target.extra_body)


async def drive(
    client: LoadClient,
    target: LoadTarget,
    workload: Workload,
    load: Iterable[PlannedRequest],
    pace: LoadPace,
    meter: Meter,
    progress: LoadProgress,
) -> None:
    """Sends the load at its pace and returns when every request has ended; `progress.outcomes`
    holds how each went, in order of ending.
    """
    sender = _Sender(client, target, workload, meter, progress)
    requests = iter(load) if pace.requests is None else islice(load, pace.requests)
    if pace.concurrency is None:
        await _open_loop(sender, requests, pace, progress)
    else:
        await _closed_loop(sender, requests, pace.concurrency, pace, progress)


async def _open_loop(
    sender: _Sender, requests: Iterator[PlannedRequest], pace: LoadPace, progress: LoadProgress
) -> None:
    if pace.duration_s is not None:
        duration_s = pace.duration_s
        requests = takewhile(lambda request: request.at_s < duration_s, requests)
    sent = 0
    async with asyncio.TaskGroup() as group:
        for request in requests:
            while (  # noqa: ASYNC110
                early_s := request.at_s - sender.now_s()
            ) > EARLY_S and not progress.stop:
                # the clock is what is waited for
                await asyncio.sleep(min(early_s, LONGEST_SLEEP_S))
            if progress.stop:
                return
            if progress.in_flight >= pace.most_open:
                progress.add(sender.unsent(request))
            else:
                progress.in_flight += 1
                group.create_task(
                    sender.send(request, request.at_s), name=f"request-{request.index}"
                )
            sent += 1
            if sent % SENDS_PER_TURN == 0:
                await asyncio.sleep(0)


async def _closed_loop(
    sender: _Sender,
    requests: Iterator[PlannedRequest],
    concurrency: int,
    pace: LoadPace,
    progress: LoadProgress,
) -> None:
    duration_s = pace.duration_s

    async def one_after_another(begin_s: float) -> None:
        await asyncio.sleep(begin_s)
        while not progress.stop and (duration_s is None or sender.now_s() < duration_s):
            request = next(requests, None)
            if request is None:
                return
            progress.in_flight += 1
            await sender.send(request, None)

    async with asyncio.TaskGroup() as group:
        for number in range(concurrency):
            group.create_task(
                one_after_another(pace.ramp_s * number / concurrency), name=f"caller-{number}"
            )


class _Sender:
    def __init__(
        self,
        client: LoadClient,
        target: LoadTarget,
        workload: Workload,
        meter: Meter,
        progress: LoadProgress,
    ) -> None:
        self._client, self._target, self._workload, self._meter, self._progress = (
            client,
            target,
            workload,
            meter,
            progress,
        )
        self._path = PATHS[target.endpoint]

    def now_s(self) -> float:
        return time.perf_counter() - self._meter.start_s

    def unsent(self, request: PlannedRequest) -> LoadOutcome:
        now_s = self.now_s()
        detail = "not sent: too many requests in flight (--max-open)"
        return LoadOutcome(
            self._name(request), request.at_s, now_s, now_s, error="client_saturated", detail=detail
        )

    async def send(self, request: PlannedRequest, scheduled_s: float | None) -> None:
        """`scheduled_s` None: due now (closed loop)."""
        started_s = self.now_s()
        try:
            body = request_body(self._target, self._workload, request)
            reply = await self._client.post(
                self._path, body, stream=self._target.stream, meter=self._meter
            )
        finally:
            self._progress.in_flight -= 1
        self._progress.add(
            self._outcome(
                request, reply, started_s if scheduled_s is None else scheduled_s, started_s
            )
        )

    def _name(self, request: PlannedRequest) -> str | None:
        return None if request.adapter is None else self._target.adapters[request.adapter]

    def _outcome(
        self, request: PlannedRequest, reply: LoadReply, scheduled_s: float, started_s: float
    ) -> LoadOutcome:
        if self._target.ignore_eos and reply.usage_tokens not in (None, request.output_tokens):
            reply.fail(
                "wrong_length",
                f"{reply.usage_tokens} tokens where {request.output_tokens} were asked "
                "for and ignore_eos was set",
            )
        start_s = self._meter.start_s
        tier = reply.headers.get("x-loraplex-adapter-tier")
        return LoadOutcome(
            adapter=self._name(request),
            scheduled_s=scheduled_s,
            started_s=started_s,
            ended_s=reply.ended_s - start_s,
            first_byte_s=None if reply.first_byte_s is None else reply.first_byte_s - start_s,
            first_token_s=None if reply.first_token_s is None else reply.first_token_s - start_s,
            last_token_s=None if reply.last_token_s is None else reply.last_token_s - start_s,
            status=reply.status,
            error=reply.error,
            detail=reply.detail,
            output_tokens=reply.content_chunks
            if reply.usage_tokens is None
            else reply.usage_tokens,
            prompt_tokens=reply.prompt_tokens or 0,
            by_usage=reply.usage_tokens is not None,
            cold=None
            if request.adapter is None
            else _cold(reply.headers.get("x-loraplex-cold"), tier),
            tier=tier,
            worker=reply.headers.get("x-loraplex-worker"),
        )


def _cold(cold: str | None, tier: str | None) -> bool | None:
    if cold is not None:
        return cold.lower() in ("1", "true", "yes")
    return None if tier is None else tier != "gpu"
