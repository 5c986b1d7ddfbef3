"""Shell. What the messages between gateway and worker cost to write and to read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bench.micro.conftest import PerUnit
from shared.adapters.identity import AdapterRef
from shared.link import messages
from shared.link.token_ids import pack

STREAMS = 64
EVENT = (
    b"data: "
    b'{"id":"chatcmpl-0123456789abcdef","object":"chat.completion.chunk","created":1,'
    b'"model":"base","choices":['
    + (
        b'{"index":0,"delta":{"content":" '
        b'token"},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'
    )
)
BODY = (
    b'{"model":"base:adapter","messages":[{"role":"user","content":"'
    + b"word " * 400
    + b'"}],"max_tokens":64,"stream":true}'
)
TOKEN = pack((12345,))
RESIDENT = 64
ADAPTERS = tuple(
    messages.AdapterState(f"adapter-{i:04d}", "0" * 64, messages.Tier.GPU) for i in range(RESIDENT)
)
MESSAGES: dict[str, tuple[Any, Callable[[bytes], object], int, str]] = {
    f"step of {STREAMS} streams": (
        messages.Step([(sid, 0, EVENT, TOKEN) for sid in range(STREAMS)]),
        messages.decode_worker_data,
        STREAMS,
        "token",
    ),
    "step of one stream": (
        messages.Step([(1, 0, EVENT, TOKEN)]),
        messages.decode_worker_data,
        1,
        "token",
    ),
    f"request of {len(BODY):,} bytes": (
        messages.Generate(
            1, "/v1/chat/completions", "0" * 32, BODY, AdapterRef("base", "adapter", "0" * 64)
        ),
        messages.decode_gateway_data,
        1,
        "request",
    ),
    f"heartbeat with {RESIDENT} adapters": (
        messages.Heartbeat("w0", 1, 1, "base", messages.WorkerState.SERVING, adapters=ADAPTERS),
        messages.decode_worker_control,
        RESIDENT,
        "adapter",
    ),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_encode(per_unit: PerUnit, name: str) -> None:
    message, _, units, unit = MESSAGES[name]
    per_unit(lambda: messages.encode(message), units, unit)


@pytest.mark.parametrize("name", MESSAGES)
def test_decode(per_unit: PerUnit, name: str) -> None:
    message, read, units, unit = MESSAGES[name]
    data = messages.encode(message)
    assert type(read(data)) is type(message)
    per_unit(lambda: read(data), units, unit)
