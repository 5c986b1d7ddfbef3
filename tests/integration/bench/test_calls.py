"""How much Python runs in the gateway for an answer and for a token. The counts are exact, so a
change that makes every request dearer is seen on a busy machine, too.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.gateways.in_process import Cost, Measurement, PlayedGateway, measure, played_gateway

CLIENTS = 32
# Reached on 2026-12-01 with Python 3.11: what is written beside each bound, a twentieth below it.
MOST_CALLS = {
    "whole": 166,  # 158
    "whole, adapter": 198,  # 189
    "begin and end of a stream": 186,  # 176
    "whole, limits": 174,  # 165
}
MOST_CALLS_OF_A_TOKEN = 1.9
"""One for the token, and 9 for each step of all streams. The rest is what happens beside it."""
ANSWERS = {
    "whole": Measurement(CLIENTS, 1, adapter=False, counted=True),
    "whole, adapter": Measurement(CLIENTS, 1, counted=True),
    "begin and end of a stream": Measurement(CLIENTS, 1, tokens=2, adapter=False, counted=True),
    "whole, limits": Measurement(CLIENTS, 1, adapter=False, limited=True, counted=True),
}


@pytest.mark.parametrize("name", MOST_CALLS)
async def test_an_answer_takes_the_gateway_at_most_so_many_calls(tmp_path: Path, name: str) -> None:
    wanted = ANSWERS[name]
    async with played_gateway(tmp_path, limited=wanted.limited) as gateway:
        await gateway.join()
        gateway.connect(wanted.clients)
        await measure(wanted, gateway)  # whatever is made once
        found = await measure(wanted, gateway)
    assert found.all_calls <= MOST_CALLS[name], sorted(found.calls.items())


async def test_a_token_takes_the_gateway_hardly_more_than_one_call(tmp_path: Path) -> None:
    async with played_gateway(tmp_path) as gateway:
        await gateway.join()
        gateway.connect(CLIENTS)
        await measure(Measurement(CLIENTS, 1, tokens=2), gateway)
        short, long = [await _fewest(tokens, gateway) for tokens in (2, 12)]
    each = (long.all_calls - short.all_calls) / 10
    assert each <= MOST_CALLS_OF_A_TOKEN, (short.calls, long.calls)


async def _fewest(tokens: int, gateway: PlayedGateway) -> Cost:
    """Of a few runs. On a busy machine the gateway's own clockwork falls into some of them."""
    wanted = Measurement(CLIENTS, 1, tokens=tokens, counted=True)
    return min([await measure(wanted, gateway) for _ in range(3)], key=lambda c: c.all_calls)
