"""Pure. What `loraplex advise --simulate` asks the simulator, and its answer, each as JSON."""

from __future__ import annotations

import msgspec

from gateway.advisor.advice import Expectation, FleetSize, Goal
from gateway.advisor.traffic import Traffic


class SimulatorQuestion(msgspec.Struct, frozen=True):
    """One base model. `workers` is where the search for enough workers begins: what the closed
    forms found, or None.
    """

    traffic: Traffic
    fleet: FleetSize
    goal: Goal
    workers: int | None = None


class SimulatorAnswer(msgspec.Struct, frozen=True):
    """What the production code did in virtual time. `requests` of each run were counted. None: the
    fleet has no worker; no number of workers that was tried reaches the goal.
    """

    requests: int
    now: Expectation | None
    workers: int | None
    then: Expectation | None


encode = msgspec.json.Encoder().encode
decode_question = msgspec.json.Decoder(SimulatorQuestion).decode
decode_answer = msgspec.json.Decoder(SimulatorAnswer).decode
