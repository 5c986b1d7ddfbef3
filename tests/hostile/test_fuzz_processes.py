"""Shell. The short form of `python -m tests.hostile.fuzz`: mutated requests to a real gateway, and
mutated messages over its link, beside honest requests.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from tests.harness import Cluster
from tests.hostile.fuzz import fuzz_messages, fuzz_requests, fuzzed_cluster

HTTP_REQUESTS, WIRE_MESSAGES = 5_000, 100_000


@pytest_asyncio.fixture(loop_scope="session")
async def up(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with fuzzed_cluster(tmp_path) as c:
        yield c


async def test_mutated_requests_to_a_gateway_are_answered_or_refused(up: Cluster) -> None:
    await fuzz_requests(up, HTTP_REQUESTS, lambda _: None)


async def test_mutated_messages_of_a_peer_harm_nobody(up: Cluster) -> None:
    await fuzz_messages(up, WIRE_MESSAGES, lambda _: None)
