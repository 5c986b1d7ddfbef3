"""Shell. What it costs to read the head of a request and to frame an event for the client, beside
json doing the same.
"""

from __future__ import annotations

import json

from bench.micro.conftest import PerUnit
from bench.micro.test_wire_cost import BODY, EVENT
from gateway.api.body.schema import parse_body_fields

JOINED = 8


def test_head_of_a_request(per_unit: PerUnit) -> None:
    per_unit(lambda: parse_body_fields(BODY), 1, "request")


def test_whole_request_by_json_for_comparison(per_unit: PerUnit) -> None:
    per_unit(lambda: json.loads(BODY), 1, "request")


def test_frame_an_event(per_unit: PerUnit) -> None:
    per_unit(lambda: b"%x\r\n%b\r\n" % (len(EVENT), EVENT), 1, "event")


def test_frame_eight_events_as_one(per_unit: PerUnit) -> None:
    events = [EVENT] * JOINED

    def call() -> bytes:
        data = b"".join(events)
        return b"%x\r\n%b\r\n" % (len(data), data)

    per_unit(call, JOINED, "event")


def test_render_an_event_by_json_for_comparison(per_unit: PerUnit) -> None:
    chunk = json.loads(EVENT[6:])
    per_unit(lambda: b"data: " + json.dumps(chunk).encode() + b"\n\n", 1, "event")
