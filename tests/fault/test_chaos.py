"""Shell. The short form of `make chaos`: a few seconds of each kind of fault, with every token of
every answer compared.
"""

from __future__ import annotations

import pytest

from bench.chaos.runner import ChaosRun, Effort
from bench.chaos.scenarios import SCENARIOS
from bench.chaos.soak import soak

SHORT = Effort("sim", seconds=6.0, streams=16, workers=3, seed=1, command="")


RARER = [
    *("kill-all", "kill-booting", "kill-draining", "kill-rollout"),
    *("reset-both", "reload", "gateway-stop", "gateway-kill"),
]


@pytest.mark.parametrize(
    "name",
    [
        *("kill", "stop", "cut", "rollout", "gateway"),
        *(pytest.param(name, marks=pytest.mark.long) for name in RARER),
    ],
)
async def test_no_answer_fails_and_no_token_is_wrong_while(name: str) -> None:
    row = await ChaosRun(SCENARIOS[name], SHORT, print).run()
    assert row.holds and row.strikes > 0, row


async def test_a_cluster_that_loses_its_streams_does_not_hold() -> None:
    """The same scenario with moves switched off. The clients then notice."""
    row = await ChaosRun(SCENARIOS["kill"], SHORT, print, gateway={"resume": False}).run()
    assert row.failed > 0 and not row.holds, row


async def test_while_clients_adapters_and_workers_come_and_go_no_answer_fails() -> None:
    """The short form of `make soak`. It is too short to show what grows."""
    report = await soak(seconds=25.0, seed=1)
    assert report.failures == []
    assert report.faults and report.left and report.changes and report.answers, report
